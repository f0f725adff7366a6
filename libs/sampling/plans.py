"""Samplers as tables: each of them is linear in x, in what the network said, and in fresh noise.

A `Plan` has one row per step. With eps predicted at the row's (x, t), a row does

    h  = px x + pm eps                                    what to remember: eps itself, or x0 = (x - sigma eps) / alpha
    x' = ca anchor + sum_j cm[j] history[j] + cz z        history = the last three h, newest last; z ~ N(0, I)
    anchor' = x' if commit else anchor                    the x at the start of a multi-stage step

Rows are gathered by each sample's own row number, so that samples at different steps can share a batch.

A row calls the network (NFE = number of such rows) or forecasts what it would say, from v = alpha eps - sigma x0 of the
last four calls; v is bounded at both ends, whatever kind of output the network has:

    v    = (eps - sigma x) / alpha                        at a call; remembered
    eps  = sigma x + alpha sum_j ahead[j] outputs[j]      at a forecast; outputs = the last four v, newest last

Notation: a node t has alpha, sigma and lam = log(alpha / sigma); a step leads from s to t, h = lam_t - lam_s > 0.
Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021a), SDE (Song et al. 2021b), DPM-Solver (Lu et al. 2022a) and
DPM-Solver++ (Lu et al. 2022b).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from libs.rng import SeededNoise
from libs.sampling.grids import named, times, times_to_zero
from sde import Process

HISTORY = 3  # the longest memory: DPM-Solver-3 combines the outputs at s and at its two interior points
OUTPUTS = 4  # the longest memory of forecasts: a cubic


@dataclass(frozen=True)
class Plan:
    """A sampler on a process: float64 tensors on the CPU, (rows,) unless noted.

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
        outputs = (nothing,) * OUTPUTS if plan is not None and plan.forecast is not None else ()
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


# ---- forecasts -----------------------------------------------------------------------------------------------------


def forecasting(plan: Plan, process: Process, computed: Sequence[bool], order: int = 1) -> Plan:
    """`plan` with the rows that are not `computed` (rows,) forecast from the calls before them.

    v is extrapolated by the polynomial of degree `order` in the number of the row through the last order + 1 calls,
    fewer at the start: degree 0 is reuse (TaylorSeer, Liu et al. 2025, does so for features). Time and lam in place of
    the number were within 1 dB either way. The first row must be computed. A forecast costs no call.

    >>> from sde import VPLinear
    >>> process = VPLinear()
    >>> plan = forecasting(ddim(process, steps=6), process, regular(6, every=2, tail=1))
    >>> plan.rows, plan.nfe, plan.computed.int().tolist()
    (6, 4, [1, 0, 1, 0, 1, 1])
    """
    computed = torch.tensor(computed, dtype=torch.bool)
    if computed.shape != plan.t.shape or not computed[0]:
        raise ValueError(f"forecasts: {len(computed)} rows for {plan.rows} steps; every step, the first one computed")
    if order not in range(OUTPUTS):
        raise ValueError(f"sample.forecast.order is {order}; it must be 0, 1, 2 or 3")
    s, ahead = torch.arange(plan.rows).double(), torch.zeros(plan.rows, OUTPUTS, dtype=torch.float64)
    for i in (~computed).nonzero().flatten().tolist():
        past = s[:i][computed[:i]][-order - 1 :]  # newest last
        for j in range(len(past)):
            others = torch.cat([past[:j], past[j + 1 :]])
            ahead[i, OUTPUTS - len(past) + j] = ((s[i] - others) / (past[j] - others)).prod()  # Lagrange
    forecast = torch.cat([torch.stack([process.alpha(plan.t), process.sigma(plan.t)], 1), ahead], 1)
    return replace(plan, computed=computed, forecast=forecast)


def regular(rows: int, every: int, tail: int) -> list[bool]:
    """Which rows to compute: every `every`-th from the first on, and the last `tail`."""
    for name, value, least in (("every", every, 1), ("tail", tail, 0)):
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"sample.forecast.{name} is {value!r}; it must be a whole number of at least {least}")
    return [i % every == 0 or i >= rows - tail for i in range(rows)]


# ---- Euler-Maruyama ------------------------------------------------------------------------------------------------


def euler_maruyama_sde(process: Process, *, steps: int, t_end: float | None = None, grid: str = "") -> Plan:
    """The reverse SDE dx = [-beta x / 2 - g2 score] dt + sqrt(g2) dw, score = -eps / sigma (SDE, eq. 6).

    `steps` nodes from 1 to `t_end` (default 1e-3; published: uniform in time), then 0; the last step, t_end to 0, adds
    no noise.
    """
    return euler(process, steps, t_end, grid, sde=True)


def euler_maruyama_ode(process: Process, *, steps: int, t_end: float | None = None, grid: str = "") -> Plan:
    """The probability flow ODE dx/dt = -beta x / 2 - g2 score / 2 (SDE, eq. 13) on the nodes of the SDE's solver."""
    return euler(process, steps, t_end, grid, sde=False)


def euler(process: Process, steps: int, t_end: float | None, grid: str, sde: bool) -> Plan:
    """x' = (1 - beta dt/2) x + (g2 dt / sigma) eps + sqrt(-g2 dt) z; the ODE has half the second term and no z."""
    t_end = check(process, steps, t_end, default=1e-3, grid=grid)
    if grid and named(grid)[0] is None:
        nodes = times_to_zero(process, steps, grid)
    else:
        nodes = torch.cat([times(process, steps - 1, t_end, grid or "time_uniform"), torch.zeros(1).double()])
    callable_from(process, nodes, steps, grid)
    t, dt = nodes[:-1], nodes.diff()  # dt < 0
    g2, rows = process.g2(t), []
    for i, (ca, cm) in enumerate(zip(1 - process.beta(t) * dt / 2, g2 / process.sigma(t) * dt, strict=True)):
        noisy = sde and i < steps - 1
        rows.append(Row(t[i], ca, (0, 0, cm if sde else cm / 2), cz=torch.sqrt(-g2[i] * dt[i]) if noisy else 0))
    return tabulate(rows)


# ---- DDPM and DDIM -------------------------------------------------------------------------------------------------


def ddim(process: Process, *, steps: int, eta: float = 0.0, grid: str = "") -> Plan:
    """DDIM, eq. 12 and 16: x' = alpha_t x0 + sqrt(sigma_t^2 - v^2) eps + v z, v = eta times DDPM's posterior deviation.

    Published: nodes uniform in time from 1 to 0; the network is called at 1, ..., 1/steps, and the last step returns
    its x0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1], 0 for no noise and 1 for DDPM's")
    check(process, steps)
    nodes = times_to_zero(process, steps, grid or "time_uniform")
    callable_from(process, nodes, steps, grid)
    log_alpha, sigma, lam = process.log_alpha(nodes), process.sigma(nodes), process.lam(nodes)
    rows = []
    for i in range(steps):
        ratio = log_alpha[i] - log_alpha[i + 1]  # < 0: log of alpha_s / alpha_t
        v = eta * sigma[i + 1] * torch.sqrt(-torch.expm1(2 * (lam[i] - lam[i + 1])))
        cm = torch.sqrt((sigma[i + 1] ** 2 - v**2).clamp_min(0)) - sigma[i] * torch.exp(-ratio)
        rows.append(Row(nodes[i], torch.exp(-ratio), (0, 0, cm), cz=v))
    return tabulate(rows)


def ddpm(process: Process, *, steps: int, variance: str = "posterior", grid: str = "") -> Plan:
    """Ancestral sampling (DDPM, eq. 6-7): DDIM with eta = 1.

    `variance` of the noise: "posterior", or "beta", the larger variance of the forward step (1 - (alpha_s / alpha_t)^2
    where the variance is preserved), of which the last step takes none.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance is {variance!r}; it must be posterior or beta")
    plan = ddim(process, steps=steps, eta=1.0, grid=grid)
    if variance == "beta":
        sigma = process.sigma(plan.t)
        plan.cz[:-1] *= sigma[:-1] / sigma[1:]
    return plan


# ---- DPM-Solver and DPM-Solver++ -----------------------------------------------------------------------------------


def dpm_solver(process: Process, *, steps: int, order: int = 3, t_end: float | None = None, grid: str = "") -> Plan:
    """DPM-Solver "fast" (section 3.4): single steps of order <= 3 in noise prediction.

    Published: steps uniform in lam from 1 to `t_end` (default 1e-4), interior points at r = 1/2 or 1/3, 2/3 of a step.
    On any other grid the interior points are nodes, as in dpm_solver_pp. The remainder of `steps` is spent on lower
    orders at the end, so that exactly `steps` evaluations are made.
    """
    t_end = check(process, steps, t_end, default=1e-4, grid=grid)
    orders = fast_orders(steps, order)
    if grid:
        return singlestep(process, spans_of(times(process, steps, t_end, grid), orders), data=False)
    ends = times(process, len(orders), t_end, "logsnr")
    lam, spans = process.lam(ends), []
    for i, k in enumerate(orders):
        interior = process.t_of_lam(torch.lerp(lam[i], lam[i + 1], torch.arange(1, k, dtype=torch.float64) / k))
        spans.append(torch.cat([ends[i : i + 1], interior, ends[i + 1 : i + 2]]))  # (k + 1,)
    return singlestep(process, spans, data=False)


def dpm_solver_pp(process: Process, *, steps: int, order: int = 3, t_end: float | None = None, grid: str = "") -> Plan:
    """DPM-Solver++ "fast": single steps of order <= 3 in data prediction (DPM-Solver++).

    `steps` + 1 nodes from 1 to `t_end` (default 1e-3), published: uniform in time. A step of order k spans k intervals,
    and its interior points are the nodes in between, so its r1, r2 vary with the schedule.
    """
    t_end = check(process, steps, t_end, default=1e-3, grid=grid)
    nodes = times(process, steps, t_end, grid or "time_uniform")
    return singlestep(process, spans_of(nodes, fast_orders(steps, order)), data=True)


def spans_of(nodes: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """The nodes (steps + 1,) of every step: one of order k has k + 1 and begins where the last one ended."""
    ends = [0, *accumulate(orders)]
    return [nodes[start : end + 1] for start, end in pairwise(ends)]


def fast_orders(steps: int, order: int) -> list[int]:
    """The order of each step of a "fast" solver; they sum to `steps` evaluations (DPM-Solver, section 3.4)."""
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; it must be 1, 2 or 3")
    if order == 3 and steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]  # as published: it never ends on order 3
    return [order] * (steps // order) + [steps % order] * (steps % order > 0)


def singlestep(process: Process, spans: Sequence[Tensor], data: bool) -> Plan:
    """DPM-Solver-1, -2, -3 or their data-prediction twins, on steps given by their nodes.

    A span (k + 1,) holds s, the k - 1 interior points, and t. Both kinds share one form: with m the remembered output,
    (lead, keep) = (sigma, alpha) and w = h for noise, (alpha, sigma) and w = -h for data prediction,

        order 1: keep_t/keep_s x - lead_t (e^w - 1) m_s                          =: first(t)
        order 2: first(t) - lead_t (e^w - 1) (m_1 - m_s) / (2 r1)
        order 3: x_2 = first(2) - lead_2 ((e^{r2 w} - 1) / (r2 w) - 1) (m_1 - m_s) r2 / r1
                 x_t = first(t) - lead_t ((e^w - 1) / w - 1) (m_2 - m_s) / r2
    """
    rows = []
    for span in spans:
        order = len(span) - 1
        alpha, sigma, lam = process.alpha(span), process.sigma(span), process.lam(span)
        lead, keep = (alpha, sigma) if data else (sigma, alpha)
        h = lam - lam[0]  # (k + 1,): r_j h
        w = -h if data else h
        for j in range(1, order + 1):  # called at point j - 1, this row leads to point j
            first = -lead[j] * torch.expm1(w[j])
            if j == 1:
                slope = 0.0
            elif order == 2:
                slope = first * h[2] / h[1] / 2
            else:
                slope = -lead[j] * (torch.expm1(w[j]) / w[j] - 1) * h[j] / h[j - 1]
            cm = [0.0, 0.0, 0.0]
            cm[-j] += float(first - slope)  # m_s, j calls ago
            cm[-1] += float(slope)  # the latest output
            x0 = (alpha[j - 1], sigma[j - 1]) if data else None
            rows.append(Row(span[j - 1], keep[j] / keep[0], cm, x0=x0, commit=j == order))
    return tabulate(rows)


def dpm_solver_pp_2m(
    process: Process,
    *,
    steps: int,
    skip: str = "time_uniform",
    lower_order_final: bool = True,
    t_end: float | None = None,
    grid: str = "",
) -> Plan:
    """DPM-Solver++(2M) (DPM-Solver++, algorithm 2): second order with one evaluation per step, in data prediction.

    Nodes run from 1 to `t_end` (default 1e-3); `skip` is the older name of `grid` and knows time_uniform and logsnr.
    `lower_order_final` makes the last step first order: near the data lam moves fast, and with up to 50 steps uniform
    in time this halves the error.
    """
    return multistep(process, steps, grid_of(skip, grid), lower_order_final, t_end, sde=False)


def sde_dpm_solver_pp_2m(
    process: Process,
    *,
    steps: int,
    skip: str = "time_uniform",
    lower_order_final: bool = True,
    t_end: float | None = None,
    grid: str = "",
) -> Plan:
    """SDE-DPM-Solver++(2M), the stochastic form of dpm_solver_pp_2m (DPM-Solver++), with the same options."""
    return multistep(process, steps, grid_of(skip, grid), lower_order_final, t_end, sde=True)


def grid_of(skip: str, grid: str) -> str:
    if skip not in ("time_uniform", "logsnr"):
        raise ValueError(f"skip is {skip!r}; it must be time_uniform or logsnr; sample.grid knows more")
    if grid and skip != "time_uniform":
        raise ValueError(
            f"skip is {skip!r} and sample.grid is {grid!r}; a sampler has one grid, so set sample.grid alone"
        )
    return grid or skip


def multistep(process: Process, steps: int, grid: str, lower_order_final: bool, t_end: float | None, sde: bool) -> Plan:
    """x_t = sigma_t/sigma_s x - alpha_t (e^{-h} - 1) D, D = m_s + (m_s - m_before) h / (2 h_before).

    The stochastic form has e^{-h} sigma_t/sigma_s, e^{-2h} - 1, and adds sigma_t sqrt(1 - e^{-2h}) z.
    """
    t_end = check(process, steps, t_end, default=1e-3, grid=grid)
    nodes = times(process, steps, t_end, grid)
    alpha, sigma, lam = process.alpha(nodes), process.sigma(nodes), process.lam(nodes)
    h, rows = lam.diff(), []  # (steps,)
    for i in range(steps):
        first = -alpha[i + 1] * torch.expm1(-2 * h[i] if sde else -h[i])
        multi = i > 0 and not (lower_order_final and i == steps - 1)
        slope = first * h[i] / h[i - 1] / 2 if multi else 0.0
        ca = sigma[i + 1] / sigma[i] * (torch.exp(-h[i]) if sde else 1)
        cz = sigma[i + 1] * torch.sqrt(-torch.expm1(-2 * h[i])) if sde else 0
        rows.append(Row(nodes[i], ca, (0, -slope, first + slope), cz=cz, x0=(alpha[i], sigma[i])))
    return tabulate(rows)


SAMPLERS = {
    "euler_maruyama_sde": euler_maruyama_sde,
    "euler_maruyama_ode": euler_maruyama_ode,
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp": dpm_solver_pp,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "sde_dpm_solver_pp_2m": sde_dpm_solver_pp_2m,
}


# ---- shared --------------------------------------------------------------------------------------------------------


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


def check(process: Process, steps: int, t_end: float | None = None, default: float = 0.0, grid: str = "") -> float:
    """Refuse what no solver can do; returns where to stop: t_end, or the default as far as the process reaches."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1 network evaluation")
    if t_end is None:
        return max(default, process.t_min)
    if not process.t_min * (1 - 1e-9) <= t_end < 1:
        raise ValueError(f"t_end is {t_end}; for this process it must lie in [{process.t_min:g}, 1)")
    if grid and named(grid)[0] is None:
        raise ValueError(f"t_end is {t_end} and sample.grid is {grid!r}, whose times end where the sampler stops")
    return t_end


def callable_from(process: Process, nodes: Tensor, steps: int, grid: str) -> None:
    """Refuse nodes (steps + 1,) whose last call lies below the times that the process knows."""
    last, least = float(nodes[-2]), process.t_min
    if last < least * (1 - 1e-9):
        fit = "" if grid else f", so at most {round(1 / least)} steps fit"
        raise ValueError(
            f"steps is {steps}; this process ends at t = {least:g}{fit}; the last call would be at {last:g}"
        )
