"""Uncertainty estimators (UEM): how far a layer's prediction is from the truth, read off its tokens.

All estimators have one shape: called with (k, patches (b, N, D), time (b,)) they return the
uncertainty in [0, 1], float32, larger = worse: a map (b, N, p p C) in token layout, or one number per row (b,).
They read detached tokens, so fitting them never moves the backbone (paper section 3.2; released code does the same).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libs.models.uvit import time_embedding

OUTPUTS = ("map", "scalar")


class Linear(nn.Module):
    """u_k = sigmoid(W_k h_k + b_k), one linear map per exit: the released AdaDiff form.

    `norm` puts a LayerNorm in front: token norms grow by orders of magnitude with depth, and without it the sigmoid
    saturates at 0 and stops learning. `output` "map" estimates every pixel and channel; "scalar" estimates the image's
    mean from the mean patch token, which costs one matrix-vector product.
    """

    def __init__(self, width: int, patch_dim: int, points: tuple[int, ...], *, norm: bool = True, output: str = "map"):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"uem output is {output!r}; it must be one of {', '.join(OUTPUTS)}")
        self.scalar = output == "scalar"
        out = 1 if self.scalar else patch_dim
        self.norms = nn.ModuleDict({str(k): nn.LayerNorm(width) for k in points} if norm else {})
        self.maps = nn.ModuleDict({str(k): nn.Linear(width, out) for k in points})
        for linear in self.maps.values():  # start undecided: u = 1/2 up to the small weights
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def logits(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        h = patches.detach().float()  # (b, N, D)
        if self.scalar:
            h = h.mean(dim=1)  # (b, D)
        if str(k) in self.norms:
            h = self.norms[str(k)](h)
        return self.maps[str(k)](h)

    def forward(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D), time (b,) -> (b, N, p p C), or (b,) for a scalar estimator."""
        with torch.autocast(patches.device.type, enabled=False):
            u = self.logits(k, patches, time).sigmoid()
        return u[:, 0] if self.scalar else u

    def macs(self, n_patches: int) -> int:
        """MACs of one question."""
        weight = next(iter(self.maps.values())).weight.numel()
        return weight if self.scalar else n_patches * weight


class Time(Linear):
    """u_k = sigmoid(W_k [h_k, e(t)] + b_k) with e the sinusoidal time embedding of each row (paper Eq. 8)."""

    def __init__(self, width: int, patch_dim: int, points: tuple[int, ...], *, norm: bool = True, output: str = "map"):
        super().__init__(width, patch_dim, points, norm=norm, output=output)
        out = 1 if self.scalar else patch_dim
        self.width = width
        self.time_maps = nn.ModuleDict({str(k): nn.Linear(width, out, bias=False) for k in points})
        for linear in self.time_maps.values():
            nn.init.normal_(linear.weight, std=0.02)

    def logits(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        shift = self.time_maps[str(k)](time_embedding(time, self.width))  # (b, out): every row has its own time
        return super().logits(k, patches, time) + (shift if self.scalar else shift[:, None])

    def macs(self, n_patches: int) -> int:
        return super().macs(n_patches) + next(iter(self.time_maps.values())).weight.numel()


ESTIMATORS = {"linear": Linear, "time": Time}
