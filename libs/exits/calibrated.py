"""Thresholds on the uncertainty that were chosen for a budget, per bin of time and exit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from libs.exits.policy import ExitPolicy
from libs.exits.stored import read_calibration


@dataclass(frozen=True, kw_only=True)
class Calibrated(ExitPolicy):
    """Each image leaves at the first exit k where its mean u is below the stored max_u[bin of t, k].

    `path` is a file of scripts.calibrate. Exits that it never leaves at are not asked.
    """

    path: str = ""
    reads: ClassVar = frozenset({"u"})

    @cached_property
    def stored(self) -> dict:
        return read_calibration(self.path, "thresholds", "exit.calibrated.path")

    @cached_property
    def table(self) -> torch.Tensor:
        """(bins, E - 1), for every exit but the last."""
        return torch.tensor(self.stored["max_u"], dtype=torch.float32)

    def asked(self, points):
        known = tuple(self.stored["points"])
        if known != tuple(points):
            raise ValueError(f"{self.path} is for exits {known}; this model can be left at {tuple(points)}")
        useful = (self.table > 0).any(0).tolist()
        return tuple(k for k in super().asked(points) if useful[known.index(k)])

    def start(self, n_rows, depth, t):
        column = {k: i for i, k in enumerate(self.stored["points"])}
        bins = torch.bucketize(t, t.new_tensor(self.stored["edges"]), right=True)  # (B,)
        max_u = self.table[bins]  # (B, E - 1)
        if bool((bins == bins[0]).all()):
            return lambda look: look.u < float(max_u[0, column[look.k]])

        def decide(look):
            return look.u < max_u[:, column[look.k]].to(look.u.device)[look.rows]

        return decide
