"""ImageNet 256x256 latents, U-ViT-H/2. Published: FID 2.29 (500k steps, batch 1024, 8 GPUs; DPM-Solver++, 50 steps).

python train_ldm.py --config=configs/imagenet256_uvit_huge.py
python eval_ldm.py --config=configs/imagenet256_uvit_huge.py --nnet_path=assets/uvit/imagenet256_uvit_huge.pth
"""

from configs import base, imagenet256_uvit_large


def get_config(arg=""):
    return base.finish(experiment(), arg)


def experiment():
    """Against L/2: discrete time, another autoencoder, no final convolution, fewer dropped labels."""
    c = imagenet256_uvit_large.experiment(size="H")
    c.process = "sd"
    c.nnet.conv = False
    c.autoencoder.path = "assets/stable-diffusion/autoencoder_kl_ema.pth"
    c.dataset.p_uncond = 0.1
    c.train.n_steps = 500_000
    c.sample.algorithm = "dpm_solver_pp"
    return c
