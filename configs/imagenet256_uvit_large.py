"""ImageNet 256x256 latents, U-ViT-L/2. Published: FID 3.40 (300k steps, batch 1024, 8 GPUs; DPM-Solver, 50 steps).

python train_ldm.py --config=configs/imagenet256_uvit_large.py
python eval_ldm.py --config=configs/imagenet256_uvit_large.py --nnet_path=assets/uvit/imagenet256_uvit_large.pth
"""

from configs import base


def get_config(arg=""):
    return base.finish(experiment(), arg)


def experiment(size="L"):
    """32x32x4 latents; the Huge and the 512-pixel models are this with differences."""
    c = base.config()
    base.uvit(c, size, img_size=32, patch_size=2, in_chans=4, num_classes=1001, use_checkpoint=True)
    c.autoencoder.update(path="assets/stable-diffusion/autoencoder_kl.pth", scale=0.18215)
    c.regime = "latents"
    c.dataset.name = "latents"
    c.dataset.path = "assets/datasets/imagenet256_features"
    c.dataset.random_flip = True
    c.dataset.p_uncond = 0.15
    c.train.update(n_steps=300_000, batch_size=1024)
    c.optimizer.update(lr=2e-4, betas=(0.99, 0.99))
    c.lr_scheduler.warmup_steps = 5_000
    c.sample.update(algorithm="dpm_solver", sample_steps=50, mini_batch_size=50, scale=0.4)
    c.eval.pairs = ("free", "tied")
    c.eval.reference = "assets/fid_stats/fid_stats_imagenet256_guided_diffusion.npz"
    return c
