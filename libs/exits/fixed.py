"""Policies that look at nothing: full depth, and one layer for all."""

from __future__ import annotations

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
