"""CelebA 64x64, U-ViT-S/4. Published: FID 2.87 (500k steps, batch 128, 4 GPUs; Euler-Maruyama SDE, 1,000 steps).

bash scripts/train_celeba64.sh && bash scripts/eval_celeba64.sh
"""

from configs import base


def get_config(arg=""):
    return base.finish(experiment(), arg)


def experiment():
    c = base.config()
    base.uvit(c, "S", img_size=64, patch_size=4, in_chans=3)
    c.dataset.name = "celeba"
    c.dataset.random_flip = True
    c.train.update(n_steps=500_000, batch_size=128)
    c.optimizer.update(lr=2e-4, betas=(0.99, 0.99))
    c.lr_scheduler.warmup_steps = 5_000
    c.eval.reference = "assets/fid_stats/fid_stats_celeba64_train_50000_ddim.npz"
    return c
