#!/usr/bin/env bash
# The main job, end to end on a CPU: train an early-exit U-ViT on the embedded digits, spend one budget over the number,
# the times and the depths of its calls, evaluate that beside its rivals, write the report.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=configs/digits_uvit_tiny.py
WORKDIR=${1:-demo}
PLANS="$WORKDIR/plans"

python train.py --config=$CONFIG --workdir="$WORKDIR"
# Shares of the GMACs of full depth with 20 evenly spaced calls. The rival to beat: all layers, only the calls are placed.
[ -f "$PLANS/plan-budget-0.1.json" ] || python -m scripts.calibrate --nnet_path="$WORKDIR/last.ckpt" --output="$PLANS" --budget=0.1
[ -f "$PLANS/plan-budget-0.2-full.json" ] || python -m scripts.calibrate --nnet_path="$WORKDIR/last.ckpt" \
    --output="$PLANS" --budget=0.2 --depth=full
SWEEP=$(python -c "from configs.digits_uvit_tiny import SWEEP; print((*SWEEP, 'plan=$PLANS/plan-budget-0.1.json', 'plan=$PLANS/plan-budget-0.2-full.json'))")
python eval.py --nnet_path="$WORKDIR/last.ckpt" --output="$WORKDIR/digits" --config.eval.sweep="$SWEEP"
python -m scripts.report "$WORKDIR/digits" --output "$WORKDIR/report.html"
