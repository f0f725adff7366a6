"""ImageNet 64x64 with classes, U-ViT-M/4. Published: FID 5.85 (300k steps, batch 1024, 8 GPUs; DPM-Solver, 50 steps).

bash scripts/train_imagenet64.sh && bash scripts/eval_imagenet64.sh
"""

from configs import base


def get_config(arg="", size="M"):
    c = base.config()
    base.uvit(c, size, img_size=64, patch_size=4, in_chans=3, num_classes=1000, use_checkpoint=True)
    c.dataset.name = "imagenet"
    c.dataset.random_flip = True
    c.train.update(n_steps=300_000, batch_size=1024)
    c.optimizer.update(lr=3e-4, betas=(0.99, 0.99))
    c.lr_scheduler.warmup_steps = 5_000
    c.sample.update(algorithm="dpm_solver", sample_steps=50, mini_batch_size=200)
    c.eval.reference = "assets/fid_stats/fid_stats_imagenet64_guided_diffusion.npz"
    return base.finish(c, arg)
