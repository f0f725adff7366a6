"""Digits 8x8 with classes, an early-exit U-ViT of 7 layers, more than they need.

For comparison with configs/digits_uvit_tiny.py; most of docs/questions.md was measured on it.

python train.py --config=configs/digits_uvit_deep.py
python eval.py --config=configs/digits_uvit_deep.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny


def get_config(arg=""):
    c = base.config()
    digits_uvit_tiny.backbone(c, depth=6)
    digits_uvit_tiny.recipe(c)
    c.optimizer.name = "muon"
    sweep = tuple(entry.replace("fixed.layer=2", "fixed.layer=4") for entry in digits_uvit_tiny.SWEEP)
    c.eval.update(thresholds=(0.98,), sweep=sweep)
    return base.finish(c, arg)
