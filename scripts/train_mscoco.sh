#!/usr/bin/env bash
# Fine-tune the released U-ViT of MS-COCO 256x256 with exits (1M steps of 256). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/mscoco_uvit_small_deep.py PRETRAINED=assets/uvit/mscoco_uvit_small_deep.pth WORKDIR=… trains S/2-Deep; CONFIG=configs/mscoco_adadiff_small.py is AdaDiff's recipe.
# Needs: python -m scripts.extract_features coco|empty … --out assets/datasets/coco256_features (README)
# Several machines: MACHINES, MACHINE_RANK and MAIN_IP, PROCESSES counts all of them together (scripts/slurm_example.sh).
set -euo pipefail
CONFIG=${CONFIG:-configs/mscoco_uvit_small.py}
PRETRAINED=${PRETRAINED-assets/uvit/mscoco_uvit_small.pth}
WORKDIR=${WORKDIR:-workdir/mscoco_uvit_small}
PROCESSES=${PROCESSES:-4}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED")
fi
launch train_t2i_discrete.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
