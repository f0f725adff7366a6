"""Digits 8x8 with classes, a tiny early-exit DiT with a final layer of its own at every exit.

python train.py --config=configs/digits_dit_tiny.py
python eval.py --config=configs/digits_dit_tiny.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny


def get_config(arg=""):
    c = base.config("dit")
    c.nnet.update(img_size=8, patch_size=2, in_chans=1, embed_dim=128, depth=7, num_heads=4, num_classes=10)
    c.nnet.update(learn_sigma=False, attention="math")
    digits_uvit_tiny.recipe(c)
    c.eval.update(thresholds=(0.99, 0.98, 0.97), fixed=(3, 4), fewer_steps=(10,), sweep=("schedule",))
    return base.finish(c, arg)
