#!/usr/bin/env bash
# FID-50k and measured seconds of CIFAR-10 at full depth and with exits; further flags are passed on.
# Needs: python -m scripts.download inception fid_stats_cifar10
exec bash "$(dirname "$0")/launch.sh" eval cifar10 "$@"
