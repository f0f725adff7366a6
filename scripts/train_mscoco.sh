#!/usr/bin/env bash
# Fine-tune the released U-ViT of MS-COCO 256x256 with exits (1M steps of 256). PRETRAINED= (empty) trains from scratch.
# CONFIG=configs/mscoco_uvit_small_deep.py PRETRAINED=assets/uvit/mscoco_uvit_small_deep.pth WORKDIR=… trains S/2-Deep; CONFIG=configs/mscoco_adadiff_small.py is AdaDiff's recipe.
# Needs: python -m scripts.extract_features coco|empty … --out assets/datasets/coco256_features (README)
exec bash "$(dirname "$0")/launch.sh" train mscoco "$@"
