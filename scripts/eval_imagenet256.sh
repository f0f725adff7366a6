#!/usr/bin/env bash
# FID and measured seconds of ImageNet 256x256 under guidance, at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception autoencoder_kl fid_stats_imagenet256 (autoencoder_kl_ema for the Huge models)
set -euo pipefail
CONFIG=${CONFIG:-configs/imagenet256_uvit_large.py}
NNET=${NNET:-workdir/imagenet256_uvit_large/last.ckpt}
OUTPUT=${OUTPUT:-$NNET-eval}
THRESHOLDS=${THRESHOLDS:-0.90,0.92,0.95}
PROCESSES=${PROCESSES:-8}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
launch eval_ldm.py --config="$CONFIG" --nnet_path="$NNET" --output_path="$OUTPUT" --exit_threshold="$THRESHOLDS" "$@"
python -m scripts.report "$OUTPUT"
