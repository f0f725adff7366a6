#!/usr/bin/env bash
# FID and measured seconds of MS-COCO 256x256 under guidance, at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception autoencoder_kl fid_stats_mscoco256 (clip for CLIP scores, clip_336 for CMMD)
set -euo pipefail
CONFIG=${CONFIG:-configs/mscoco_uvit_small.py}
NNET=${NNET:-workdir/mscoco_uvit_small/last.ckpt}
OUTPUT=${OUTPUT:-$NNET-eval}
THRESHOLDS=${THRESHOLDS:-0.85,0.87,0.92}
PROCESSES=${PROCESSES:-4}
PRECISION=${PRECISION:-fp16}

source "$(dirname "$0")/launch.sh"
launch eval_t2i_discrete.py --config="$CONFIG" --nnet_path="$NNET" --output_path="$OUTPUT" --exit_threshold="$THRESHOLDS" "$@"
python -m scripts.report "$OUTPUT"
