#!/usr/bin/env bash
# FID-50k and measured seconds of CIFAR-10 at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception fid_stats_cifar10
set -euo pipefail
CONFIG=${CONFIG:-configs/cifar10_uvit_small.py}
NNET=${NNET:-workdir/cifar10_uvit_small/last.ckpt}
OUTPUT=${OUTPUT:-$NNET-eval}
THRESHOLDS=${THRESHOLDS:-0.92,0.95,0.98}
PROCESSES=${PROCESSES:-4}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
launch eval.py --config="$CONFIG" --nnet_path="$NNET" --output_path="$OUTPUT" --exit_threshold="$THRESHOLDS" "$@"
python -m scripts.report "$OUTPUT"
