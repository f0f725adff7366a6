#!/usr/bin/env bash
# FID-50k and measured seconds of ImageNet 64x64 at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception fid_stats_imagenet64
exec bash "$(dirname "$0")/launch.sh" eval imagenet64 "$@"
