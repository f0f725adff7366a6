"""The small classifiers that ship with the code, one per data set; their penultimate activations measure its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """What `scripts/classifier.py` makes: for grey images of `size` x `size` pixels, with `widths` channels per
    convolution, the first one of `stride`."""

    file: Path
    size: int
    widths: tuple[int, ...]
    stride: int
    what: str

    def network(self) -> Classifier:
        return Classifier(self.widths, self.stride)


class Classifier(nn.Module):
    """A small CNN that tells ten classes apart; its 64 penultimate activations are features.

    Smooth activations: with ReLU some of the 64 could be zero for every image, and their covariance singular.
    """

    def __init__(self, widths: tuple[int, ...], stride: int):
        super().__init__()
        self.names = [f"conv{i + 1}" for i in range(len(widths))]
        for i, (name, before, after) in enumerate(zip(self.names, (1, *widths), widths, strict=False)):
            setattr(self, name, nn.Conv2d(before, after, 3, padding=1, stride=stride if i == 0 else 1))
        self.hidden = nn.Linear(widths[-1] * 4 * 4, 64)
        self.logits = nn.Linear(64, 10)

    def penultimate(self, x: Tensor) -> Tensor:
        """(n, 1, H, W) in [0, 1] -> (n, 64); every convolution but the first halves H and W, down to 4."""
        first, *others = (getattr(self, name) for name in self.names)
        h = F.gelu(first(x))
        for convolution in others:
            h = F.max_pool2d(F.gelu(convolution(h)), 2)
        return F.gelu(self.hidden(h.flatten(1)))  # (n, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.penultimate(x))  # (n, 10)


SHIPPED = {
    "digits_cnn": Shipped(HERE / "digits_cnn.safetensors", 8, (16, 32), 1, "grey 8x8 digits"),
    "fashion_cnn": Shipped(HERE / "fashion_cnn.safetensors", 32, (16, 32, 64), 2, "grey 32x32 clothes"),
}
