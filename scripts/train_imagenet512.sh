#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 512x512 with exits (500k steps of 1024). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/imagenet512_uvit_huge.py PRETRAINED=assets/uvit/imagenet512_uvit_huge.pth WORKDIR=… trains H/4.
# Needs: python -m scripts.extract_features imagenet --images DIR --resolution 512 --out assets/datasets/imagenet512_features
exec bash "$(dirname "$0")/launch.sh" train imagenet512 "$@"
