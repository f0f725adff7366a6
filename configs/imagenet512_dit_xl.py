"""ImageNet 512x512 latents, DiT-XL/2. Published: FID 3.04 (3M steps, batch 256; guidance 1.5, 250 ancestral steps).

python train_ldm.py --config=configs/imagenet512_dit_xl.py --pretrained_weight=DiT-XL-2-512x512.pt
python eval_ldm.py --config=configs/imagenet512_dit_xl.py --nnet_path=DiT-XL-2-512x512.pt
"""

from configs import base, imagenet256_dit_xl


def get_config(arg=""):
    c = imagenet256_dit_xl.experiment(img_size=64)
    c.train.n_steps = 3_000_000
    return base.finish(c, arg)
