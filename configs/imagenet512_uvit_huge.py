"""ImageNet 512x512 latents, U-ViT-H/4. Published: FID 4.05 (500k steps, batch 1024, 8 GPUs; DPM-Solver++, 50 steps).

python train_ldm.py --config=configs/imagenet512_uvit_huge.py
python eval_ldm.py --config=configs/imagenet512_uvit_huge.py --nnet_path=assets/uvit/imagenet512_uvit_huge.pth
"""

from configs import base, imagenet256_uvit_huge, imagenet512_uvit_large


def get_config(arg=""):
    return base.finish(imagenet512_uvit_large.at_512(imagenet256_uvit_huge.experiment()), arg)
