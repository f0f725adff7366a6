"""The network calls of one sampling, in order, with what earlier calls left behind for later ones.

The images of a sampling stay in their rows and go through the calls in lockstep, so memory is indexed by row. A row is
a guidance branch of an image: each has its own memory.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from torch import Tensor

from libs.exits.execute import run_with_exits
from libs.exits.policy import ExitPolicy
from libs.models import EarlyExitModel
from libs.models.backbone import Macs

ToEps = Callable[[Tensor, Tensor, Tensor], Tensor]
# eps (B, C, H, W), layers run (B,), and the MACs of every row (B,), or None where the exit alone tells
Answer = tuple[Tensor, np.ndarray, np.ndarray | None]


class Calls:
    """Calls without memory. `to_eps(out, x, t)` turns raw outputs into eps; `n_calls`: how many there will be."""

    def __init__(self, model: EarlyExitModel, policy: ExitPolicy, to_eps: ToEps, n_calls: int | None = None):
        self.model, self.policy, self.to_eps, self.n_calls = model, policy, to_eps, n_calls
        self.number, self.n_rows = -1, None

    @cached_property
    def macs(self) -> Macs:
        return self.model.macs()

    def __call__(self, x: Tensor, t: Tensor, time: Tensor, cond: Tensor | None) -> Answer:
        """The next call: x (B, C, H, W), t (B,) on the CPU, time (B,) in the network's unit."""
        if self.n_rows not in (None, len(x)):
            raise ValueError(f"a sampling started with {self.n_rows} rows and goes on with {len(x)}; start a new one")
        self.number, self.n_rows = self.number + 1, len(x)
        return self.call(self.policy.at_call(self.number), x, t, time, cond)

    def call(self, policy: ExitPolicy, x: Tensor, t: Tensor, time: Tensor, cond: Tensor | None) -> Answer:
        out, used = run_with_exits(self.model, policy, x, t, time, cond)
        return self.to_eps(out, x, t), used, self.costs(policy, used)

    def costs(self, policy: ExitPolicy, used: np.ndarray, measured: tuple[int, ...] = ()) -> np.ndarray | None:
        """What the rows (B,) cost by their exits: `policy`'s questions, and one head per exit `measured` at K."""
        if policy is self.policy and not measured:
            return None
        asked = self.model.questions(policy.questions(self.model.points))
        costs = np.array([self.macs.at(k, asked) for k in range(self.model.depth + 1)], dtype=np.float64)
        costs[-1] += sum(self.macs.head[k] for k in measured)
        return costs[used]


def start_calls(model: EarlyExitModel, policy: ExitPolicy, to_eps: ToEps, n_calls: int | None = None) -> Calls:
    """A new sampling's calls. ValueError where `policy` cannot work on `model`."""
    policy.check(model)
    return (policy.kind or Calls)(model, policy, to_eps, n_calls)
