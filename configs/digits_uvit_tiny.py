"""Digits 8x8 with classes (scikit-learn), a tiny early-exit U-ViT: the default experiment.

Minutes on two CPU cores, no download.

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
    f"fixed.layer=4,steps=5,{FEW}",
)


def get_config(arg=""):
    c = base.config()
    c.nnet.update(img_size=8, patch_size=2, in_chans=1, embed_dim=128, depth=6, num_heads=4, conv=False, num_classes=10)
    c.nnet.update(init="xavier", attention="math")
    recipe(c)
    c.optimizer.name = "muon"
    c.eval.update(thresholds=(0.98,), sweep=SWEEP)
    return base.finish(c, arg)


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
