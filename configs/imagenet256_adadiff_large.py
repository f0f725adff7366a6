"""ImageNet 256x256 latents, AdaDiff as released: U-ViT-L/2 fine-tuned for 300k steps of 1024, exits at certainty 0.92.

python train_ldm.py --config=configs/imagenet256_adadiff_large.py \
    --pretrained_weight=assets/uvit/imagenet256_uvit_large.pth
"""

from configs import base, imagenet256_uvit_large


def get_config(arg=""):
    c = imagenet256_uvit_large.experiment()
    base.adadiff(c, certainty=0.92)
    return base.finish(c, arg)
