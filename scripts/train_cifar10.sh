#!/usr/bin/env bash
# Fine-tune the released U-ViT of CIFAR-10 with exits (AdaDiff's settings: 512 images per step, lr 4e-4, 200000 steps).
# PRETRAINED= (empty) trains from scratch with the settings of the config; further flags are passed on.
set -euo pipefail
CONFIG=${CONFIG:-configs/cifar10_uvit_small.py}
PRETRAINED=${PRETRAINED-assets/uvit/cifar10_uvit_small.pth}
WORKDIR=${WORKDIR:-workdir/cifar10_uvit_small}
PROCESSES=${PROCESSES:-4}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
FLAGS=()
if [ -n "$PRETRAINED" ]; then
    FLAGS=(--pretrained_weight="$PRETRAINED" --config.optimizer.lr=4e-4 --config.train.batch_size=512 --config.train.n_steps=200000)
fi
launch train.py --config="$CONFIG" --workdir="$WORKDIR" "${FLAGS[@]}" "$@"
