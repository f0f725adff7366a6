#!/usr/bin/env bash
# Fine-tune the released U-ViT of CelebA 64x64 with exits (AdaDiff's settings: 1024 images per step, lr 8e-4, 200000 steps).
# PRETRAINED= (empty) trains from scratch with the settings of the config; further flags are passed on.
set -euo pipefail
CONFIG=${CONFIG:-configs/celeba64_uvit_small.py}
PRETRAINED=${PRETRAINED-assets/uvit/celeba64_uvit_small.pth}
WORKDIR=${WORKDIR:-workdir/celeba64_uvit_small}
PROCESSES=${PROCESSES:-4}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED" --config.optimizer.lr=8e-4 --config.train.batch_size=1024 --config.train.n_steps=200000)
fi
launch train.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
