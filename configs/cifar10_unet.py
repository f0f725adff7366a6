"""CIFAR-10 32x32, DDPM's U-Net, left after any of its four resolution levels. Trained as published.

Published: FID 3.17 (1,000 ancestral steps of the larger variance: --config.sample.algorithm=ddpm
--config.sample.sample_steps=1000 --config.sample.ddpm.variance=beta). Start from those weights as diffusers has them,
google/ddpm-cifar10-32:

python train.py --config=configs/cifar10_unet.py --pretrained_weight=ddpm-cifar10-32/diffusion_pytorch_model.safetensors
"""

from configs import base, cifar10_uvit_small


def get_config(arg=""):
    c = base.config("unet")
    c.nnet.update(img_size=32, in_chans=3, heads="own", dropout=0.1)
    cifar10_uvit_small.recipe(c)
    c.process = "ddpm"
    c.train.update(n_steps=800_000, grad_clip=1.0)
    c.optimizer.update(betas=(0.9, 0.999), weight_decay=0.0)
    c.lr_scheduler.warmup_steps = 5_000
    c.loss.target = "excess"
    c.sample.update(algorithm="ddim", sample_steps=100)
    return base.finish(c, arg)
