"""Where images left the network, from the trace of a generation.

Read from a trace: `t` (calls,), `used` (calls, branches, n) layers run by each image in each network call, `depth` K.
A row that left at k ran k layers: 0 is the embedding alone, K the whole network.
"""

from __future__ import annotations

import numpy as np
import torch

from libs.run import Run
from libs.sampling.images import Images


class ExitStatistics:
    """Depth used per call, per image and overall.

    Keys: `mean_depth` (layers, over calls, branches and images), `depth_std` (standard deviation over images of an
    image's own mean depth: zero when the exit depends on the time alone) and `exit_share_<k>` for every k that occurs
    or is K. All counts are integers: results do not depend on batches or processes at all.
    """

    def __init__(self):
        self.t: np.ndarray | None = None  # (calls,)
        self.counts: np.ndarray | None = None  # (calls, K + 1) rows that left at k, branches added up
        self.branches = 0
        self.images = np.zeros(3)  # number, sum and sum of squares of the layers an image ran in all its calls

    def update(self, batch: Images) -> None:
        trace = batch.trace
        used, t, depth = np.asarray(trace.used).astype(np.int64), np.asarray(trace.t), int(trace.depth)
        if used.ndim != 3 or len(used) != len(t):
            raise ValueError(f"A trace needs used (calls, branches, n) and t (calls,); got {used.shape}, {t.shape}.")
        if used.size and not 0 <= used.min() <= used.max() <= depth:
            raise ValueError(f"Layers used must lie in 0..{depth}; the trace has {used.min()}..{used.max()}.")
        calls, branches, n = used.shape
        if self.counts is None:
            self.t, self.branches, self.counts = t, branches, np.zeros((calls, depth + 1))
        if (branches, depth + 1) != (self.branches, self.counts.shape[1]) or not np.array_equal(t, self.t):
            raise ValueError("Traces of different samplers, depths or guidance cannot be added up.")
        for call in range(calls):
            self.counts[call] += np.bincount(used[call].ravel(), minlength=depth + 1)
        per_image = used.sum((0, 1))  # (n,)
        self.images += [n, per_image.sum(), (per_image**2).sum()]

    def histogram(self, run: Run) -> np.ndarray:
        """(calls, K + 1): how many rows of all processes left at k in each call; each call sums to branches x images.

        Every process must have seen at least one batch.
        """
        if self.counts is None:
            raise ValueError("Exit statistics need at least one batch of images; there are none.")
        return run.all_sum(torch.tensor(self.counts)).numpy()

    def depth_per_call(self, run: Run) -> np.ndarray:
        """(calls,) mean number of layers run in each call; the times are `self.t`."""
        return mean_depth(self.histogram(run))

    def compute(self, run: Run) -> dict[str, float]:
        counts = self.histogram(run).sum(0)  # (K + 1,)
        n, total, squares = run.all_sum(torch.tensor(self.images)).tolist()
        per_image = len(self.t) * self.branches  # rows an image has
        spread = np.sqrt(n * squares - total**2) / n / per_image  # integers up to the root: no cancellation
        shares = {f"exit_share_{k}": float(c / counts.sum()) for k, c in enumerate(counts) if c or k == len(counts) - 1}
        return {"mean_depth": float(mean_depth(counts)), "depth_std": float(spread), **shares}


def mean_depth(counts: np.ndarray) -> np.ndarray:
    """Mean k of histograms over k: (..., K + 1) -> (...)."""
    return counts @ np.arange(counts.shape[-1]) / counts.sum(-1)
