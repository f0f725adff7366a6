#!/usr/bin/env bash
# Fine-tune the released U-ViT of ImageNet 256x256 with exits (300k steps of 1024). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/imagenet256_uvit_huge.py PRETRAINED=assets/uvit/imagenet256_uvit_huge.pth WORKDIR=… trains H/2; CONFIG=configs/imagenet256_adadiff_large.py is AdaDiff's recipe.
# Needs: python -m scripts.extract_features imagenet --images DIR --out assets/datasets/imagenet256_features
exec bash "$(dirname "$0")/launch.sh" train imagenet256 "$@"
