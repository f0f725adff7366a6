"""ImageNet 512x512 latents, U-ViT-L/4. Published: FID 4.67 (500k steps, batch 1024, 8 GPUs; DPM-Solver, 50 steps).

python train_ldm.py --config=configs/imagenet512_uvit_large.py
python eval_ldm.py --config=configs/imagenet512_uvit_large.py --nnet_path=assets/uvit/imagenet512_uvit_large.pth
"""

from configs import base, imagenet256_uvit_large


def get_config(arg=""):
    return base.finish(at_512(imagenet256_uvit_large.experiment()), arg)


def at_512(c):
    """An experiment on 256x256 with latents of 512x512."""
    c.nnet.update(img_size=64, patch_size=4)
    c.dataset.path = "assets/datasets/imagenet512_features"
    c.train.n_steps = 500_000
    c.sample.scale = 0.7
    c.eval.reference = "assets/fid_stats/fid_stats_imagenet512_guided_diffusion.npz"
    return c
