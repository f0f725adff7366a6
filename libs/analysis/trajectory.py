"""What steps between any two times and depths do, learned from dense runs along one fine trajectory.

The teacher is full depth on a fine grid. From its states x_i and the x0 predictions m_i^k of every exit k follows the
error of every step of DPM-Solver++(2M) that starts on the teacher: from node i to j, with the previous call at p,

    e = sigma_j/sigma_i x_i + (a + s) m_i^k - s m_p - x_j,    a = -alpha_j (e^{-h} - 1),  s = a h / (2 h_before),

h and h_before the steps in lam. m_p is the teacher's: what a shallow exit at p adds is the smaller part, |s| < a + s.
Squared errors need inner products only, so one Gram matrix of all states and predictions holds everything. An error
at j counts by `gain[j]`, measured: how much a small disturbance there has grown when the teacher's own steps end.
GITS (2405.11326) and OSS (2503.21774) search times alone in such a matrix; here every call's depth is one more index.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from libs import rng
from libs.exits import EXIT_POLICIES
from libs.sampling.dense import DenseCall, DenseDenoiser
from libs.sampling.plans import Plan, State, advance
from libs.sampling.sampler import Sampler


@dataclass(frozen=True)
class Trajectory:
    """The teacher: nodes (N + 1,), and the costs that are learned from it."""

    nodes: np.ndarray
    error: np.ndarray  # (N, N, N + 1, E) mean squared error at the end of the step p -> i -> j leaving at exit k
    depth: np.ndarray  # (N, E) mean squared change of x0 by leaving at exit k
    gain: np.ndarray  # (N + 1,)

    def depth_loss(self, plan: Plan) -> np.ndarray:
        """(calls, E): what leaving at k changes in the end, for a plan's own times and coefficients."""
        times, fine = plan.t.numpy()[::-1], self.nodes[:-1][::-1]
        change = np.stack([np.interp(times, fine, column[::-1]) for column in self.depth.T], 1)[::-1]  # (calls, E)
        gain = np.interp(times, self.nodes[::-1], self.gain[::-1])[::-1]
        weight = plan.cm[:, -1].abs().numpy().copy()
        weight[:-1] = weight[:-1] + plan.cm[1:, -2].numpy()  # the next step takes part of it back
        return change * (weight**2 * gain**2)[:, None]


class Teacher:
    """Full depth on a fine plan, for the images `ids` (B,) of noise seed `seed`; it can start at any of its nodes."""

    def __init__(self, sampler: Sampler, plan: Plan, ids: np.ndarray, seed: int):
        self.sampler, self.plan, self.ids, self.seed = sampler, plan, ids, seed

    def start(self) -> State:
        noise = rng.SeededNoise(self.seed, self.ids, self.sampler.regime.shape)
        return State.start(noise.draw().to(self.sampler.run.device), self.plan)

    @torch.inference_mode()
    def go(self, state: State, seen: Callable[[State, Tensor], None] | None = None) -> State:
        """To the end, from wherever `state` is; `seen(state, eps (E, B, C, H, W))` is shown every call."""
        sampler = self.sampler
        calls: list[DenseCall] = []
        cond = sampler.regime.conditions.for_ids(self.seed, self.ids[: len(state.x)])
        make, guided = partial(DenseDenoiser, look=calls.append), sampler.guidance.scale > 0
        denoiser = sampler.denoiser(cond, EXIT_POLICIES["full"](), make=make)
        with sampler.precision():
            while not bool(state.done(self.plan).all()):
                eps = denoiser(state.x, self.plan.t[state.row])
                call = calls.pop()
                if seen is not None:
                    seen(state, torch.stack([sampler.guidance.apply(e) for e in call.eps]) if guided else call.eps)
                state = advance(self.plan, state, eps)
        return state


def learn_trajectory(sampler: Sampler, plan: Plan, t_end: float, ids: np.ndarray, seed: int) -> Trajectory:
    """Run the teacher's `plan` to t_end, a DPM-Solver++(2M), on the images `ids` of noise seed `seed`."""
    process, teacher = sampler.regime.process, Teacher(sampler, plan, ids, seed)
    states, outputs = [], []

    def seen(state: State, eps: Tensor) -> None:
        t = plan.t[state.row]
        states.append(state)
        outputs.append(torch.stack([process.x0(e, state.x, t) for e in eps]).flatten(2).double().cpu())  # (E, B, D)

    states.append(teacher.go(teacher.start(), seen))
    nodes = torch.cat([plan.t, torch.tensor([t_end], dtype=torch.float64)])
    x = torch.stack([state.x.flatten().double().cpu() for state in states])  # (N + 1, B D)
    m = torch.stack(outputs)  # (N, E, B, D)
    depth = (m - m[:, -1:]).square().mean((2, 3)).numpy()
    error = step_errors(process, nodes, x, m.flatten(2)) / x.shape[1]
    return Trajectory(nodes.numpy(), error, depth, gains(teacher, states))


def step_errors(process, nodes: Tensor, x: Tensor, m: Tensor) -> np.ndarray:
    """(N, N, N + 1, E) squared errors from x (N + 1, D) and m (N, E, D); infinite where p < i < j does not hold.

    Index [i, i] is a first step, without a previous call.
    """
    n, exits = m.shape[:2]
    alpha, sigma, lam = (f(nodes).numpy() for f in (process.alpha, process.sigma, process.lam))
    mm = torch.einsum("ikd,jld->ikjl", m, m).numpy()
    mx, xx = torch.einsum("ikd,jd->ikj", m, x).numpy(), (x @ x.T).numpy()
    error = np.full((n, n, n + 1, exits), np.inf)
    for i in range(n):
        j = np.arange(i + 1, n + 1)
        h = (lam[j] - lam[i])[:, None]  # (J, 1)
        keep, first = (sigma[j] / sigma[i])[:, None], -alpha[j, None] * np.expm1(-h)
        own, ownx, ownj = mm[i, range(exits), i, range(exits)], mx[i, :, i], mx[i][:, j].T  # (E,), (E,), (J, E)
        for p in range(i + 1):
            slope = 0 * h if p == i else first * h / (lam[i] - lam[p]) / 2
            c, b = first + slope, -slope
            pm, px, pj, pp = mm[i, :, p, -1], mx[p, -1, i], mx[p, -1, j][:, None], mm[p, -1, p, -1]
            square = keep**2 * xx[i, i] + c**2 * own + b**2 * pp + xx[j, j][:, None]
            cross = keep * c * ownx + keep * b * px - keep * xx[i, j][:, None] + c * b * pm - c * ownj - b * pj
            error[p, i, i + 1 :] = np.maximum(square + 2 * cross, 0)
    return error


def gains(teacher: Teacher, states: list[State], places: int = 8, size: float = 0.01, few: int = 32) -> np.ndarray:
    """(N + 1,): growth of a small random disturbance of the state at node j until the end; measured at some nodes."""
    rows = teacher.plan.rows
    chosen = np.unique(np.linspace(0, rows - 1, places).round().astype(int))
    generator, found = torch.Generator().manual_seed(teacher.seed), []
    end = states[-1].x[:few]
    for j in chosen:
        state = states[j].keep(torch.arange(min(few, len(teacher.ids))))
        noise = size * torch.randn(state.x.shape, generator=generator).to(state.x)
        moved = teacher.go(replace(state, x=state.x + noise, anchor=state.x + noise)).x
        found.append(float(((moved - end).square().mean() / noise.square().mean()).sqrt()))
    return np.interp(np.arange(rows + 1), [*chosen, rows], [*found, 1.0])


def best_path(trajectory: Trajectory, cost: np.ndarray, price: float) -> tuple[list[int], list[int]]:
    """Nodes (calls + 1) and exits (calls) of least sum of gain^2 error + price * cost[exit], cost (E,).

    Dynamic programming over pairs (previous node, node), as a step's error depends on both.
    """
    n = len(trajectory.error)
    loss = trajectory.error * trajectory.gain[None, None, :, None] ** 2 + price * cost
    exits, loss = loss.argmin(3), loss.min(3)  # (N, N, N + 1)
    best, origin = np.full((n, n + 1), np.inf), np.zeros((n, n + 1), int)  # of arriving at j from i; where i came from
    best[0, 1:] = loss[0, 0, 1:]
    for i in range(1, n):
        through = best[:i, i, None] + loss[:i, i, i + 1 :]  # (p, j)
        origin[i, i + 1 :] = through.argmin(0)
        best[i, i + 1 :] = through.min(0)
    nodes = [n, int(best[:, n].argmin())]
    while nodes[-1]:
        nodes.append(int(origin[nodes[-1], nodes[-2]]))
    nodes = nodes[::-1]
    before = [0, *nodes]
    return nodes, [int(exits[before[c], nodes[c], nodes[c + 1]]) for c in range(len(nodes) - 1)]
