#!/usr/bin/env bash
# The main job, end to end on a CPU: train an early-exit U-ViT on the embedded digits, spend one budget over the number,
# the times and the depths of its calls, evaluate that beside its rivals, write the report.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=configs/digits_uvit_tiny.py
WORKDIR=${1:-demo}
BUDGET=0.12   # of the GMACs of full depth with 20 evenly spaced calls
PLAN="$WORKDIR/calibrated/plan-budget-$BUDGET.json"

python train.py --config=$CONFIG --workdir="$WORKDIR"
[ -f "$PLAN" ] || python -m scripts.calibrate --nnet_path="$WORKDIR/last.ckpt" --output="$WORKDIR/calibrated" --budget=$BUDGET
SWEEP=$(python -c "from configs.digits_uvit_tiny import SWEEP; print((*SWEEP, 'plan=$PLAN'))")
python eval.py --nnet_path="$WORKDIR/last.ckpt" --output="$WORKDIR/digits" --config.eval.sweep="$SWEEP"
python -m scripts.report "$WORKDIR/digits" --output "$WORKDIR/report.html"
