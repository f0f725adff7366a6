"""Digits 8x8 with classes (scikit-learn), an early-exit U-ViT of 3 layers: the default experiment.

Minutes on two CPU cores, no download. Its depth is needed: without its last layer it is worse outside the noise (Q42 of
docs/questions.md). Of the 7 layers of configs/digits_uvit_deep.py the last three change nothing.

python train.py --config=configs/digits_uvit_tiny.py
python eval.py --config=configs/digits_uvit_tiny.py --nnet_path=<workdir>/ckpts/<step>.ckpt/nnet_ema.pth
"""

from configs import base

# Beside full depth on the configured, evenly spaced calls: a threshold there; the plain network on few, well placed
# calls, the rival to beat; and exits and one layer for all on such calls.
FEW = "grid=power:2,lower_order_final=False"
SWEEP = (
    "threshold.certainty=0.98",
    f"steps=4,{FEW}",
    f"steps=5,{FEW}",
    f"threshold.certainty=0.98,steps=5,{FEW}",
    f"fixed.layer=2,steps=5,{FEW}",
)


def get_config(arg=""):
    c = base.config()
    backbone(c, depth=2)
    recipe(c)
    c.nnet.gaussian = 64
    c.optimizer.name = "muon"
    c.train.n_steps = 4_400
    c.eval.update(thresholds=(0.98,), sweep=SWEEP)
    return base.finish(c, arg)


def backbone(c, depth):
    """16 tokens of 2x2 pixels; `depth` + 1 layers of width 128."""
    c.nnet.update(img_size=8, patch_size=2, in_chans=1, embed_dim=128, depth=depth, num_heads=4, num_classes=10)
    c.nnet.update(conv=False, init="xavier", attention="math")


def recipe(c):
    """The data, and how a network is trained, sampled and evaluated on them."""
    c.pred = "v"
    c.mixed_precision = "auto"
    c.nnet.heads = "own"
    c.loss.target = "excess"
    c.dataset.name = "digits"
    c.dataset.workers = 0
    c.train.update(n_steps=2_000, batch_size=64, stratified=True, grad_clip=1.0, ema_rate=0.99)
    c.train.update(log_interval=25, sample_interval=500, save_interval=500, monitor_steps=20)
    c.optimizer.update(lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01)
    c.lr_scheduler.update(name="cosine", warmup_steps=50)
    c.sample.update(algorithm="dpm_solver_pp_2m", sample_steps=20, n_samples=2_048, mini_batch_size=256)
    c.eval.update(extractor="digits_cnn", seeds=(1, 2, 3), timing_batch=256)
