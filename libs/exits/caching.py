"""Methods that look back at earlier network calls of the same sampling: what they are set to, and their work.

`Refresh` and `Residual` wrap a policy that leaves early; `Reuse` and `Cache` are the training-free competitors, which
never ask anything. All of them are policies, so whatever takes a policy takes them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from libs.exits.calls import Calls
from libs.exits.execute import run_outer, run_with_exits
from libs.exits.planned import Planned
from libs.exits.policy import ExitPolicy, GuidancePairs, Wrapped, one_size
from libs.exits.static import Fixed, Full, Levels, Power, Schedule, layers_at
from libs.models.backbone import Carry


@dataclass(frozen=True, kw_only=True)
class Around(Wrapped):
    """Base of the policies that decide as `inner` does, in other calls or with another answer."""

    def __post_init__(self):
        if self.at or isinstance(self.inner, Full | Around):
            raise ValueError(
                f"sample.residual and sample.refresh go around a policy that leaves early, in this order, each once; "
                f"{type(self).__name__} was put around {type(self.inner).__name__}"
            )

    def bind(self, seed, ids):
        return replace(self, inner=self.inner.bind(seed, ids))

    def at_call(self, number):
        return self.inner.at_call(number)

    def paired(self, pair):
        return replace(self, inner=self.inner.paired(pair))


@dataclass(frozen=True, kw_only=True)
class Refresh(Around):
    """Every `every`-th network call of a sampling, the first included, runs full depth; `inner` decides the others.

    Which calls these are is known on the host: they ask nothing and wait for nothing.
    """

    every: int

    def __post_init__(self):
        super().__post_init__()
        at_least_one("sample.refresh", self.every)

    def at_call(self, number):
        return super().at_call(number) if number % self.every else Full()


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
        return corrected, used, self.costs(policy, used, self.points if measure else ())

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
        rows, slots = (torch.from_numpy(index).to(eps.device, non_blocking=True) for index in (rows, slots))
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
            index = rows.to(eps.device, non_blocking=True)
            carries = {k: carry.keep(torch.searchsorted(carry.rows, index)) for k, carry in carries.items()}
        for slot, k in enumerate(self.points):
            early = self.to_eps(self.model.head(k, carries[k]), x[index], t[rows])  # (b, C, H, W)
            self.residual[slot, index] = eps[index] - early
        self.known |= deep


@dataclass(frozen=True, kw_only=True)
class Residual(Around):
    """An image that leaves at k gets eps_k + (eps_K - eps_k of its last full-depth call), per guidance branch.

    Plain reuse, however long ago that call was. An image without a full-depth call so far is not corrected. Measuring
    costs one more head per exit that `inner` may take, at full-depth calls only.
    """

    kind: ClassVar = ResidualCalls

    def __post_init__(self):
        if not isinstance(self.inner, Refresh):
            super().__post_init__()

    def check(self, model):
        super().check(model)
        times = torch.linspace(0, 1, 1001, dtype=torch.float64)
        inner = self.inner.inner if isinstance(self.inner, GuidancePairs) else self.inner
        static = isinstance(inner, Fixed | Schedule | Power | Levels)
        never = static and layers_at(inner, model.points, times).max() < model.depth
        if never or isinstance(inner, Planned) and not inner.reaches(model.points):
            raise ValueError(
                "sample.residual is on, but the policy never runs full depth, so there is nothing to correct with; set "
                "sample.refresh"
            )


class ReuseCalls(Calls):
    """Calls that run nothing answer with the last computed eps."""

    def call(self, policy, x, t, time, cond):
        if self.number % policy.every:
            return self.eps, np.zeros(len(x), dtype=int), np.zeros(len(x))
        self.eps, used, costs = super().call(policy, x, t, time, cond)
        return self.eps, used, costs


@dataclass(frozen=True, kw_only=True)
class Reuse(Full):
    """Full depth at every `every`-th network call; the calls between answer with the last eps and run nothing."""

    every: int = 2
    name: ClassVar = "reuse"
    kind: ClassVar = ReuseCalls

    def __post_init__(self):
        super().__post_init__()
        at_least_one("exit.reuse.every", self.every)


class CacheCalls(Calls):
    """Calls that run only the outermost layers read the tokens which the deep ones gave last."""

    def call(self, policy, x, t, time, cond):
        depth, outer = self.model.depth, policy.layers
        if self.number % policy.every:
            out = run_outer(self.model, outer, self.deep, x, time, cond)
            layers = self.macs.layers[:outer] + self.macs.layers[-outer:]
            cost = self.macs.embed + sum(layers) + self.macs.head[depth]
            return self.to_eps(out, x, t), np.full(len(x), 2 * outer), np.full(len(x), float(cost))

        def watch(k, carry):
            if k == depth - outer:
                self.deep = carry.h  # (B, L, D)

        out, used = run_with_exits(self.model, policy, x, t, time, cond, watch)
        return self.to_eps(out, x, t), used, None


@dataclass(frozen=True, kw_only=True)
class Cache(Full):
    """Full depth at every `every`-th network call; the calls between take its deep features from there.

    They run the first `layers` layers and the last `layers`, which read the long skips of the first and, in place of
    the layers in between, the tokens that these gave last (the idea of DeepCache, Ma et al., CVPR 2024, on a U-ViT).
    """

    every: int = 2
    layers: int = 1
    name: ClassVar = "cache"
    kind: ClassVar = CacheCalls

    def __post_init__(self):
        super().__post_init__()
        at_least_one("exit.cache.every", self.every)

    def check(self, model):
        one_size(self.name, model)
        if not model.backbone.skip:
            raise ValueError("exit.name is 'cache', which joins old features to new ones by long skips: here are none")
        if not 1 <= self.layers <= model.depth // 2:
            raise ValueError(
                f"exit.cache.layers is {self.layers}; each half of this network has {model.depth // 2} layers"
            )


def at_least_one(setting: str, value: int) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{setting} is {value!r}; it must be a whole number of network calls, at least 1")


def looking_back(policy: ExitPolicy, *, residual: bool = False, refresh: int = 0) -> ExitPolicy:
    """`policy` with a full-depth call every `refresh` calls (0: no forced ones) and with the residual correction.

    >>> from libs.exits.threshold import Threshold
    >>> policy = looking_back(Threshold(certainty=0.98), residual=True, refresh=4)
    >>> [type(policy.at_call(number)).__name__ for number in range(5)]
    ['Full', 'Threshold', 'Threshold', 'Threshold', 'Full']
    """
    if refresh:
        policy = Refresh(inner=policy, every=refresh)
    return Residual(inner=policy) if residual else policy
