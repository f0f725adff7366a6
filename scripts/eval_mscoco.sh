#!/usr/bin/env bash
# FID and measured seconds of MS-COCO 256x256 under guidance, at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception autoencoder_kl fid_stats_mscoco256 (clip for CLIP scores, clip_336 for CMMD)
exec bash "$(dirname "$0")/launch.sh" eval mscoco "$@"
