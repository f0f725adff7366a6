"""ImageNet 256x256 latents, DiT-XL/2. Published: FID 2.27 (7M steps, batch 256; guidance 1.5, 250 ancestral steps).

python train_ldm.py --config=configs/imagenet256_dit_xl.py --pretrained_weight=DiT-XL-2-256x256.pt
python eval_ldm.py --config=configs/imagenet256_dit_xl.py --nnet_path=DiT-XL-2-256x256.pt

As published, guidance is for the first three channels of four; --config.sample.guided_channels=0 guides all. Published
guidance 1.5 is scale 0.5 here. Published sampling learns its variances: here they are DDPM's posterior ones.
"""

from configs import base


def get_config(arg=""):
    return base.finish(experiment(), arg)


def experiment(img_size=32):
    """Latents of img_size^2 x 4; the 512-pixel model and SiT are this with differences."""
    c = base.config("dit")
    base.dit(c, "XL", img_size=img_size, patch_size=2, in_chans=4, num_classes=1001, use_checkpoint=True)
    size = 8 * img_size
    c.regime, c.process = "latents", "ddpm"
    c.autoencoder.update(path="assets/stable-diffusion/autoencoder_kl_ema.pth", scale=0.18215)
    c.dataset.update(name="latents", path=f"assets/datasets/imagenet{size}_features", random_flip=True, p_uncond=0.1)
    c.train.update(n_steps=7_000_000, batch_size=256)
    c.optimizer.update(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    c.lr_scheduler.warmup_steps = 0
    c.sample.update(algorithm="ddpm", sample_steps=250, mini_batch_size=50, scale=0.5, guided_channels=3)
    c.eval.pairs = ("free", "tied")
    c.eval.reference = f"assets/fid_stats/fid_stats_imagenet{size}_guided_diffusion.npz"
    return c
