"""CIFAR-10 32x32, U-ViT-S/2. Published: FID 3.11 (500k steps, batch 128, 4 GPUs; Euler-Maruyama SDE, 1,000 steps).

bash scripts/train_cifar10.sh && bash scripts/eval_cifar10.sh
"""

from configs import base


def get_config(arg=""):
    return base.finish(experiment(), arg)


def experiment():
    c = base.config()
    base.uvit(c, "S", img_size=32, patch_size=2, in_chans=3)
    recipe(c)
    return c


def recipe(c):
    """The data, and how a network is trained and evaluated on them."""
    c.dataset.name = "cifar10"
    c.dataset.random_flip = True
    c.train.update(n_steps=500_000, batch_size=128)
    c.optimizer.update(lr=2e-4, betas=(0.99, 0.999))
    c.lr_scheduler.warmup_steps = 2_500
    c.eval.reference = "assets/fid_stats/fid_stats_cifar10_train_pytorch.npz"
