#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 64x64 with exits (AdaDiff's settings: 1024 images per step, lr 3e-4, 300000 steps).
# PRETRAINED= (empty) trains from scratch with the config's settings. More variables: scripts/launch.sh; flags are passed on.
exec bash "$(dirname "$0")/launch.sh" train imagenet64 "$@"
