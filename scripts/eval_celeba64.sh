#!/usr/bin/env bash
# FID-50k and measured seconds of CelebA 64x64 at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception fid_stats_celeba64
exec bash "$(dirname "$0")/launch.sh" eval celeba64 "$@"
