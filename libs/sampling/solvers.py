"""The solvers, each a function from a process and a number of steps to its table of coefficients, a `Plan`.

Notation: a node t has alpha, sigma and lam = log(alpha / sigma); a step leads from s to t, h = lam_t - lam_s > 0.
Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021a), SDE (Song et al. 2021b), DPM-Solver (Lu et al. 2022a) and
DPM-Solver++ (Lu et al. 2022b).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from libs.sampling.grids import named, times, times_to_zero
from libs.sampling.plans import Plan, Row, tabulate
from sde import Process

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
    t_end = check_times(process, steps, t_end, default=1e-3, grid=grid)
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
    check_times(process, steps)
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
    t_end = check_times(process, steps, t_end, default=1e-4, grid=grid)
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
    t_end = check_times(process, steps, t_end, default=1e-3, grid=grid)
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
    t_end = check_times(process, steps, t_end, default=1e-3, grid=grid)
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


# ---- what no solver can do -------------------------------------------------------------------------------------------


def check_times(
    process: Process, steps: int, t_end: float | None = None, default: float = 0.0, grid: str = ""
) -> float:
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
