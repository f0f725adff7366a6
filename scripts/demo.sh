#!/usr/bin/env bash
# The main job, end to end on a CPU: train an early-exit U-ViT on the embedded digits, place calls and depths for 10 % of
# the MACs, evaluate that beside its rivals, write the report.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=configs/digits_uvit_tiny.py
WORKDIR=${1:-demo}

python train.py --config=$CONFIG --workdir="$WORKDIR"
[ -f "$WORKDIR/last.ckpt/plan-budget-0.1.json" ] ||
    python -m scripts.calibrate --config=$CONFIG --nnet_path="$WORKDIR/last.ckpt" --budget=0.1
python eval.py --config=$CONFIG --nnet_path="$WORKDIR/last.ckpt" --output="$WORKDIR/digits" --budget=0.1
python -m scripts.report "$WORKDIR/digits" --output "$WORKDIR/report.html"
