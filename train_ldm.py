"""Train an early-exit diffusion model on latents with class labels (scripts/extract_features.py makes them).

    python train_ldm.py --config=configs/imagenet256_uvit_large.py:quick       # synthetic latents, seconds
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 train_ldm.py \
        --config=configs/imagenet256_uvit_large.py --pretrained_weight=assets/uvit/imagenet256_uvit_large.pth
"""

import utils
from libs import regimes, trainer

if __name__ == "__main__":
    utils.launch(trainer.fit, regimes.latents, "train")
