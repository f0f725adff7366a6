#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 64x64 with exits (AdaDiff's settings: 1024 images per step, lr 3e-4, 300000 steps).
# PRETRAINED= (empty) trains from scratch with the settings of the config; further flags are passed on.
set -euo pipefail
CONFIG=${CONFIG:-configs/imagenet64_uvit_mid.py}
PRETRAINED=${PRETRAINED-assets/uvit/imagenet64_uvit_mid.pth}
WORKDIR=${WORKDIR:-workdir/imagenet64_uvit_mid}
PROCESSES=${PROCESSES:-8}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED" --config.optimizer.lr=3e-4 --config.train.batch_size=1024 --config.train.n_steps=300000)
fi
launch train.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
