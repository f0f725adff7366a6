#!/usr/bin/env bash
# FID and measured seconds of ImageNet 512x512 under guidance, at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception autoencoder_kl fid_stats_imagenet512 (autoencoder_kl_ema for the Huge models)
exec bash "$(dirname "$0")/launch.sh" eval imagenet512 "$@"
