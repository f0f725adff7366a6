#!/usr/bin/env bash
# Fine-tune the released U-ViT of CIFAR-10 with exits (AdaDiff's settings: 512 images per step, lr 4e-4, 200000 steps).
# PRETRAINED= (empty) trains from scratch with the config's settings. More variables: scripts/launch.sh; flags are passed on.
exec bash "$(dirname "$0")/launch.sh" train cifar10 "$@"
