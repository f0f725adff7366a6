"""The decisions that the released AdaDiff numbers were made with. They depend on the batch: use batch size 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from libs.exits.policy import ExitPolicy, check_certainty


@dataclass(frozen=True, kw_only=True)
class ReleasedBatchMean(ExitPolicy):
    """The whole batch leaves when its mean certainty exceeds `certainty`.

    `second_in_first_half`: the released pixel and class model leaves the first half of the network only at the second
    exit that crosses the threshold (the crossings need not be consecutive); the text model leaves at the first.
    """

    certainty: float = 0.95
    second_in_first_half: bool = True
    reads: ClassVar = frozenset({"u"})
    per_image: ClassVar = False

    def __post_init__(self):
        check_certainty(self.certainty)

    def start(self, n_rows, depth, t):
        max_u = check_certainty(self.certainty)
        crossed = 0

        def decide(look):
            nonlocal crossed
            hit = bool(look.u.mean() < max_u)
            crossed += hit
            return hit and (crossed >= 2 or look.k > depth // 2 or not self.second_in_first_half)

        return decide
