"""Train an early-exit diffusion model on pixels.

    python train.py --config=configs/digits_uvit_tiny.py                # two CPU cores, minutes
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 train.py \
        --config=configs/cifar10_uvit_small.py --pretrained_weight=assets/uvit/cifar10_uvit_small.pth
"""

import utils
from libs import regimes, trainer

if __name__ == "__main__":
    utils.launch(trainer.fit, regimes.pixels, "train")
