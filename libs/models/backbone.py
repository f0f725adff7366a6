"""What a network must offer so that it can be left at any depth.

A backbone is cut into `embed`, `layer(i)` and `head(k)`; its plain forward pass is a loop over them. Letters used in
shape comments: B rows asked, b rows still running, L tokens, N patch tokens, D width, K layers, C H W the space that
the network denoises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Carry:
    """What flows from layer to layer for the rows that are still running.

    A skip is stored with the rows that were alive when it was made. It is gathered only by the layer that reads it, so
    removing rows costs one gather of `h` and nothing for the skips that nobody reads any more.
    """

    h: Tensor  # (b, L, D)
    time: Tensor  # (b,) the network's own time, float32
    rows: Tensor  # (b,) ascending indices into the caller's batch
    skips: tuple[tuple[Tensor, Tensor], ...] = ()  # of (rows when stored (n,), tokens (n, L, D))

    def keep(self, index: Tensor) -> Carry:
        """The carry of the rows at positions `index` (m,), ascending."""
        return replace(self, h=self.h[index], time=self.time[index], rows=self.rows[index])

    def push(self) -> Carry:
        return replace(self, skips=(*self.skips, (self.rows, self.h)))

    def pop(self) -> tuple[Tensor, Carry]:
        """The newest skip, (b, L, D) for the rows that are still here, and the carry without it."""
        stored, skip = self.skips[-1]
        if len(stored) != len(self.rows):
            skip = skip[torch.searchsorted(stored, self.rows)]
        return skip, replace(self, skips=self.skips[:-1])


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image and one network call. Attention products count; norms and activations do not.

    `ask[k]` is what one question to the uncertainty estimator costs at exit k; `head[k]` turns layer k's tokens into an
    image. Exit k runs `embed + sum(layers[:k]) + head[k]`, plus `ask[j]` for every j at which the estimator was asked.
    """

    embed: int
    layers: tuple[int, ...]  # (K,)
    head: tuple[int, ...]  # (K + 1,)
    ask: tuple[int, ...] = ()  # (K + 1,)

    def at(self, k: int, asked: tuple[int, ...] = ()) -> int:
        """MACs of a call that leaves at exit k after questions at the exits `asked` (those beyond k never happened)."""
        return self.embed + sum(self.layers[:k]) + self.head[k] + sum(self.ask[j] for j in asked if j <= k)


class Backbone(nn.Module):
    """Base of the networks: subclasses write `embed`, `layer`, `head`, `patches`, `macs` and set `depth`."""

    depth: int  # K

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        """x (B, C, H, W), time (B,) in the network's own unit, cond: labels (B,) or text (B, n, width) or None."""
        raise NotImplementedError

    def layer(self, i: int, carry: Carry) -> Carry:
        """Run layer i, 0 <= i < K."""
        raise NotImplementedError

    def head(self, k: int, carry: Carry) -> Tensor:
        """Prediction (b, C, H, W) from the tokens after k layers."""
        raise NotImplementedError

    def patches(self, carry: Carry) -> Tensor:
        """The patch tokens (b, N, D): what heads and uncertainty estimators read."""
        raise NotImplementedError

    def macs(self) -> Macs:
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """The full-depth prediction (B, C, H, W)."""
        carry = self.embed(x, time, cond)
        for i in range(self.depth):
            carry = self.layer(i, carry)
        return self.head(self.depth, carry)
