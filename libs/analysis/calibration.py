"""Spend a budget of MACs over the calls of a sampling where it keeps the most quality.

Both ways start from what dense runs along full-depth trajectories showed: the loss of leaving call j at exit k, the
squared change of the call's eps times the squared `reach` of that eps in the sampler. Losses of different calls add up,
as if independent. A budget is a share of the full-depth MACs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from libs.exits.static import between
from libs.sampling.plans import HISTORY, Plan

ALWAYS = 1.01  # a threshold above every uncertainty
Part = TypeVar("Part")


def reach(plan: Plan) -> np.ndarray:
    """(rows,): how far the states that follow move per unit of each call's eps, summed over the rows that read it."""
    weight = np.zeros(plan.rows)
    for lag in range(HISTORY):
        weight[: plan.rows - lag] += plan.cm[lag:, HISTORY - 1 - lag].abs().numpy()
    return weight * plan.pm.abs().numpy()


@dataclass(frozen=True)
class Evidence:
    """What dense runs showed, calls in the sampler's order (descending t), and what the exits cost.

    Calls that are not `free` run full depth whatever is decided. Costs are shares of one full-depth call.
    """

    t: np.ndarray  # (calls,)
    u: np.ndarray  # (calls, E, B) mean uncertainty of every row
    loss: np.ndarray  # (calls, E, B)
    static: np.ndarray  # (calls, E): mean loss when all rows leave there, guidance included
    free: np.ndarray  # (calls,) bool
    cost: np.ndarray  # (E,) of leaving at each exit
    ask: np.ndarray  # (E,) of the question at each exit
    ahead: float = 0.0  # of the one question to an estimator that looks ahead

    @property
    def cheapest(self) -> float:
        """The least possible budget."""
        return float(np.where(self.free, self.cost[0], 1).mean())


# ---- a static schedule ---------------------------------------------------------------------------------------------


def schedule(static: np.ndarray, cost: np.ndarray, free: np.ndarray, budget: float) -> tuple[np.ndarray, float]:
    """The exit of every call (calls,), as a position, and the budget that it spends; arguments as in `Evidence`.

    Minimises sum_j loss[j, k_j] + price * cost[k_j]: from the cheapest exits on, upgrades are bought in the order of
    loss saved per MAC (the lower convex hulls of the calls, merged), so larger budgets only add layers. The last
    upgrade is taken in part where that comes nearer to the budget.
    """
    spent, calls = np.where(free, cost[0], 1.0).sum(), len(free)
    check_budget(budget, spent / calls)
    loss = np.maximum.accumulate(static[:, ::-1], axis=1)[:, ::-1]  # more layers never count as worse
    able = [upgrade for call in np.flatnonzero(free) for upgrade in upgrades(loss[call], cost, call)]
    chosen = np.where(free, 0, len(cost) - 1)
    for _, call, old, new in sorted(able, key=lambda upgrade: -upgrade[0]):
        choices = np.arange(old, new + 1)
        after = spent + cost[choices] - cost[old]
        best = new if after[-1] <= budget * calls else choices[np.abs(after - budget * calls).argmin()]
        chosen[call], spent = best, spent + cost[best] - cost[old]
        if best != new:
            break
    return chosen, float(spent / calls)


def upgrades(loss: np.ndarray, cost: np.ndarray, call: int) -> list[tuple[float, int, int, int]]:
    """(loss saved per cost, call, from, to) along the lower convex hull of loss (E,) over cost (E,)."""
    found, k = [], 0
    while k < len(loss) - 1:
        gains = (loss[k] - loss[k + 1 :]) / (cost[k + 1 :] - cost[k])
        best = int(gains.argmax())
        found.append((float(gains[best]), call, k, k + 1 + best))
        k += 1 + best
    return found


# ---- thresholds per (time bin, exit) -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """Groups of consecutive calls, in ascending order of time."""

    of_call: np.ndarray  # (calls,)
    edges: list[float]

    @classmethod
    def of(cls, t: np.ndarray, most: int) -> Bins:
        """One bin per distinct time, or `most` bins of about as many times each."""
        times, of_call = np.unique(t, return_inverse=True)  # ascending
        n = min(most, len(times))
        of_time = np.arange(len(times)) * n // len(times)
        middles = np.array(between(times.tolist()))
        return cls(of_time[of_call], middles[np.flatnonzero(np.diff(of_time))].tolist())


def thresholds(evidence: Evidence, bins: Bins, budget: float) -> tuple[np.ndarray, float]:
    """max_u (bins, E - 1) and the budget that it spends on the dense runs.

    A price per MAC gives a table (`stopping`); bisection brackets the budget between the tables of two prices, and
    switching entry by entry from the one to the other fills the gap.
    """

    def spent(table):
        return spending(evidence, bins, table)

    check_budget(budget, cheapest_thresholds(evidence, bins))

    low, high = 1e-12, 1e12  # prices, in units of the largest loss
    scale = float(evidence.loss.max()) or 1.0
    for _ in range(30):
        price = (low * high) ** 0.5
        low, high = (price, high) if spent(stopping(evidence, bins, scale * price)) > budget else (low, price)
    rich, poor = (stopping(evidence, bins, scale * price) for price in (low, high))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(blend(poor, rich, middle)) > budget else (middle, high)
    tables = [blend(poor, rich, part) for part in (low, high)]
    best = min(tables, key=lambda table: abs(spent(table) - budget))
    return best, spent(best)


def stopping(evidence: Evidence, bins: Bins, price: float) -> np.ndarray:
    """The thresholds (bins, E - 1) of least mean loss + price * cost, by backward induction over the exits.

    At exit k a row pays for leaving now, or what the thresholds behind it make it pay; the best threshold splits the
    rows, in the order of u, where the sum of the differences is least.
    """
    n = int(bins.of_call.max()) + 1
    exits = evidence.u.shape[1]
    cost = evidence.cost + evidence.ahead + np.cumsum(evidence.ask)
    table = np.zeros((n, exits - 1))
    for number in range(n):
        mine = (bins.of_call == number) & evidence.free
        u, loss = (array[mine].transpose(1, 0, 2).reshape(exits, -1) for array in (evidence.u, evidence.loss))
        pays = loss[-1] + price * cost[-1]  # (rows,) of going on
        for k in range(exits - 2, -1, -1):
            now = loss[k] + price * cost[k]
            table[number, k] = best_threshold(u[k], now - pays)
            pays = np.where(u[k] < table[number, k], now, pays)
    return table


def best_threshold(u: np.ndarray, difference: np.ndarray) -> float:
    """The threshold for which the sum of `difference` over the rows with u below it is least; 0 lets none leave."""
    order = np.argsort(u, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(difference[order])])
    n = int(sums.argmin())
    if n == 0:
        return 0.0
    return ALWAYS if n == len(u) else float(u[order[n - 1 : n + 1]].mean())


def blend(first: np.ndarray, second: np.ndarray, part: float) -> np.ndarray:
    """Entries of `second` up to the share `part` of the table, of `first` beyond, and a mixture where it falls."""
    weight = np.clip(part * first.size - np.arange(first.size), 0, 1).reshape(first.shape)
    return first + weight * (second - first)


def exits_taken(evidence: Evidence, bins: Bins, table: np.ndarray) -> np.ndarray:
    """(calls, B): the position of the first exit whose u is below its threshold, on the dense runs."""
    hit = evidence.u[:, :-1] < table[bins.of_call][:, :, None]  # (calls, E - 1, B)
    hit &= evidence.free[:, None, None]
    return np.where(hit.any(1), hit.argmax(1), evidence.u.shape[1] - 1)


def spending(evidence: Evidence, bins: Bins, table: np.ndarray) -> float:
    """The budget that thresholds spend on the dense runs; exits that no bin leaves at are not asked."""
    ask = np.where(np.append((table > 0).any(0), False), evidence.ask, 0)
    cost = evidence.cost + evidence.ahead * (table > 0).any() + np.cumsum(ask)
    spent = cost[exits_taken(evidence, bins, table)]  # (calls, B)
    return float(np.where(evidence.free[:, None], spent, 1).mean())


def cheapest_thresholds(evidence: Evidence, bins: Bins) -> float:
    """The least possible budget of thresholds: the first exit, after its question."""
    table = np.zeros((int(bins.of_call.max()) + 1, len(evidence.cost) - 1))
    table[:, 0] = ALWAYS
    return spending(evidence, bins, table)


# ---- the closed loop -----------------------------------------------------------------------------------------------


def check_budget(budget: float, least: float) -> None:
    if not least <= budget <= 1:
        raise ValueError(
            f"--budget={budget:g}: it is a share of the full-depth MACs, and with these exits it must lie between "
            f"{least:.4f} (the first one at every call) and 1"
        )


def meet(
    budget: float, floor: float, make: Callable[[float], Part], measure: Callable[[Part], float], enough: float = 0.005
) -> Part:
    """What `make(target)` gives at the target for which `measure` comes nearest to `budget`.

    Early exits change where later calls are evaluated, so what a table spends on its own trajectories differs from what
    it spent on the dense ones. The target moves by what was missed, inside a bracket, until within a share `enough`.
    """
    low, high, target, best = floor, 1.0, budget, None
    for _ in range(12):
        part = make(target)
        missed = measure(part) - budget
        if best is None or abs(missed) < best[0]:
            best = abs(missed), part
        if abs(missed) <= enough * budget:
            break
        low, high = (low, target) if missed > 0 else (target, high)
        step = target - missed
        target = step if low < step < high else (low + high) / 2
    return best[1]


def cheapest_within(
    most: float, floor: float, make: Callable[[float], Part], loses: Callable[[Part], float], rounds: int = 7
) -> Part:
    """The cheapest of `make(target)`, floor <= target <= 1, that `loses` at most `most`; assumes a monotone loss."""
    low, high, best = floor, 1.0, make(1.0)
    for _ in range(rounds):
        target = (low + high) / 2
        part = make(target)
        if loses(part) <= most:
            best, high = part, target
        else:
            low = target
    return best
