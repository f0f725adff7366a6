"""Train an early-exit text-to-image model on latents with contexts (scripts/extract_features.py makes them).

    python train_t2i_discrete.py --config=configs/mscoco_uvit_small.py:quick       # synthetic, seconds
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 train_t2i_discrete.py \
        --config=configs/mscoco_uvit_small.py --pretrained_weight=assets/uvit/mscoco_uvit_small.pth
"""

import utils
from libs import regimes, trainer

if __name__ == "__main__":
    utils.launch(trainer.fit, regimes.text_to_image, "train")
