"""CIFAR-10, AdaDiff as released: the U-ViT-S/2 fine-tuned for 200k steps of 512 images, exits at certainty 0.92.

python train.py --config=configs/cifar10_adadiff_small.py --pretrained_weight=assets/uvit/cifar10_uvit_small.pth
"""

from configs import base, cifar10_uvit_small


def get_config(arg=""):
    c = cifar10_uvit_small.experiment()
    base.adadiff(c, certainty=0.92, n_steps=200_000, batch_size=512)
    c.optimizer.lr = 4e-4
    return base.finish(c, arg)
