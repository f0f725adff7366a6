#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 256x256 with exits (300k steps of 1024). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/imagenet256_uvit_huge.py PRETRAINED=assets/uvit/imagenet256_uvit_huge.pth WORKDIR=… trains H/2; CONFIG=configs/imagenet256_adadiff_large.py is AdaDiff's recipe.
# Needs: python -m scripts.extract_features imagenet --images DIR --out assets/datasets/imagenet256_features
# Several machines: MACHINES, MACHINE_RANK and MAIN_IP, PROCESSES counts all of them together (scripts/slurm_example.sh).
set -euo pipefail
CONFIG=${CONFIG:-configs/imagenet256_uvit_large.py}
PRETRAINED=${PRETRAINED-assets/uvit/imagenet256_uvit_large.pth}
WORKDIR=${WORKDIR:-workdir/imagenet256_uvit_large}
PROCESSES=${PROCESSES:-8}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED")
fi
launch train_ldm.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
