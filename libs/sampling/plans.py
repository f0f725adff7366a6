"""Samplers as tables, and how to run one: each of them is linear in x, in what the network said, and in fresh noise.

A `Plan` has one row per step. With eps predicted at the row's (x, t), a row does

    h  = px x + pm eps                                    what to remember: eps itself, or x0 = (x - sigma eps) / alpha
    x' = ca anchor + sum_j cm[j] history[j] + cz z        history = the last three h, newest last; z ~ N(0, I)
    anchor' = x' if commit else anchor                    the x at the start of a multi-stage step

Rows are gathered by each sample's own row number, so that samples at different steps can share a batch.

A row calls the network (NFE = number of such rows) or forecasts what it would say, from v = alpha eps - sigma x0 of the
last four calls; v is bounded at both ends, whatever kind of output the network has:

    v    = (eps - sigma x) / alpha                        at a call; remembered
    eps  = sigma x + alpha sum_j ahead[j] outputs[j]      at a forecast; outputs = the last four v, newest last

The solvers that fill such tables: libs/sampling/solvers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from libs.rng import SeededNoise
from sde import Process

HISTORY = 3  # the longest memory: DPM-Solver-3 combines the outputs at s and at its two interior points
MOST_OUTPUTS = 4  # the longest memory of forecasts: a cubic


@dataclass(frozen=True)
class Plan:
    """A sampler on a process: float64 tensors on the CPU, (rows,) unless noted.

    >>> from libs.sampling.solvers import SAMPLERS
    >>> from sde import VPLinear
    >>> plan = SAMPLERS["dpm_solver_pp_2m"](VPLinear(), steps=4, grid="power:2")
    >>> plan.nfe, plan.stochastic, [round(t, 3) for t in plan.t.tolist()]
    (4, False, [1.0, 0.563, 0.251, 0.063])
    """

    t: Tensor  # where the network is evaluated
    px: Tensor
    pm: Tensor
    ca: Tensor
    cm: Tensor  # (rows, 3), newest last
    cz: Tensor
    commit: Tensor  # bool
    computed: Tensor  # bool: whether the row calls the network
    forecast: Tensor | None = None  # (rows, 6) alpha, sigma and ahead, newest last; None where every row calls

    @property
    def rows(self) -> int:
        """Steps per sample."""
        return len(self.t)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return int(self.computed.sum())

    @cached_property
    def stochastic(self) -> bool:
        """Whether fresh noise enters after the initial draw."""
        return bool((self.cz != 0).any())

    @cached_property
    def table(self) -> Tensor:
        """All coefficients, (rows, 8), or (rows, 15) with forecasts: gathered and moved in one go."""
        columns = [torch.stack([self.px, self.pm, self.ca, self.cz, self.commit.double()], 1), self.cm]
        if self.forecast is not None:
            columns += [self.computed.double()[:, None], self.forecast]
        return torch.cat(columns, 1)

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def coefficients(self, row: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """The columns of `table` at `row` (B,), each (B, 1, 1, 1), or (1, 1, 1, 1) where samples share their row.

        In the dtype and on the device of `like` (B, C, H, W), where the table is copied once: a call copies no more
        than row numbers, and the host does not wait for them.
        """
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self.table.to(like, non_blocking=True)
        table, first = self._tables[key], int(row[0])
        shared = bool((row == first).all())
        rows = table[first : first + 1] if shared else table[row.to(like.device, non_blocking=True)]
        return rows.view(*rows.shape, *(1,) * (like.dim() - 1)).unbind(1)


@dataclass(frozen=True)
class State:
    """Samples on their way, each at its own row of the plan."""

    x: Tensor  # (B, C, H, W), where the network is evaluated next
    anchor: Tensor  # (B, C, H, W)
    history: tuple[Tensor, ...]  # 3 x (B, C, H, W), newest last
    row: Tensor  # (B,) int64 on the CPU
    outputs: tuple[Tensor, ...] = ()  # v of the last 4 calls, newest last; kept by plans that forecast

    @classmethod
    def start(cls, x: Tensor, plan: Plan | None = None) -> State:
        """Initial noise x (B, C, H, W) at row 0 of `plan`, which may be left out where nothing is forecast."""
        nothing = torch.zeros_like(x)
        outputs = (nothing,) * MOST_OUTPUTS if plan is not None and plan.forecast is not None else ()
        return cls(x, x, (nothing,) * HISTORY, torch.zeros(len(x), dtype=torch.long), outputs)

    def done(self, plan: Plan) -> Tensor:
        """(B,) bool: samples that have been through every row."""
        return self.row >= plan.rows

    def keep(self, index: Tensor) -> State:
        """The samples at the positions `index` (b,), which are on the CPU."""
        there = index.to(self.x.device, non_blocking=True)
        history, outputs = (tuple(h[there] for h in memory) for memory in (self.history, self.outputs))
        return State(self.x[there], self.anchor[there], history, self.row[index], outputs)


def advance(plan: Plan, state: State, eps: Tensor, z: Tensor | None = None) -> State:
    """One row further for every sample: eps (B, C, H, W) predicted at (state.x, plan.t[state.row]), noise z alike.

    Samples at a forecast row ignore their eps, which must be finite.
    """
    if plan.stochastic and z is None:
        raise ValueError("This sampler adds noise at its steps; give it the noise of the images.")
    x, eps, outputs = state.x, eps.to(state.x.dtype), state.outputs
    px, pm, ca, cz, commit, *rest = plan.coefficients(state.row, x)
    if plan.forecast is not None:
        computed, alpha, sigma, *ahead = rest[HISTORY:]
        new = (*outputs[1:], (eps - sigma * x) / alpha)
        eps = torch.where(computed.bool(), eps, sigma * x + alpha * combine(ahead, outputs))
        outputs = tuple(torch.where(computed.bool(), v, old) for v, old in zip(new, outputs, strict=True))
    history = (*state.history[1:], px * x + pm * eps)
    x = ca * state.anchor + combine(rest[:HISTORY], history)
    if plan.stochastic:
        x = x + cz * z.to(x, non_blocking=True)
    return State(x, torch.where(commit.bool(), x, state.anchor), history, state.row + 1, outputs)


def combine(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


def sample(
    plan: Plan, x: Tensor, eps_fn: Callable[[Tensor, Tensor], Tensor], noise: SeededNoise | None = None
) -> Tensor:
    """Run every row on the initial noise x (B, C, H, W); returns the samples, (B, C, H, W).

    `eps_fn(x (B, C, H, W), t (B,) float64 on the CPU)` predicts the noise; forecast rows do not call it. A stochastic
    plan takes one draw of `noise` per row, whether the row uses it or not, so that an image's k-th draw always belongs
    to row k.

    >>> from libs.sampling.solvers import ddim
    >>> from sde import VPLinear
    >>> process, x0 = VPLinear(), torch.full((2, 1, 4, 4), 0.3)
    >>> def eps_fn(x, t):  # knows the one image there is
    ...     return (x - process.alpha(t[0]) * x0) / process.sigma(t[0])
    >>> plan = ddim(process, steps=3)
    >>> torch.allclose(sample(plan, torch.randn(2, 1, 4, 4), eps_fn), x0, atol=1e-3)
    True
    """
    if plan.stochastic and noise is None:
        raise ValueError("This sampler adds noise at its steps; give it the noise of the images.")
    state = State.start(x, plan)
    for computed in plan.computed.tolist():
        eps = eps_fn(state.x, plan.t[state.row]) if computed else torch.zeros_like(state.x)
        state = advance(plan, state, eps, noise.draw() if plan.stochastic else None)
    return state.x


# ---- making tables ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row on its way into a plan; x0 = (alpha, sigma) at t if the row remembers x0 instead of eps."""

    t: float
    ca: float
    cm: Sequence[float]
    cz: float = 0.0
    x0: tuple[float, float] | None = None
    commit: bool = True


def tabulate(rows: Sequence[Row]) -> Plan:
    """The rows as columns: px x + pm eps is (x - sigma eps) / alpha where a row remembers x0, and eps elsewhere."""

    def column(values) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    return Plan(
        t=column(r.t for r in rows),
        px=column(1 / r.x0[0] if r.x0 else 0 for r in rows),
        pm=column(-r.x0[1] / r.x0[0] if r.x0 else 1 for r in rows),
        ca=column(r.ca for r in rows),
        cm=torch.stack([column(r.cm) for r in rows]),
        cz=column(r.cz for r in rows),
        commit=torch.tensor([r.commit for r in rows]),
        computed=torch.ones(len(rows), dtype=torch.bool),
    )


# ---- forecasts -----------------------------------------------------------------------------------------------------


def forecasting(plan: Plan, process: Process, computed: Sequence[bool], order: int = 1) -> Plan:
    """`plan` with the rows that are not `computed` (rows,) forecast from the calls before them.

    v is extrapolated by the polynomial of degree `order` in the number of the row through the last order + 1 calls,
    fewer at the start: degree 0 is reuse (TaylorSeer, Liu et al. 2025, does so for features). Time and lam in place of
    the number were within 1 dB either way. The first row must be computed. A forecast costs no call.

    >>> from libs.sampling.solvers import ddim
    >>> from sde import VPLinear
    >>> process = VPLinear()
    >>> plan = forecasting(ddim(process, steps=6), process, regular(6, every=2, tail=1))
    >>> plan.rows, plan.nfe, plan.computed.int().tolist()
    (6, 4, [1, 0, 1, 0, 1, 1])
    """
    computed = torch.tensor(computed, dtype=torch.bool)
    if computed.shape != plan.t.shape or not computed[0]:
        raise ValueError(f"forecasts: {len(computed)} rows for {plan.rows} steps; every step, the first one computed")
    if order not in range(MOST_OUTPUTS):
        raise ValueError(f"sample.forecast.order is {order}; it must be 0, 1, 2 or 3")
    s, ahead = torch.arange(plan.rows).double(), torch.zeros(plan.rows, MOST_OUTPUTS, dtype=torch.float64)
    for i in (~computed).nonzero().flatten().tolist():
        past = s[:i][computed[:i]][-order - 1 :]  # newest last
        for j in range(len(past)):
            others = torch.cat([past[:j], past[j + 1 :]])
            ahead[i, MOST_OUTPUTS - len(past) + j] = ((s[i] - others) / (past[j] - others)).prod()  # Lagrange
    forecast = torch.cat([torch.stack([process.alpha(plan.t), process.sigma(plan.t)], 1), ahead], 1)
    return replace(plan, computed=computed, forecast=forecast)


def regular(rows: int, every: int, tail: int) -> list[bool]:
    """Which rows to compute: every `every`-th from the first on, and the last `tail`."""
    for name, value, least in (("every", every, 1), ("tail", tail, 0)):
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"sample.forecast.{name} is {value!r}; it must be a whole number of at least {least}")
    return [i % every == 0 or i >= rows - tail for i in range(rows)]
