"""Multiply-accumulates actually spent, from the trace: what was run, what was asked, one head per row."""

import numpy as np

from libs.exits import Trace
from libs.models.backbone import Macs

CONVENTION = (
    "multiply-accumulates; attention products, heads and uncertainty estimators counted; norms and activations not"
)


def macs_per_image(trace: Trace, macs: Macs) -> np.ndarray:
    """(n,) MACs of a whole sampling, all calls and guidance branches together."""
    by_exit = np.array([macs.at(k, trace.asked) for k in range(trace.depth + 1)], dtype=np.float64)
    calls = enumerate(trace.used)
    return sum((trace.costs[call] if call in trace.costs else by_exit[used]).sum(axis=0) for call, used in calls)
