#!/usr/bin/env bash
# The main job, end to end on a CPU: train an early-exit U-ViT on the embedded digits, evaluate it beside its rivals, write
# the report. Then try: python -m scripts.calibrate --nnet_path=demo/last.ckpt --budget=0.1
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=configs/digits_uvit_tiny.py
WORKDIR=${1:-demo}

python train.py --config=$CONFIG --workdir="$WORKDIR"
python eval.py --config=$CONFIG --nnet_path="$WORKDIR/last.ckpt" --output="$WORKDIR/digits"
python -m scripts.report "$WORKDIR/digits" --output "$WORKDIR/report.html"
