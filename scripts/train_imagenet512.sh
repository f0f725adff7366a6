#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 512x512 with exits (500k steps of 1024). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/imagenet512_uvit_huge.py PRETRAINED=assets/uvit/imagenet512_uvit_huge.pth WORKDIR=… trains H/4.
# Needs: python -m scripts.extract_features imagenet --images DIR --resolution 512 --out assets/datasets/imagenet512_features
# Several machines: MACHINES, MACHINE_RANK and MAIN_IP, PROCESSES counts all of them together (scripts/slurm_example.sh).
set -euo pipefail
CONFIG=${CONFIG:-configs/imagenet512_uvit_large.py}
PRETRAINED=${PRETRAINED-assets/uvit/imagenet512_uvit_large.pth}
WORKDIR=${WORKDIR:-workdir/imagenet512_uvit_large}
PROCESSES=${PROCESSES:-8}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED")
fi
launch train_ldm.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
