"""Digits 8x8 with classes, DDPM's U-Net with level skipping (Giladi, Meir, Kawar and Elad): their tables in small.

bash scripts/digits_levels.sh            # trains what the tables need, evaluates, prints them; or, one network:
python train.py --config=configs/digits_levels_tiny.py --config.nnet.missing=zero
python eval.py --config=configs/digits_levels_tiny.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny


def get_config(arg=""):
    c = base.config("unet")
    c.nnet.update(img_size=8, in_chans=1, widths=(32, 64, 64, 64), n_blocks=1, num_classes=10)
    digits_uvit_tiny.recipe(c)
    skip_levels(c)
    c.mixed_precision = "no"  # convolutions in bf16 are slow on many CPUs
    c.train.update(n_steps=1_000, sample_interval=0, save_interval=1_000)
    c.sample.sample_steps = 100
    c.eval.seeds = (1,)
    return base.finish(c, arg)


def skip_levels(c):
    """Their method: DDPM, and batches that train the exit of one depth, drawn uniformly. No estimator is trained."""
    c.process, c.pred = "ddpm", "noise"
    c.nnet.update(heads="own", missing="zero", dropout=0.1)
    c.loss.update(lambda_u=0.0, lambda_layers=0.0)
    c.train.depths = "random"  # their second scheme: schedule
    c.exit.name = "levels"
    c.sample.update(algorithm="ddpm", sample_steps=1_000)
