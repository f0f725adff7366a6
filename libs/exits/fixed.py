"""Policies that look at nothing: full depth, one layer for all, and a static schedule over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from libs.exits.policy import ExitPolicy


@dataclass(frozen=True, kw_only=True)
class Full(ExitPolicy):
    """Never leave early."""

    def asked(self, points):
        return ()

    def start(self, n_rows, depth, t):
        return lambda look: False


@dataclass(frozen=True, kw_only=True)
class Fixed(ExitPolicy):
    """Every image, at every step, leaves after `layer` layers."""

    layer: int = 1

    def asked(self, points):
        if self.layer not in points:
            raise ValueError(f"exit.fixed.layer is {self.layer}; this model can be left at {points}")
        return (self.layer,) if self.layer != points[-1] else ()

    def start(self, n_rows, depth, t):
        return lambda look: look.k == self.layer


@dataclass(frozen=True, kw_only=True)
class Schedule(ExitPolicy):
    """A static depth for every time: the share of layers to run in equal bins of t, from t = 0 (data) to 1 (noise).

    The default is the only released schedule of ASE (Moon et al., ICML 2024: 28, 28, 24, 24, 20, 20, 16, 16, 12, 12 of
    28 blocks). A layer count that is no exit of the model is rounded up to the next exit. Depths are known before the
    call, so nothing is estimated and nothing waits for the device.
    """

    shares: tuple[float, ...] = (1.0, 1.0, 24 / 28, 24 / 28, 20 / 28, 20 / 28, 16 / 28, 16 / 28, 12 / 28, 12 / 28)

    def __post_init__(self):
        if not self.shares or any(not 0 < share <= 1 for share in self.shares):
            raise ValueError(f"exit.schedule.shares is {self.shares}; it must be a non-empty tuple of shares in (0, 1]")

    def start(self, n_rows, depth, t):
        bins = (t * len(self.shares)).long().clamp(max=len(self.shares) - 1)
        wanted = [math.ceil(share * depth - 1e-9) for share in self.shares]
        due = [wanted[b] for b in bins.tolist()]
        if len(set(due)) == 1:
            return lambda look: look.k >= due[0]
        due = t.new_tensor(due)

        def decide(look):
            return look.k >= due.to(look.rows.device)[look.rows]

        return decide
