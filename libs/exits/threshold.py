"""Leave as soon as the estimated uncertainty is low enough (paper section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from libs.exits.policy import ExitPolicy, check_certainty


@dataclass(frozen=True, kw_only=True)
class Threshold(ExitPolicy):
    """Each image leaves at the first exit where its mean certainty 1 - u exceeds `certainty`."""

    certainty: float = 0.95
    reads: ClassVar = frozenset({"u"})

    def __post_init__(self):
        check_certainty(self.certainty)

    def start(self, n_rows, depth, t):
        max_u = check_certainty(self.certainty)
        return lambda look: look.u < max_u


@dataclass(frozen=True, kw_only=True)
class Patience(ExitPolicy):
    """Leave at the `times`-th exit whose certainty exceeds the threshold; `consecutive`: a miss resets the count."""

    certainty: float = 0.95
    times: int = 2
    consecutive: bool = False
    reads: ClassVar = frozenset({"u"})

    def __post_init__(self):
        check_certainty(self.certainty)
        if self.times < 1:
            raise ValueError(f"exit.patience.times is {self.times}; it must be at least 1")

    def start(self, n_rows, depth, t):
        max_u = check_certainty(self.certainty)
        hits = None

        def decide(look):
            nonlocal hits
            if hits is None:
                hits = torch.zeros(n_rows, dtype=torch.long, device=look.u.device)
            hit = look.u < max_u
            count = hits[look.rows] + hit
            hits[look.rows] = count * hit if self.consecutive else count
            return hit & (count >= self.times)

        return decide
