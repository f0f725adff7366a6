"""From a budget to a file: learn, search (libs/analysis/joint.py), meet the budget in the closed loop, report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from libs.analysis.calibrate import DepthBench, check_images, distance_of, facts_of
from libs.analysis.joint import WITHIN, Choice, Search
from libs.analysis.trajectory import learn_trajectory
from libs.evaluation.timing import time_in_turn, timed
from libs.exits import EXIT_POLICIES, Trace, run_with_exits
from libs.files import read_json, write_json
from libs.metrics.cost import CONVENTION, macs_per_image
from libs.models import NoEstimator
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.images import Images
from libs.sampling.plans import Plan
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import dpm_solver_pp_2m
from libs.sampling.stored import plan_name, plan_of

OBJECTIVES = ("frechet", "teacher")
DEPTHS = ("search", "full", "ends")  # every exit; K; 0 and K
FINE, FINE_GRID = 40, "power:2"  # the teacher's calls
FEW, MANY = 256, 2_048  # images that sort the proposals; that select, and that are reported
LADDER = (0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)  # budgets that --max_quality_loss tries


@dataclass(frozen=True)
class PlanBench(DepthBench):
    """What plans are made with. Noise seed `seed` is learned from, the next selects, the one after is reported."""

    draft: Path  # of the plan that is tried
    unit: str  # of the budget: "seconds", or MACs
    facts: dict

    @cached_property
    def teacher(self) -> Plan:
        return dpm_solver_pp_2m(self.sampler.regime.process, steps=FINE, grid=FINE_GRID)

    @cached_property
    def t_end(self) -> float:
        return max(1e-3, self.sampler.regime.process.t_min)

    def planned(self, stored: dict, seed: int, n: int) -> list[Images]:
        write_json(self.draft, self.facts | {"plan": stored})
        policy = EXIT_POLICIES["planned"](path=str(self.draft))
        return self.images(policy, seed, n, plan_of(self.sampler.regime.process, stored))

    def reference(self, seed: int, n: int) -> list[Images]:
        return self.images(EXIT_POLICIES["full"](), seed, n)

    def spends(self, images: list[Images], cost: np.ndarray, reference: float) -> float:
        """Mean share of the reference, by what each call of each image ran: MACs, or the measured seconds."""
        trace = Trace.concatenate([batch.trace for batch in images])
        macs = self.model.macs()
        if self.unit != "seconds":
            branches = trace.used.shape[1]
            return float(macs_per_image(trace, macs).mean() / (reference * branches * macs.at(self.model.depth)))
        by_layers = np.zeros(self.model.depth + 1)
        by_layers[list(self.facts["points"])] = cost
        return float(by_layers[trace.used].sum(0).mean() / reference)

    def quality(self, objective: str) -> Callable[[list[Images], int], float]:
        """(images, noise seed) -> less is better."""
        if objective == "frechet":
            distance = distance_of(self.config, self.sampler.regime, self.sampler.run)
            return lambda images, seed: distance(images)
        wanted: dict[int, torch.Tensor] = {}

        def far(images: list[Images], seed: int) -> float:
            pixels = Images.concatenate(images).pixels.float()
            if len(wanted.get(seed, ())) < len(pixels):
                full = self.images(EXIT_POLICIES["full"](), seed, len(pixels), self.teacher)
                wanted[seed] = Images.concatenate(full).pixels.float()
            return float((pixels - wanted[seed][: len(pixels)]).square().mean())

        return far


def spend(
    config,
    regime: Regime,
    run: Run,
    asked: Mapping[str, Sequence[float]],
    *,
    depth: str = "search",
    objective: str = "frechet",
    n_images: int = 256,
    seed: int = 7001,
) -> list[dict]:
    """Write a plan for every value that is asked for beside the weights; returns the files' contents and their paths.

    `asked` holds the values of one of "budget", "seconds" (shares of the reference's) and "max_quality_loss". Smaller
    ones come first, as larger budgets begin with what smaller ones found.
    """
    check_request(config, run, asked, n_images, seed)
    ((name, values),) = asked.items()
    sampler = Sampler.open(config, regime, run)
    bench = PlanBench(
        sampler, n_images, seed, run.dir / f".plan-{depth}.draft.part", name, facts_of_plan(sampler, n_images, seed)
    )
    planner, plans = Planner(bench, depth, objective), []
    try:
        for value in sorted(values):
            found = planner.plan(name, value)
            what = f"{name.replace('_', '-')}-{value:g}{'' if depth == 'search' else f'-{depth}'}"
            path = run.dir / plan_name(config.nnet_path, what)
            write_json(path, found)
            plans.append(found | {"path": str(path)})
    finally:
        bench.draft.unlink(missing_ok=True)
    return plans


class Planner:
    """One network's search, for any number of budgets."""

    def __init__(self, bench: PlanBench, depth: str, objective: str):
        self.bench, self.depth, self.objective = bench, depth, objective
        sampler, self.reference = bench.sampler, float(bench.config.sample.sample_steps)
        model, self.points = sampler.model, list(sampler.model.points)
        if depth == "ends" and model.gaussian is None:
            raise ValueError(
                "--depth=ends has no other end than full depth: this network has no exit 0 (nnet.gaussian)"
            )
        if bench.unit == "seconds":
            cost = seconds_of(sampler, bench.config.eval.timing_batch)
        else:
            macs = model.macs()
            cost = np.array([macs.at(k) for k in self.points]) / macs.at(model.depth)
        ids = np.arange(min(bench.n, bench.config.sample.mini_batch_size))
        seen = learn_trajectory(sampler, bench.teacher, bench.t_end, ids, bench.seed)
        self.all_costs = cost
        last = len(self.points) - 1
        self.exits = {"search": slice(None), "full": slice(last, None), "ends": slice(0, None, last)}[depth]
        seen = replace(seen, error=seen.error[..., self.exits], depth=seen.depth[:, self.exits])
        rng = np.random.default_rng(bench.seed)
        self.search = Search(sampler.regime.process, seen, cost[self.exits], self.reference, rng)
        self.measure = bench.quality(objective)

    @cached_property
    def reference_quality(self) -> float:
        """On the seed that is reported."""
        seed = self.bench.seed + 2
        return self.measure(self.bench.reference(seed, self.most_images), seed)

    def plan(self, name: str, value: float) -> dict:
        if name != "max_quality_loss":
            return self.finish(*self.best(value), value, {name: value})
        seed, n = self.bench.seed + 1, self.most_images
        most = (1 + value) * self.measure(self.bench.reference(seed, n), seed)
        found = None
        for budget in filter(self.search.can_spend, LADDER):
            choice, quality = self.best(budget)
            if quality > most:
                break
            found = choice, quality, budget
        if found is None:
            raise ValueError(f"--max_quality_loss={value:g}: a budget of {LADDER[0]} already loses more")
        return self.finish(*found, {name: value})

    @property
    def most_images(self) -> int:
        return min(MANY, self.bench.config.sample.n_samples)

    def best(self, budget: float) -> tuple[Choice, float]:
        least = self.search.least
        if not least <= budget <= 1:
            raise ValueError(
                f"the budget is {budget:g}; with these exits it must lie between {least:.4f} (one call) and 1"
            )
        seed = self.bench.seed + 1
        sizes = self.most_images, min(FEW, self.most_images)

        def quality(choice: Choice, everything: bool) -> float:
            stored = choice.stored(self.points[self.exits])
            return self.measure(self.bench.planned(stored, seed, sizes[0 if everything else 1]), seed)

        cheaper, dearer = self.neighbours(budget)
        return self.search.select(budget, quality, cheaper, dearer, say=self.bench.sampler.run.say)

    def neighbours(self, budget: float) -> tuple[tuple[Choice, float] | None, Choice | None]:
        """Of the plans that lie there already, the best that spends no more with its quality, and the next larger one.

        With more to spend, or more exits to choose from, nothing should get worse.
        """
        smaller, larger, points = [], [], self.points[self.exits]
        others = tuple(f"-{depth}" for depth in DEPTHS if depth != self.depth)
        for path in sorted(self.bench.draft.parent.glob(plan_name(self.bench.config.nnet_path, "*"))):
            content = read_json(path, "a plan beside the weights")
            same = all(content.get(name) == self.bench.facts[name] for name in ("points", "config_hash", "seeds"))
            unit = "seconds" in content.get("asked", {}), self.bench.unit == "seconds"
            if not same or unit[0] != unit[1] or not set(content["plan"]["layers"]) <= set(points):
                continue
            plan, report = content["plan"], content["report"]
            if self.depth == "ends" and any(plan["max_u"]):
                continue  # its split sends images to an exit in between
            as_large = report["budget"] == budget
            if report["objective"] == self.objective and (not as_large or path.stem.endswith(others)):
                exits = tuple(points.index(k) for k in plan["layers"])
                max_u, lower = tuple(plan["max_u"]), plan["lower_order_final"]
                choice = Choice(tuple(plan["nodes"]), exits, lower, path.stem, max_u)
                if report["budget"] <= budget:
                    smaller.append((choice, report["selected_at"]))
                elif path.stem.endswith("-full") == (len(points) == 1):  # full depth is no plan to make shallower
                    larger.append((choice, report["budget"]))
        cheaper = min(smaller, key=lambda pair: pair[1], default=None)
        return cheaper, min(larger, key=lambda pair: pair[1], default=(None,))[0]

    def finish(self, choice: Choice, quality: float, budget: float, asked: dict) -> dict:
        """The file: the budget met in the closed loop, and what the plan does on a noise seed that chose nothing."""
        bench = self.bench
        stored = self.met(choice, budget)
        seed = bench.seed + 1
        if stored != choice.stored(self.points[self.exits]):
            quality = self.measure(bench.planned(stored, seed, self.most_images), seed)
        seed = bench.seed + 2
        images = bench.planned(stored, seed, self.most_images)
        spends = bench.spends(images, self.all_costs, self.reference)
        report = {
            "budget": budget,
            "spends": spends,
            "met": bool(spends <= (1 + WITHIN) * budget),
            "objective": self.objective,
            "selected_at": quality,
            "quality": self.measure(images, seed),
            "reference_quality": self.reference_quality,
        }
        say = ", ".join(f"{key} {value:.4g}" for key, value in report.items() if isinstance(value, float))
        bench.sampler.run.say(f"{say}; {len(stored['layers'])} calls of depths {stored['layers']}")
        if not report["met"]:
            bench.sampler.run.say(f"the budget {budget:g} is exceeded by more than {WITHIN:.0%}: no exits spend less")
        elif spends < (1 - WITHIN) * budget:
            bench.sampler.run.say(f"the budget {budget:g} is not spent: what is left buys no exit, or nothing better")
        schedule = {"t": stored["nodes"][:-1], "layers": stored["layers"]}
        return {"asked": asked, **bench.facts, "plan": stored, "schedule": schedule, "report": report}

    def met(self, choice: Choice, budget: float) -> dict:
        """The choice with what is left of the budget spent on one call's most uncertain images."""
        bench, search = self.bench, self.search
        points = self.points[self.exits]
        plain = choice.stored(points)
        if choice.max_u is not None or self.depth == "ends":  # a split sends images to the very next exit
            return plain
        left = budget * self.reference - search.cost[list(choice.exits)].sum()
        loss = search.trajectory.depth_loss(choice.table(search.process))
        up = [
            c for c, e in enumerate(choice.exits) if e + 1 < len(points) and search.cost[e + 1] - search.cost[e] > left
        ]
        if left < 0.25 * WITHIN * budget * self.reference or not up or isinstance(bench.sampler.model.uem, NoEstimator):
            return plain
        call = max(up, key=lambda c: loss[c, choice.exits[c]] - loss[c, choice.exits[c] + 1])

        def split(max_u: float) -> dict:
            return plain | {"max_u": [max_u if c == call else 0.0 for c in range(len(choice.exits))]}

        low, high = 1e-7, 1.0  # max u: the lower, the more images go on
        for _ in range(16):
            middle = (low * high) ** 0.5
            spent = bench.spends(bench.planned(split(middle), bench.seed + 1, bench.n), self.all_costs, self.reference)
            low, high = (middle, high) if spent > budget else (low, middle)
        return split(high)


@torch.inference_mode()
def seconds_of(sampler: Sampler, batch: int, rounds: int = 9) -> np.ndarray:
    """(E,): seconds of a call that leaves at each exit, in full-depth calls; medians of interleaved rounds."""
    model, device = sampler.model, sampler.run.device
    x = torch.randn(batch, *sampler.regime.shape, device=device)
    t = torch.full((batch,), 0.5, dtype=torch.float64)
    time_in = sampler.regime.process.network_time(t).to(device, torch.float32)
    cond = sampler.run.put(sampler.regime.conditions.for_ids(0, np.arange(batch)))
    fixed = [EXIT_POLICIES["fixed"](layer=k) for k in model.points]
    jobs = [timed(lambda policy=p: run_with_exits(model, policy, x, t, time_in, cond)[0].cpu()) for p in fixed]
    with sampler.precision():
        median = np.maximum.accumulate(np.median(time_in_turn(jobs, rounds, sampler.run), axis=1))
    return (median + 1e-6 * np.arange(len(median))) / median[-1]


def facts_of_plan(sampler: Sampler, n_images: int, seed: int) -> dict:
    config, model = sampler.config, sampler.model
    branches = 1 + (config.sample.scale > 0)
    macs = config.sample.sample_steps * branches * model.macs().at(model.depth)
    return {
        "reference": {
            "sampler": config.sample.algorithm,
            "steps": config.sample.sample_steps,
            "grid": config.sample.grid,
            "depth": "full",
            "gmacs": macs / 1e9,
        },
        "convention": f"share of the reference's {CONVENTION}",
        "n_learned": min(n_images, config.sample.mini_batch_size),  # one batch: all of its states are held at once
        "seeds": {"learned": seed, "selected": seed + 1, "reported": seed + 2},
        **facts_of(sampler, n_images),
    }


def check_request(config, run: Run, asked: Mapping, n_images: int, seed: int) -> None:
    if len(asked) != 1 or not all(asked.values()):
        raise ValueError("give one of --budget, --seconds (shares of the reference's) and --max_quality_loss")
    ((name, values),) = asked.items()
    for value in values:
        if name == "max_quality_loss" and not value >= 0:
            raise ValueError(f"--max_quality_loss={value:g}: it is a share of the reference's distance, at least 0")
        if name != "max_quality_loss" and not 0 < value <= 1:
            raise ValueError(f"--{name}={value:g}: it is a share of what the reference spends and must lie in (0, 1]")
    if config.sample.residual or config.sample.refresh:
        raise ValueError(
            "sample.residual and sample.refresh look back over evenly made calls; a plan takes none of them"
        )
    check_images(config, run, n_images, seed)
