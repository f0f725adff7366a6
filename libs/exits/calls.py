"""The network calls of one sampling, in order, with what earlier calls left behind for later ones.

The images of a sampling stay in their rows and go through the calls in lockstep, so memory is indexed by row. A row is
a guidance branch of an image: each has its own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from libs.exits.execute import run_outer, run_with_exits
from libs.exits.policy import ExitPolicy
from libs.exits.reuse import Cache, Residual, Reuse
from libs.models import EarlyExitModel
from libs.models.backbone import Carry

ToEps = Callable[[Tensor, Tensor, Tensor], Tensor]
# eps (B, C, H, W), layers run (B,), and MACs of a row by layers run (K + 1,), or None where the exit alone tells
Answer = tuple[Tensor, np.ndarray, np.ndarray | None]


class Calls:
    """Calls without memory. `to_eps(out, x, t)` turns raw outputs into eps; `n_calls`: how many there will be."""

    def __init__(self, model: EarlyExitModel, policy: ExitPolicy, to_eps: ToEps, n_calls: int | None = None):
        self.model, self.policy, self.to_eps, self.n_calls = model, policy, to_eps, n_calls
        self.number, self.n_rows = -1, None

    def __call__(self, x: Tensor, t: Tensor, time: Tensor, cond: Tensor | None) -> Answer:
        """The next call: x (B, C, H, W), t (B,) on the CPU, time (B,) in the network's unit."""
        if self.n_rows not in (None, len(x)):
            raise ValueError(f"a sampling started with {self.n_rows} rows and goes on with {len(x)}; start a new one")
        self.number, self.n_rows = self.number + 1, len(x)
        return self.call(self.policy.at_call(self.number), x, t, time, cond)

    def call(self, policy: ExitPolicy, x: Tensor, t: Tensor, time: Tensor, cond: Tensor | None) -> Answer:
        out, used = run_with_exits(self.model, policy, x, t, time, cond)
        return self.to_eps(out, x, t), used, self.costs(policy)

    def costs(self, policy: ExitPolicy, measured: tuple[int, ...] = ()) -> np.ndarray | None:
        """What a row costs in this call by its exit: `policy`'s questions, and one head per exit `measured` at K."""
        if policy is self.policy and not measured:
            return None
        macs = self.model.macs()
        asked = self.model.questions(policy.asked(self.model.points)) if "u" in policy.reads else ()
        costs = np.array([macs.at(k, asked) for k in range(self.model.depth + 1)], dtype=np.float64)
        costs[-1] += sum(macs.head[k] for k in measured)
        return costs


class ResidualCalls(Calls):
    """Early outputs corrected by eps_K - eps_k of the row's last full-depth call."""

    def __init__(self, *args):
        super().__init__(*args)
        self.points = self.policy.asked(self.model.points)  # the exits that rows may take
        self.slot = np.full(self.model.depth + 1, -1)
        self.slot[list(self.points)] = np.arange(len(self.points))
        self.residual: Tensor | None = None  # (E, B, C, H, W)
        self.known: np.ndarray | None = None  # (B,) rows that had a full-depth call

    def call(self, policy, x, t, time, cond):
        carries: dict[int, Carry] = {}

        def watch(k, carry):
            if k in self.points:
                carries[k] = carry if self.model.backbone.decodes else replace(carry, skips=())

        measure = self.read_again()
        out, used = run_with_exits(self.model, policy, x, t, time, cond, watch if measure else None)
        eps = self.to_eps(out, x, t)
        corrected = self.correct(eps, used)
        if measure:
            self.measure(eps, used, x, t, carries)
        return corrected, used, self.costs(policy, self.points if measure else ())

    def read_again(self) -> bool:
        """Whether the next call can read what this one would measure: not after the last, nor before a full call."""
        following = self.number + 1
        return following != self.n_calls and bool(self.policy.at_call(following).asked(self.model.points))

    def correct(self, eps: Tensor, used: np.ndarray) -> Tensor:
        """eps (B, C, H, W) with the residual added to the rows that left early and have one."""
        if self.known is None:
            return eps
        rows = np.flatnonzero(self.known & (used < self.model.depth))
        slots = self.slot[used[rows]]
        if not len(rows):
            return eps
        if len(rows) == len(used) and (slots == slots[0]).all():  # a static schedule gathers nothing
            return eps + self.residual[slots[0]]
        rows, slots = (torch.from_numpy(index).to(eps.device) for index in (rows, slots))
        return eps.index_add(0, rows, self.residual[slots, rows])

    def measure(self, eps: Tensor, used: np.ndarray, x: Tensor, t: Tensor, carries: dict[int, Carry]) -> None:
        """Keep eps_K - eps_k of the rows that ran full depth, for every exit k that may be taken later."""
        deep = used == self.model.depth
        if not deep.any():
            return
        if self.residual is None:
            self.residual = eps.new_zeros(len(self.points), *eps.shape)
            self.known = np.zeros(len(eps), bool)
        if deep.all():  # a refresh gathers nothing
            rows = index = slice(None)
        else:
            rows = torch.from_numpy(np.flatnonzero(deep))
            index = rows.to(eps.device)
            carries = {k: carry.keep(torch.searchsorted(carry.rows, index)) for k, carry in carries.items()}
        for slot, k in enumerate(self.points):
            early = self.to_eps(self.model.head(k, carries[k]), x[index], t[rows])  # (b, C, H, W)
            self.residual[slot, index] = eps[index] - early
        self.known |= deep


class ReuseCalls(Calls):
    """Calls that run nothing answer with the last computed eps."""

    def call(self, policy, x, t, time, cond):
        if self.number % policy.every:
            return self.eps, np.zeros(len(x), dtype=int), np.zeros(self.model.depth + 1)
        self.eps, used, costs = super().call(policy, x, t, time, cond)
        return self.eps, used, costs


class CacheCalls(Calls):
    """Calls that run only the outermost layers read the tokens which the deep ones gave last."""

    def call(self, policy, x, t, time, cond):
        depth, outer = self.model.depth, policy.layers
        if self.number % policy.every:
            out = run_outer(self.model, outer, self.deep, x, time, cond)
            macs, costs = self.model.macs(), np.zeros(depth + 1)
            costs[2 * outer] = macs.embed + sum(macs.layers[:outer] + macs.layers[-outer:]) + macs.head[depth]
            return self.to_eps(out, x, t), np.full(len(x), 2 * outer), costs

        def watch(k, carry):
            if k == depth - outer:
                self.deep = carry.h  # (B, L, D)

        out, used = run_with_exits(self.model, policy, x, t, time, cond, watch)
        return self.to_eps(out, x, t), used, None


KINDS: dict[type[ExitPolicy], type[Calls]] = {Residual: ResidualCalls, Reuse: ReuseCalls, Cache: CacheCalls}


def check_sizes(model: EarlyExitModel, policy: ExitPolicy) -> None:
    """Refuse policies that compare or join the features of layers, where these differ in size."""
    if model.backbone.decodes and (isinstance(policy, Cache) or "patches" in policy.reads):
        name = "cache" if isinstance(policy, Cache) else "similarity"
        raise ValueError(f"exit.name is {name!r}, which needs layers of one size; this U-Net's have several")


def start_calls(model: EarlyExitModel, policy: ExitPolicy, to_eps: ToEps, n_calls: int | None = None) -> Calls:
    """A new sampling's calls."""
    check_sizes(model, policy)
    return KINDS.get(type(policy), Calls)(model, policy, to_eps, n_calls)
