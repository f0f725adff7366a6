#!/usr/bin/env bash
# FID-50k and measured seconds of ImageNet 64x64 at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception fid_stats_imagenet64
set -euo pipefail
CONFIG=${CONFIG:-configs/imagenet64_uvit_mid.py}
NNET=${NNET:-workdir/imagenet64_uvit_mid/last.ckpt}
OUTPUT=${OUTPUT:-$NNET-eval}
THRESHOLDS=${THRESHOLDS:-0.92,0.95,0.98}
PROCESSES=${PROCESSES:-8}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
launch eval.py --config="$CONFIG" --nnet_path="$NNET" --output_path="$OUTPUT" --exit_threshold="$THRESHOLDS" "$@"
python -m scripts.report "$OUTPUT"
