"""CIFAR-10 32x32 with classes, an early-exit U-ViT of 3 layers, 10 epochs: an hour on one CPU core, 140 images/s.

The network and the recipe are those of configs/fashion_uvit_small.py; configs/cifar10_uvit_small.py is for GPUs.
CIFAR-10 as pictures in ten class folders is read with --config.dataset.name=images --config.dataset.path=FOLDER.

python train.py --config=configs/cifar10_uvit_tiny.py
python eval.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny, fashion_uvit_small


def get_config(arg=""):
    c = base.config()
    fashion_uvit_small.backbone(c, in_chans=3, embed_dim=128, depth=2, num_heads=4)
    digits_uvit_tiny.recipe(c)
    c.optimizer.name = "muon"
    c.dataset.update(name="cifar10", p_uncond=0.1, random_flip=True, workers=0)
    c.train.update(n_steps=4_000, batch_size=128, ema_rate=0.999)
    fashion_uvit_small.evaluation(c)
    return base.finish(c, arg)
