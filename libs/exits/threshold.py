"""Leave as soon as the estimated uncertainty is low enough (paper section 3.3).

By one threshold, with patience, by a calibrated table of thresholds, or by the released batch-mean rule.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from libs.exits.policy import ExitPolicy, max_u_of
from libs.exits.static import read_calibration, same_exits


@dataclass(frozen=True, kw_only=True)
class Threshold(ExitPolicy):
    """Each image leaves at the first exit where its mean certainty 1 - u exceeds `certainty`.

    >>> from libs.exits import Look
    >>> decide = Threshold(certainty=0.98).start(n_rows=3, depth=7, t=torch.ones(3))
    >>> decide(Look(k=1, rows=torch.arange(3), u=torch.tensor([0.01, 0.05, 0.03])))
    tensor([ True, False, False])
    >>> decide(Look(k=2, rows=torch.tensor([1, 2]), u=torch.tensor([0.04, 0.01])))
    tensor([False,  True])
    """

    certainty: float = 0.95
    reads: ClassVar = frozenset({"u"})
    timeless: ClassVar = True

    def __post_init__(self):
        max_u_of(self.certainty)

    def start(self, n_rows, depth, t):
        max_u = max_u_of(self.certainty)
        return lambda look: look.u < max_u


@dataclass(frozen=True, kw_only=True)
class Patience(ExitPolicy):
    """Leave at the `times`-th exit whose certainty exceeds the threshold; `consecutive`: a miss resets the count.

    >>> from libs.exits import Look
    >>> decide = Patience(certainty=0.9, times=2, consecutive=True).start(n_rows=2, depth=7, t=torch.ones(2))
    >>> u = torch.tensor([[0.05, 0.05], [0.05, 0.20], [0.05, 0.05]])  # of rows 0 and 1 at exits 1, 2, 3
    >>> [decide(Look(k=k, rows=torch.arange(2), u=u[k - 1])).tolist() for k in (1, 2, 3)]
    [[False, False], [True, False], [True, False]]
    """

    certainty: float = 0.95
    times: int = 2
    consecutive: bool = False
    reads: ClassVar = frozenset({"u"})
    timeless: ClassVar = True

    def __post_init__(self):
        max_u_of(self.certainty)
        if self.times < 1:
            raise ValueError(f"exit.patience.times is {self.times}; it must be at least 1")

    def start(self, n_rows, depth, t):
        max_u = max_u_of(self.certainty)
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

    def check(self, model):
        super().check(model)
        same_exits(self.path, self.stored, model.points)

    def asked(self, points):
        known, useful = self.stored["points"], (self.table > 0).any(0).tolist()
        return tuple(k for k in super().asked(points) if useful[known.index(k)])

    def start(self, n_rows, depth, t):
        column = {k: i for i, k in enumerate(self.stored["points"])}
        bins = torch.bucketize(t, t.new_tensor(self.stored["edges"]), right=True)  # (B,)
        max_u = self.table[bins]  # (B, E - 1)
        if bool((bins == bins[0]).all()):
            return lambda look: look.u < float(max_u[0, column[look.k]])

        def decide(look):
            return look.u < max_u[:, column[look.k]].to(look.u.device, non_blocking=True)[look.rows]

        return decide


@dataclass(frozen=True, kw_only=True)
class ReleasedBatchMean(ExitPolicy):
    """The whole batch leaves when its mean certainty exceeds `certainty`: images decide for their batch mates.

    `second_in_first_half`: the released pixel and class model leaves the first half of the network only at the second
    exit that crosses the threshold (the crossings need not be consecutive); the text model leaves at the first.
    `per_image`: the same rule for every image on its own, which gives in any batch what the released code gives in
    batches of one, with which its published points were measured.

    >>> from libs.exits import Look
    >>> policy = ReleasedBatchMean(certainty=0.9, second_in_first_half=False)
    >>> look = Look(k=1, rows=torch.arange(2), u=torch.tensor([0.01, 0.15]))
    >>> policy.start(n_rows=2, depth=7, t=torch.ones(2))(look)  # a mean of 0.08: both leave
    True
    >>> policy = ReleasedBatchMean(certainty=0.9, second_in_first_half=False, per_image=True)
    >>> policy.start(n_rows=2, depth=7, t=torch.ones(2))(look)
    tensor([ True, False])
    """

    certainty: float = 0.95
    second_in_first_half: bool = True
    per_image: bool = False
    name: ClassVar = "released_batch_mean"
    reads: ClassVar = frozenset({"u"})
    timeless: ClassVar = True

    def __post_init__(self):
        max_u_of(self.certainty)

    def start(self, n_rows, depth, t):
        max_u = max_u_of(self.certainty)
        crossed = None

        def decide(look):
            nonlocal crossed
            if crossed is None:
                crossed = torch.zeros(n_rows, dtype=torch.long, device=look.u.device)
            hit = (look.u if self.per_image else look.u.mean().expand_as(look.u)) < max_u
            crossed[look.rows] += hit
            if self.second_in_first_half and look.k <= depth // 2:
                hit = hit & (crossed[look.rows] >= 2)
            return hit if self.per_image else bool(hit[0])

        return decide
