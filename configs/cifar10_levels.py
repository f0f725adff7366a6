"""CIFAR-10 32x32, DDPM's U-Net with level skipping (Giladi, Meir, Kawar and Elad), from DDPM's own weights.

Published (zeros for what is missing): FID 4.58, 4.46, 5.59, 9.40, 16.19 at c = 0, 1, 2, 3, 5; 1,000 ancestral steps.
The length and the rate of their training are not known; these are guesses. Start from google/ddpm-cifar10-32:

python train.py --config=configs/cifar10_levels.py --pretrained_weight=ddpm-cifar10-32
python eval.py --config=configs/cifar10_levels.py --nnet_path=<workdir>/last.ckpt --config.exit.levels.c=2.0
"""

from configs import base, cifar10_unet, digits_levels_tiny


def get_config(arg=""):
    c = cifar10_unet.get_config()
    digits_levels_tiny.skip_levels(c)
    c.train.n_steps = 100_000
    c.sample.ddpm.variance = "beta"  # DDPM's own, sigma-hat of the report's last table
    return base.finish(c, arg)
