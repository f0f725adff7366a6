"""Controls that spend what another policy spent without looking at the images: what is left is the policy's merit."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from libs import rng
from libs.exits.policy import ExitPolicy
from libs.exits.static import between, leave_at
from libs.exits.trace import Trace

MATCHES = ("call", "all")


@dataclass(frozen=True, kw_only=True)
class Matched(ExitPolicy):
    """Base of the controls. `path` is the trace.npz that an evaluation kept of the policy to be matched."""

    path: str = ""

    @cached_property
    def counts(self) -> tuple[list[float], np.ndarray]:
        """Ascending times (calls,) and how often each depth was used there (calls, K + 1), guidance branches pooled."""
        setting = f"exit.matched_{'static' if type(self) is MatchedStatic else 'random'}.path"
        if not Path(self.path).is_file():
            raise ValueError(f"{setting} is {self.path!r}; it must name the trace.npz of an evaluated point")
        trace = Trace.load(self.path)
        calls = [i for i in range(len(trace.t)) if i not in trace.costs or trace.costs[i].any()]  # a forecast is none
        order = sorted(calls, key=lambda i: trace.t[i])
        rows = [np.bincount(call.ravel(), minlength=trace.depth + 1) for call in trace.used[order]]
        return trace.t[order].tolist(), np.stack(rows)

    def check(self, model):
        super().check(model)
        depth = self.counts[1].shape[1] - 1
        if depth != model.depth:
            raise ValueError(f"{self.path} is the trace of a model with {depth} layers; this one has {model.depth}")

    def at_times(self, t: torch.Tensor) -> np.ndarray:
        """(B, K + 1) counts of the nearest recorded call."""
        times, counts = self.counts
        return counts[np.searchsorted(between(times), t.numpy(), side="right")]


@dataclass(frozen=True, kw_only=True)
class MatchedStatic(Matched):
    """A schedule: at every call the depth that the matched policy used most often there (the smaller one of equals)."""

    def start(self, n_rows, depth, t):
        return leave_at(torch.from_numpy(self.at_times(t).argmax(1)))


@dataclass(frozen=True, kw_only=True)
class MatchedRandom(Matched):
    """Depths drawn from those of the matched policy, independently for every image and call.

    `match` "call" keeps the policy's dependence on time (what is lost is the choice among images), "all" keeps only its
    overall histogram. A draw depends on (`seed`, noise seed, image id, t); both guidance branches share it.
    """

    match: str = "call"
    seed: int = 0

    def __post_init__(self):
        if self.match not in MATCHES:
            raise ValueError(f"exit.matched_random.match is {self.match!r}; it must be one of {', '.join(MATCHES)}")

    def bind(self, seed, ids):
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return MatchedRandomOf(**own, noise_seed=int(seed), ids=tuple(int(i) for i in ids))

    def start(self, n_rows, depth, t):
        raise ValueError("matched_random draws a depth per image: bind it to the images of the batch first")


@dataclass(frozen=True, kw_only=True)
class MatchedRandomOf(MatchedRandom):
    """`MatchedRandom` for the images `ids` of a noise seed."""

    noise_seed: int
    ids: tuple[int, ...]

    def start(self, n_rows, depth, t):
        ids = self.ids * (n_rows // len(self.ids))  # guidance: [cond; null]
        keys = zip(ids, t.tolist(), strict=True)
        streams = (rng.stream("matched", self.seed, self.noise_seed, i, time.hex()) for i, time in keys)
        u = np.array([float(torch.rand((), generator=g, dtype=torch.float64)) for g in streams])  # (B,)
        counts = self.at_times(t) if self.match == "call" else self.counts[1].sum(0)[None]
        shares = counts.cumsum(1) / counts.sum(1, keepdims=True)  # (B, K + 1)
        return leave_at(torch.from_numpy((shares <= u[:, None]).sum(1)))
