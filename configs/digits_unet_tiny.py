"""Digits 8x8 with classes, a tiny DDPM U-Net that can be left after each of its three resolution levels.

python train.py --config=configs/digits_unet_tiny.py
python eval.py --config=configs/digits_unet_tiny.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny


def get_config(arg=""):
    c = base.config("unet")
    c.nnet.update(img_size=8, in_chans=1, widths=(32, 64, 64), n_blocks=1, num_classes=10)
    digits_uvit_tiny.recipe(c)
    c.train.n_steps = 1_500
    c.eval.update(thresholds=(0.98, 0.95, 0.9), fixed=(1, 2))
    return base.finish(c, arg)
