"""What a generation yields, and how it becomes files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from libs.exits import Trace
from libs.files import atomic_write


@dataclass
class Images:
    """What `Sampler` makes: images with their classes and the layers that each call ran.

    >>> from libs import Sampler
    >>> images = Sampler.load("demo/last.ckpt", device="cpu")(6, labels=[3], steps=4, exit_threshold=1)
    >>> images.pixels.shape, images.pixels.dtype, images.labels
    (torch.Size([6, 1, 8, 8]), torch.uint8, array([3, 3, 3, 3, 3, 3]))
    >>> images.depth.shape  # (calls, n)
    (4, 6)
    >>> images.save("threes.png")
    """

    pixels: Tensor  # (n, C, H, W) uint8 on the CPU, C in {1, 3}
    ids: np.ndarray  # (n,) image i depends on (seed, i) only
    labels: np.ndarray | None  # (n,) classes; None where the network knows none, or texts
    trace: Trace

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def depth(self) -> np.ndarray:
        """(calls, n): layers that each image used at each network call; under guidance, the mean of its two rows."""
        used = self.trace.used  # (calls, branches, n)
        return used[:, 0] if used.shape[1] == 1 else used.mean(1)

    @property
    def mean_depth(self) -> np.ndarray:
        """(n,): layers per network call, of which a forecast is none."""
        return self.depth[self.trace.computed].mean(0)

    def save(self, path: str | Path, columns: int = 8) -> None:
        """One PNG with all images, `columns` in a row; small ones enlarged to about 48 pixels."""
        save_grid(path, self.pixels, columns)

    def pil(self) -> list[Image.Image]:
        """One PIL image each, grey ones in mode L."""
        pixels = self.pixels.permute(0, 2, 3, 1).numpy()  # (n, H, W, C)
        return [Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pixels]

    @classmethod
    def concatenate(cls, parts: Sequence[Images]) -> Images:
        """Images of one plan and policy, as one set."""
        labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
        ids, pixels = np.concatenate([part.ids for part in parts]), torch.cat([part.pixels for part in parts])
        return cls(pixels, ids, labels, Trace.concatenate(part.trace for part in parts))


def labels_of(cond: Tensor | None) -> np.ndarray | None:
    """Conditions (n,) are classes; texts (n, tokens, width) are none."""
    return None if cond is None or cond.dim() > 1 else cond.numpy()


def save_grid(path: str | Path, pixels: Tensor, columns: int = 8) -> None:
    """Tile (n, C, H, W) uint8 into one PNG; small images become about 48 pixels wide."""
    from torchvision.utils import make_grid  # seconds: paid by those who use it

    scale = max(1, 48 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels, nrow=columns, padding=max(1, scale // 2), pad_value=255)  # (3, H', W')
    save_png(path, grid)


def save_png(path: str | Path, pixels: Tensor, text: Mapping[str, str] = MappingProxyType({})) -> None:
    """One image (C, H, W) uint8, written atomically; `text` goes into the file."""
    array, info = pixels.permute(1, 2, 0).numpy(), PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with atomic_write(path) as file:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, format="PNG", pnginfo=info)
