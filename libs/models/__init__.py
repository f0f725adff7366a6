"""Networks only: no exits are decided and nothing is sampled here."""

from __future__ import annotations

from libs.models.dit import DIT_SIZES, DiT
from libs.models.early_exit import AllExits, EarlyExitModel
from libs.models.uem import ESTIMATORS, Missing
from libs.models.unet import DDPM, UNet
from libs.models.uvit import SIZES, UViT

BACKBONES = {"uvit": UViT, "unet": UNet, "dit": DiT}

__all__ = [
    "BACKBONES",
    "DDPM",
    "DIT_SIZES",
    "ESTIMATORS",
    "SIZES",
    "AllExits",
    "DiT",
    "EarlyExitModel",
    "Missing",
    "UNet",
    "UViT",
]
