"""What a generation yields, and how it becomes files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from libs.exits import Trace


@dataclass
class Images:
    pixels: Tensor  # (n, C, H, W) uint8 on the CPU, C in {1, 3}
    ids: np.ndarray  # (n,) image i depends on (seed, i) only
    labels: np.ndarray | None  # (n,)
    trace: Trace


def save_grid(path: str | Path, pixels: Tensor, columns: int = 8, scale: int = 0) -> None:
    """Tile (n, C, H, W) uint8 into one PNG, enlarged `scale` times (0: small images become about 48 pixels wide)."""
    scale = scale or max(1, 48 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels, nrow=columns, padding=max(1, scale // 2), pad_value=255)  # (3, H', W')
    save_png(path, grid)


def save_png(path: str | Path, pixels: Tensor) -> None:
    """One image (C, H, W) uint8, written atomically."""
    array = pixels.permute(1, 2, 0).numpy()
    part = f"{path}.part"
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(part, format="PNG")
    os.replace(part, path)
