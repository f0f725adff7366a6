"""What a network must offer so that it can be left at any depth.

A backbone is cut into `embed`, `layer(i)` and `head(k)`; its plain forward pass is a loop over them. Letters used in
shape comments: B rows asked, b rows still running, L tokens, N patch tokens, D width, K layers, C H W the space that
the network denoises. A U-Net's features change their size from layer to layer, and so do N and D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Carry:
    """What flows from layer to layer for the rows that are still running.

    A skip is stored with the rows that were alive when it was made. It is gathered only by the layer that reads it, so
    removing rows costs one gather of `h` and nothing for the skips that nobody reads any more.
    """

    h: Tensor  # (b, L, D); in a U-Net (b, D, H', W')
    time: Tensor  # (b,) the network's own time, float32
    rows: Tensor  # (b,) ascending indices into the caller's batch
    skips: tuple[tuple[Tensor, Tensor], ...] = ()  # of (rows when stored (n,), what was stored (n, ...))
    inputs: tuple[Tensor, Tensor | None] | None = None  # x (b, C, H, W) and cond (b, ...), for an exit before layer 0

    def keep(self, index: Tensor) -> Carry:
        """The carry of the rows at positions `index` (m,), ascending."""
        inputs = self.inputs and tuple(None if part is None else part[index] for part in self.inputs)
        return replace(self, h=self.h[index], time=self.time[index], rows=self.rows[index], inputs=inputs)

    def push(self) -> Carry:
        return replace(self, skips=(*self.skips, (self.rows, self.h)))

    def stored(self, i: int) -> Tensor:
        """Skip i, (b, ...) for the rows that are still here."""
        rows, skip = self.skips[i]
        return skip if len(rows) == len(self.rows) else skip[torch.searchsorted(rows, self.rows)]

    def pop(self) -> tuple[Tensor, Carry]:
        """The newest skip, and the carry without it."""
        return self.stored(-1), replace(self, skips=self.skips[:-1])


@dataclass(frozen=True)
class Tokens:
    """What `patches` gives after some layer: n tokens (b, n, width), each over `patch_dim` = p p C numbers of an image.

    `extras` counts the other tokens beside them: time, label, text.
    """

    n: int
    width: int
    patch_dim: int
    extras: int = 0


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image and one network call. Attention products count; norms and activations do not.

    `ask[k]` is what one question to the uncertainty estimator costs at exit k; `head[k]` turns layer k's features into
    an image. Exit k runs `embed + sum(layers[:k]) + head[k]`, plus `ask[j]` for every j at which it was asked.
    """

    embed: int
    layers: tuple[int, ...]  # (K,)
    head: tuple[int, ...]  # (K + 1,)
    ask: tuple[int, ...] = ()  # (K + 1,)
    sublayers: tuple[int, int] = (0, 0)  # of `layers`, what a layer's attention and its MLP cost, where they are apart

    def at(self, k: int, asked: tuple[int, ...] = ()) -> int:
        """MACs of a call that leaves at exit k after questions at the exits `asked` (those beyond k never happened)."""
        return self.embed + sum(self.layers[:k]) + self.head[k] + sum(self.ask[j] for j in asked if j <= k)


class Backbone(nn.Module):
    """Base of the networks: subclasses write the methods that raise here and set `depth`, `channels` and `blocks`."""

    depth: int  # K
    channels: int  # C
    blocks: Sequence[nn.Module]  # what it is made of, but for embeddings and the last maps to the image
    skip = False  # whether the last layers read what the first ones gave (long skips)
    sublayers = False  # whether `layer` gives its two residuals, attention's and the MLP's, to `run` (UViT.layer)
    needs_own = False  # whether no exit but the last works without a part of its own
    decodes = False  # whether a head is a decoder: different at every exit, and a reader of the skips

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        """x (B, C, H, W), time (B,) in the network's own unit, cond: labels (B,) or text (B, n, width) or None."""
        raise NotImplementedError

    def layer(self, i: int, carry: Carry) -> Carry:
        """Run layer i, 0 <= i < K."""
        raise NotImplementedError

    def head(self, k: int, carry: Carry, own: nn.Module | None = None) -> Tensor:
        """Prediction (b, C, H, W) after k layers, by the common head or the exit's `own` part (`new_head`)."""
        raise NotImplementedError

    def new_head(self, k: int) -> nn.Module:
        """Exit k's own part of the head, which starts as no change to the common head's output."""
        raise NotImplementedError

    def patches(self, carry: Carry) -> Tensor:
        """The patch tokens (b, N, D): what uncertainty estimators read."""
        raise NotImplementedError

    def all_tokens(self, carry: Carry) -> Tensor:
        """The patch tokens, with the others where there are any beside them (b, L, D)."""
        return self.patches(carry)

    def tokens(self, k: int) -> Tokens:
        """What the tokens after k layers look like."""
        raise NotImplementedError

    def macs(self, own: bool = False) -> Macs:
        """`own`: every exit but the last has its own part of the head."""
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """The full-depth prediction (B, C, H, W)."""
        carry = self.embed(x, time, cond)
        for i in range(self.depth):
            carry = self.layer(i, carry)
        return self.head(self.depth, carry)
