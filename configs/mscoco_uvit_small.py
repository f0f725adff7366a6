"""MS-COCO 256x256 text-to-image, U-ViT-S/2. Published: FID 5.95 (1M steps, batch 256, 4 GPUs; DPM-Solver++, 50 steps).

python train_t2i_discrete.py --config=configs/mscoco_uvit_small.py
python eval_t2i_discrete.py --config=configs/mscoco_uvit_small.py --nnet_path=assets/uvit/mscoco_uvit_small.pth
"""

from configs import base


def get_config(arg="", size="S"):
    return base.finish(experiment(size), arg)


def experiment(size="S"):
    """FID against 30,000 images from captions of the validation split."""
    c = base.config()
    c.process = "sd"
    base.uvit(c, size, img_size=32, patch_size=2, in_chans=4, clip_dim=768, num_clip_token=77)
    c.autoencoder.update(path="assets/stable-diffusion/autoencoder_kl.pth", scale=0.23010)
    c.regime = "text"
    c.dataset.name = "captions"
    c.dataset.path = "assets/datasets/coco256_features"
    c.dataset.p_uncond = 0.1
    c.train.update(n_steps=1_000_000, batch_size=256)
    c.optimizer.update(lr=2e-4, betas=(0.9, 0.9))
    c.lr_scheduler.warmup_steps = 5_000
    c.sample.update(algorithm="dpm_solver_pp", sample_steps=50, n_samples=30_000, mini_batch_size=50, scale=1.0)
    c.eval.pairs = ("free", "tied")
    c.eval.reference = "assets/fid_stats/fid_stats_mscoco256_val.npz"
    return c
