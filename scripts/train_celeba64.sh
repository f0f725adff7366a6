#!/usr/bin/env bash
# Fine-tune the released U-ViT of CelebA 64x64 with exits (AdaDiff's settings: 1024 images per step, lr 8e-4, 200000 steps).
# PRETRAINED= (empty) trains from scratch with the config's settings. More variables: scripts/launch.sh; flags are passed on.
exec bash "$(dirname "$0")/launch.sh" train celeba64 "$@"
