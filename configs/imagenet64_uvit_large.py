"""ImageNet 64x64 with classes, U-ViT-L/4. Published: FID 4.26 (300k steps, batch 1024, 8 GPUs; DPM-Solver, 50 steps).

CONFIG=configs/imagenet64_uvit_large.py bash scripts/train_imagenet64.sh
"""

from configs import imagenet64_uvit_mid


def get_config(arg=""):
    return imagenet64_uvit_mid.get_config(arg, size="L")
