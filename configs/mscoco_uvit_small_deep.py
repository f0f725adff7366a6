"""MS-COCO 256x256 text-to-image, U-ViT-S/2 with four more layers. Published: FID 5.48, all else as mscoco_uvit_small.

python eval_t2i_discrete.py --config=configs/mscoco_uvit_small_deep.py \
    --nnet_path=assets/uvit/mscoco_uvit_small_deep.pth
"""

from configs import mscoco_uvit_small


def get_config(arg=""):
    return mscoco_uvit_small.get_config(arg, size="S-deep")
