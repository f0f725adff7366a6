"""CelebA 64x64, AdaDiff as released: the U-ViT-S/4 fine-tuned for 200k steps of 1024 images, exits at certainty 0.95.

python train.py --config=configs/celeba64_adadiff_small.py --pretrained_weight=assets/uvit/celeba64_uvit_small.pth
"""

from configs import base, celeba64_uvit_small


def get_config(arg=""):
    c = celeba64_uvit_small.experiment()
    base.adadiff(c, certainty=0.95, n_steps=200_000, batch_size=1024)
    c.optimizer.lr = 8e-4
    return base.finish(c, arg)
