"""One budget for how many calls a sampling makes, when, and how deep each of them goes.

1. Learn what steps and exits cost in accuracy from one fine trajectory (libs/analysis/trajectory.py).
2. Propose: dynamic programming over times and depths under a price per MAC, and a family of named grids with every
   number of calls, whose depths are either all the same or bought call by call (calibration.schedule). What a person
   would try by hand is in the family, so the search is not worse than that on the seed that selects.
3. Select in the closed loop on one noise seed: many candidates on few images, the best on many, then small changes of
   times and depths are kept while they help, from the best two. The objective is a Frechet distance or, with
   --objective=teacher, the squared distance to the teacher's images. Every budget is worth about the same work, so
   small ones are tried in more ways; the best plan of the smaller ones, with what is left bought at its calls, always
   takes part, and that of the next larger one, made shallower, where it lies there. Where nothing beats the smaller
   one's as it is, it is the answer: a budget is what may be spent.
4. Meet the budget: what is left sends the images that are most uncertain in one call one exit further.

The report is from a noise seed that chose nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from libs.analysis import calibration
from libs.analysis.trajectory import Trajectory, best_path
from libs.sampling.plans import Plan
from libs.sampling.solvers import dpm_solver_pp_2m
from libs.sampling.stored import plan_of
from sde import Process

TRIED_GRIDS = ("power:1.5", "power:2", "power:2.5", "logsnr", "karras:7")
MOST_CALLS = 16
CALL = 0.05  # of a full-depth call: the least that a call counts where calls are proposed, however few its MACs are
WORK = 5.0  # of one budget's changes, in samplings of the reference's cost
STARTS = 2  # plans that are changed
WITHIN = 0.02  # of the budget


@dataclass(frozen=True)
class Choice:
    """A plan: times (calls + 1,) from 1 down, and the position of each call's exit among the model's."""

    nodes: tuple[float, ...]
    exits: tuple[int, ...]
    lower_order_final: bool
    origin: str
    max_u: tuple[float, ...] | None = None  # of a plan that lies there already and is taken as it is

    def stored(self, points: Sequence[int]) -> dict:
        """The "plan" part of a file."""
        return {
            "nodes": list(self.nodes),
            "computed": [True] * len(self.exits),
            "order": 1,
            "lower_order_final": self.lower_order_final,
            "layers": [points[e] for e in self.exits],
            "max_u": list(self.max_u or [0.0] * len(self.exits)),
            "origin": self.origin,
        }

    def table(self, process: Process) -> Plan:
        return plan_of(process, self.stored(range(max(self.exits) + 1)))


@dataclass(frozen=True)
class Search:
    """`cost` (E,) of a call by its exit, in full-depth calls; `reference`: the full-depth calls that budget 1 buys."""

    process: Process
    trajectory: Trajectory
    cost: np.ndarray
    reference: float
    rng: np.random.Generator

    @property
    def least(self) -> float:
        """The budget of one call that leaves at the first exit."""
        return float(self.cost[0] / self.reference)

    def can_spend(self, budget: float) -> bool:
        """Whether anything spends it: without exits, only whole calls do."""
        return budget >= self.least and any(self.affords(choice, budget) for choice in self.family(budget))

    def spends(self, choice: Choice) -> float:
        return float(self.cost[list(choice.exits)].sum() / self.reference)

    # ---- proposals ---------------------------------------------------------------------------------------------------

    def programmed(self, budget: float) -> list[Choice]:
        """By dynamic programming: the two choices whose prices bracket the budget."""
        low, high, found = 1e-14, 1e6, {}
        for _ in range(50):
            price = (low * high) ** 0.5
            nodes, exits = best_path(self.trajectory, np.maximum(self.cost, CALL), price)
            times = tuple(self.trajectory.nodes[nodes].tolist())
            choice = Choice(times, tuple(exits), False, "programmed")
            over = self.spends(choice) > budget
            low, high = (price, high) if over else (low, price)
            found[over] = choice
        return [self.fit(choice, budget) for choice in found.values()]

    def family(self, budget: float) -> list[Choice]:
        """Named grids with every number of calls that the budget can pay: depths all the same, or bought.

        The last step is of second order: on grids that are dense near the data first order costs quality there.
        """
        calls = budget * self.reference
        shallow = max(self.cost[1 if len(self.cost) > 2 else 0], CALL)
        most = min(max(calls / shallow, 1), MOST_CALLS)
        tried = int(np.clip(0.5 / budget, 2, 5))
        counts = np.unique(np.geomspace(max(1, np.ceil(calls - 1e-9)), most, tried).round().astype(int))
        if len(self.cost) == 1:
            counts = [max(1, int(calls * (1 + WITHIN)))]
        found = []
        for n in counts:
            affordable = np.flatnonzero(self.cost * n <= calls * (1 + WITHIN))
            even = int(affordable[-1]) if len(affordable) else 0
            for grid in TRIED_GRIDS:
                found.append(Choice(self.grid(n, grid), (even,) * n, False, grid))
                found.append(self.bought(found[-1], budget))
        return list({(c.nodes, c.exits, c.lower_order_final): c for c in found}.values())

    def grid(self, n: int, name: str) -> tuple[float, ...]:
        t = dpm_solver_pp_2m(self.process, steps=n, grid=name).t.tolist()
        return (*t, float(self.trajectory.nodes[-1]))

    def bought(self, choice: Choice, budget: float) -> Choice:
        """The depths that the trajectory's losses buy for this budget at the choice's times."""
        calls = len(choice.exits)
        share = budget * self.reference / calls
        loss = self.trajectory.depth_loss(choice.table(self.process))
        share = min(max(share, self.cost[0]), 1.0)
        exits, _ = calibration.schedule(loss, self.cost, np.ones(calls, bool), share)
        return replace(choice, exits=tuple(int(e) for e in exits))

    def fit(self, choice: Choice, budget: float) -> Choice:
        """The choice with its depths changed, one exit at a time, until it is within the budget."""
        loss = self.trajectory.depth_loss(choice.table(self.process))
        exits = np.array(choice.exits)
        for _ in range(len(exits) * len(self.cost)):
            left = budget * (1 + WITHIN / 2) * self.reference - self.cost[exits].sum()
            up = [c for c in range(len(exits)) if exits[c] + 1 < len(self.cost)]
            pays = [c for c in up if self.cost[exits[c] + 1] - self.cost[exits[c]] <= left]
            if left < 0:
                down = [c for c in range(len(exits)) if exits[c] > 0]
                if not down:
                    break
                call = min(down, key=lambda c: loss[c, exits[c] - 1] - loss[c, exits[c]])
                exits[call] -= 1
            elif pays:
                call = max(pays, key=lambda c: loss[c, exits[c]] - loss[c, exits[c] + 1])
                exits[call] += 1
            else:
                break
        return replace(choice, exits=tuple(int(e) for e in exits))

    def longer(self, choice: Choice, after: int | None = None) -> Choice:
        """With one more call as deep as call `after`, between it and the next time; by default in the longest step."""
        root = np.sqrt(choice.nodes)  # calls of power:2 are evenly spaced in it
        i = int(np.argmin(np.diff(root))) if after is None else after
        nodes = (*choice.nodes[: i + 1], float(root[i : i + 2].mean() ** 2), *choice.nodes[i + 1 :])
        return replace(choice, nodes=nodes, exits=(*choice.exits[: i + 1], *choice.exits[i:]))

    def grown(self, choice: Choice, budget: float) -> list[Choice]:
        """The plan of a smaller budget with what is left bought: depth at its calls, or calls first."""
        choice = replace(choice, max_u=None)
        found = [self.fit(choice, budget)]
        while len(choice.exits) < MOST_CALLS and (len(found) < 2 or not self.affords(found[-1], budget)):
            choice = self.longer(choice)
            found.append(self.fit(choice, budget))
        return [c for c in found if self.affords(c, budget)]

    def changed(self, choice: Choice, budget: float) -> Choice:
        """A small random change that spends about the same: times move, depth goes from one call to another, or a call
        comes or goes."""
        nodes, exits = list(choice.nodes), np.array(choice.exits)
        calls = len(exits)
        kind = self.rng.integers(4 if len(self.cost) > 1 and calls > 1 else 2)
        if kind == 3:
            i = int(self.rng.integers(1, calls))
            shorter = replace(choice, nodes=choice.nodes[:i] + choice.nodes[i + 1 :], exits=tuple(np.delete(exits, i)))
            return self.fit(self.longer(choice, i) if self.rng.integers(2) else shorter, budget)
        if kind == 2:  # from one call to another
            a, b = self.rng.choice(calls, 2, replace=False)
            exits[a], exits[b] = min(exits[a] + 1, len(self.cost) - 1), max(exits[b] - 1, 0)
        elif kind == 1 or calls == 1:  # all times
            p = float(np.exp(0.15 * self.rng.standard_normal()))
            nodes[1:-1] = [t**p for t in nodes[1:-1]]
        else:
            i = int(self.rng.integers(1, calls))
            part = 0.4 * self.rng.uniform(-1, 1)
            nodes[i] += part * (nodes[i - 1] - nodes[i] if part > 0 else nodes[i] - nodes[i + 1])
        new = replace(choice, nodes=tuple(nodes), exits=tuple(int(e) for e in exits))
        rises = any(a <= b for a, b in zip(nodes[:-1], nodes[1:], strict=True))
        return choice if rises else self.fit(new, budget)

    # ---- selection ---------------------------------------------------------------------------------------------------

    def select(
        self,
        budget: float,
        quality: Callable[[Choice, bool], float],
        cheaper: tuple[Choice, float] | None = None,
        dearer: Choice | None = None,
        keep: int = 3,
        say: Callable[[str], None] = lambda text: None,
    ) -> tuple[Choice, float]:
        """The best choice for `budget` and its quality; `quality(choice, many images)`: less is better.

        `cheaper`: the best choice of smaller budgets and its quality; `dearer`: that of the next larger one.
        """
        proposed = self.programmed(budget) + self.family(budget)
        grown = self.grown(cheaper[0], budget) if cheaper else []
        grown += [self.fit(replace(dearer, max_u=None), budget)] if dearer else []
        able = {(c.nodes, c.exits, c.lower_order_final): c for c in proposed + grown if self.affords(c, budget)}
        if not able and cheaper:
            return cheaper
        if not able:
            raise ValueError(
                f"the budget {budget:g} is {budget * self.reference:.2f} full-depth calls, which no choice of calls "
                "and exits spends within 2 %; full depth alone takes whole calls"
            )
        few = [c for c in sorted(able.values(), key=lambda c: quality(c, False))[:keep] if c not in grown]
        starts = sorted(((c, quality(c, True)) for c in few + grown), key=lambda pair: pair[1])[:STARTS]
        best, value = starts[0]
        say(f"budget {budget:g}: {len(able)} proposals; best {best.origin}, {len(best.exits)} calls, {value:.4g}")
        best, value = min((self.climb(*start, budget, quality) for start in starts), key=lambda pair: pair[1])
        if cheaper and cheaper[1] <= value:
            say(f"budget {budget:g}: nothing that spends it is better than {cheaper[0].origin}")
            return cheaper
        return best, value

    def climb(self, best: Choice, value: float, budget: float, quality: Callable) -> tuple[Choice, float]:
        """The choice after as many changes as its part of WORK pays, those that helped kept."""
        for _ in range(int(WORK / STARTS / budget)):
            new = self.changed(best, budget)
            if new == best or not self.affords(new, budget):
                continue
            now = quality(new, True)
            if now < value:
                best, value = replace(new, origin=f"{best.origin.removesuffix(', changed')}, changed"), now
        return best, value

    def affords(self, choice: Choice, budget: float) -> bool:
        """Whether the choice spends the budget, or less where deeper exits can take what is left."""
        if len(choice.exits) > MOST_CALLS:
            return False
        least = 0 if min(choice.exits) + 1 < len(self.cost) else budget * (1 - WITHIN)
        return least <= self.spends(choice) <= budget * (1 + WITHIN)
