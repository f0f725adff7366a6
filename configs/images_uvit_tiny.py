"""Images of your own, 32x32, without classes: an early-exit U-ViT of 3 layers that trains on a CPU core, 140 images/s.

A folder, at any depth, or a zip file; configs/cifar10_uvit_small.py is for GPUs. With classes, the sub-folders or
dataset.json: --config.dataset.images.labels=True --config.dataset.p_uncond=0.1 --config.nnet.num_classes=N, one more
than there are.

python train.py --config=configs/images_uvit_tiny.py --config.dataset.path=FOLDER --workdir=runs/photos
python -m scripts.sample --nnet_path=runs/photos/last.ckpt --n=16 --output=runs/photos/made
"""

from configs import base, digits_uvit_tiny, fashion_uvit_small


def get_config(arg=""):
    c = base.config()
    fashion_uvit_small.backbone(c, in_chans=3, embed_dim=128, depth=2, num_heads=4)
    digits_uvit_tiny.recipe(c)
    c.nnet.num_classes = -1
    c.optimizer.name = "muon"
    c.dataset.update(name="images", p_uncond=0.0, random_flip=True)
    c.dataset.images.update(resolution=32, labels=False)
    c.train.update(n_steps=4_000, batch_size=128, ema_rate=0.999)
    fashion_uvit_small.evaluation(c)
    return base.finish(c, arg)
