"""The decisions that the released AdaDiff numbers were made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from libs.exits.policy import ExitPolicy, check_certainty


@dataclass(frozen=True, kw_only=True)
class ReleasedBatchMean(ExitPolicy):
    """The whole batch leaves when its mean certainty exceeds `certainty`: images decide for their batch mates.

    `second_in_first_half`: the released pixel and class model leaves the first half of the network only at the second
    exit that crosses the threshold (the crossings need not be consecutive); the text model leaves at the first.
    `per_image`: the same rule for every image on its own, which gives in any batch what the released code gives in
    batches of one, with which its published points were measured.
    """

    certainty: float = 0.95
    second_in_first_half: bool = True
    per_image: bool = False
    reads: ClassVar = frozenset({"u"})

    def __post_init__(self):
        check_certainty(self.certainty)

    def start(self, n_rows, depth, t):
        max_u = check_certainty(self.certainty)
        crossed = torch.zeros(n_rows, dtype=torch.long)

        def decide(look):
            nonlocal crossed
            crossed = crossed.to(look.u.device)
            hit = (look.u if self.per_image else look.u.mean().expand_as(look.u)) < max_u
            crossed[look.rows] += hit
            if self.second_in_first_half and look.k <= depth // 2:
                hit = hit & (crossed[look.rows] >= 2)
            return hit if self.per_image else bool(hit[0])

        return decide
