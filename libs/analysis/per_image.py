"""Does looking at the image pay? Per-image exits against the best static depths that spend as much, and a bound.

All sample on the configured calls and differ in the depths only:

static      a depth per call for every image (`calibration.schedule`); between two of its budgets a share of the images
            takes the one and the rest the other, which looks at no image either
thresholds  max u per (call, exit), calibrated to the budget in the closed loop (`calibration.thresholds`)
oracle      per image and call the exit of least loss + price * cost, knowing the full depth's answer: no policy

Each is measured against full depth's images of the same noise, as a mean square error, and by its distance to the real
images, on noise seeds that shaped nothing.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

from libs.analysis import calibration
from libs.analysis.calibrate import DepthBench, DepthSearch, distance_of
from libs.analysis.calibration import Evidence
from libs.evaluation.timing import time_in_turn, timed
from libs.exits import EXIT_POLICIES
from libs.metrics.paired import mse, psnr
from libs.report.statistics import estimate
from libs.sampling.dense import DenseCall, sample_dense
from libs.sampling.images import Images
from libs.sampling.inflight import IN_FLIGHT, suits

N_SEEDS = 3  # noise seeds that report: the least that an interval needs
N_BINS = 50  # bins of time for the thresholds


def per_image(bench: DepthBench, budgets: list[float]) -> list[dict]:
    """A record per budget (a share of full depth's MACs): what each way spends and loses, and their differences.

    `static_at_thresholds` is the static plan at exactly what the thresholds spent; `gain` is how much less error the
    thresholds have, as a share of its error (positive: looking at the image pays), with a 95 % interval over noise
    seeds. `oracle_gain` likewise, against the static plan at what the oracle spent.
    """
    config, run = bench.config, bench.sampler.run
    if config.sample.scale or config.sample.residual:
        raise ValueError("--budget compares policies without sample.scale and sample.residual; leave these out")
    search = DepthSearch(bench, run.dir / "per-image.json", {"points": list(bench.model.points)}, N_BINS)
    distance = distance_of(config, bench.sampler.regime, run)
    seeds = [bench.seed + 2 + i for i in range(N_SEEDS)]
    try:
        full = {seed: bench.images(EXIT_POLICIES["full"](), seed) for seed in seeds}
        measure = Measure(bench, full, distance)
        static = Static(search, measure, seeds)
        return [record(bench, search, measure, static, budget, seeds) for budget in budgets]
    finally:
        search.draft.unlink(missing_ok=True)


class Measure:
    """Images of a noise seed -> what they spent, their error to full depth's, their distance to real images."""

    def __init__(self, bench: DepthBench, full: dict[int, list[Images]], distance: Callable):
        self.bench, self.distance = bench, distance
        self.full = {seed: Images.concatenate(images).pixels for seed, images in full.items()}
        self.full_distance = {seed: distance(images) for seed, images in full.items()}

    def __call__(self, images: list[Images], seed: int) -> dict[str, float]:
        error = float(mse(Images.concatenate(images).pixels, self.full[seed]).mean())
        return {"spends": self.bench.share(images), "mse": error, "distance": self.distance(images)}


class Static:
    """The best depths per call for any budget, measured once each."""

    def __init__(self, search: DepthSearch, measure: Measure, seeds: list[int]):
        self.search, self.measure, self.seeds = search, measure, seeds
        self.known: dict[tuple[int, ...], dict[int, Images]] = {}

    def images(self, budget: float) -> tuple[float, dict[int, Images]]:
        """(budget of the plan, images by seed) of the schedule for a budget."""
        content = self.search.make("schedule", min(1.0, max(budget, self.search.floors["schedule"])))
        key = tuple(content["layers"])
        if key not in self.known:
            self.known[key] = {
                seed: Images.concatenate(self.search.images("schedule", content, seed)) for seed in self.seeds
            }
        return content["open_loop"], self.known[key]

    def exactly(self, budget: float) -> dict[int, dict[str, float]]:
        """Measurements by seed of the schedule for a budget."""
        return {seed: self.measure([images], seed) for seed, images in self.images(budget)[1].items()}

    def at(self, budget: float) -> dict[int, dict[str, float]]:
        """Measurements by seed between two schedules: a random share of the images takes one, the rest the other."""
        step = float(np.diff(self.search.seen.cost).max()) / len(self.search.seen.t)  # one exit more at one call
        spent, images = self.images(budget)
        other, others = self.images(budget + (step if spent <= budget else -step))
        if other == spent:
            return self.exactly(budget)
        part = float(np.clip((budget - spent) / (other - spent), 0, 1))
        measured = {}
        for seed, own in images.items():
            changes = torch.from_numpy(np.random.default_rng(seed).permutation(len(own)) < round(part * len(own)))
            used = np.where(changes.numpy(), others[seed].trace.used, own.trace.used)
            pixels = torch.where(changes[:, None, None, None], others[seed].pixels, own.pixels)
            trace = replace(own.trace, calls=list(zip(own.trace.t, used, strict=True)))
            measured[seed] = self.measure([replace(own, pixels=pixels, trace=trace)], seed)
        return measured


def record(
    bench: DepthBench, search: DepthSearch, measure: Measure, static: Static, budget: float, seeds: list[int]
) -> dict:
    thresholds = search.for_budget("thresholds", budget)
    policy_images = {seed: search.images("thresholds", thresholds, seed) for seed in seeds}
    ways = {
        "static": static.exactly(budget),
        "thresholds": {seed: measure(images, seed) for seed, images in policy_images.items()},
        "oracle": {seed: measure(oracle_images(bench, search.seen, budget, seed), seed) for seed in seeds},
    }
    found: dict = {"budget": budget, "n_images": bench.n, "noise_seeds": seeds}
    for name, by_seed in ways.items():
        found[name] = mean_over_seeds(by_seed)
    found["full_distance"] = float(np.mean(list(measure.full_distance.values())))
    for name, key in (("thresholds", "gain"), ("oracle", "oracle_gain")):
        equal = static.at(found[name]["spends"])
        if name == "thresholds":
            found["static_at_thresholds"] = mean_over_seeds(equal)
        found[key] = asdict(
            estimate(1 - ways[name][s]["mse"] / equal[s]["mse"] if equal[s]["mse"] else 0.0 for s in seeds)
        )
        found[f"{key}_distance"] = asdict(estimate(equal[s]["distance"] - ways[name][s]["distance"] for s in seeds))
    found["seconds"] = seconds(bench, search, thresholds, budget)
    bench.sampler.run.say(sentence(found))
    return found


def mean_over_seeds(by_seed: dict[int, dict[str, float]]) -> dict[str, float]:
    mean = {key: float(np.mean([found[key] for found in by_seed.values()])) for key in ("spends", "mse", "distance")}
    return mean | {"psnr": psnr(mean["mse"])}


def sentence(found: dict) -> str:
    gain, bound = found["gain"], found["oracle_gain"]
    interval = "" if gain["low"] is None else f" ({gain['low']:+.0%} to {gain['high']:+.0%})"
    return (
        f"budget {found['budget']:g}: thresholds {found['thresholds']['psnr']:.1f} dB, static "
        f"{found['static_at_thresholds']['psnr']:.1f} dB at equal MACs: error {gain['mean']:+.0%} less{interval}; an "
        f"oracle {bound['mean']:+.0%}"
    )


# ---- the bound -----------------------------------------------------------------------------------------------------


def oracle_images(bench: DepthBench, seen: Evidence, budget: float, seed: int) -> list[Images]:
    """Images whose every call leaves at the exit of least loss + price * cost, at the price of the budget on `seen`.

    The losses are those of its own trajectory, weighted like the calibration's (`calibration.reach`).
    """
    weight = calibration.reach(bench.plan) ** 2
    price = price_of(seen, budget)
    cost = torch.from_numpy(seen.cost)
    points = torch.tensor(bench.model.points)

    def look(call: DenseCall):
        if not seen.free[call.number]:
            return None
        loss = float(weight[call.number]) * call.gap.square().flatten(2).mean(2).double().cpu()  # (E, B)
        return points[(loss + price * cost[:, None]).argmin(0)]

    return [sample_dense(bench.sampler, ids, look, seed=seed, plan=bench.plan) for ids in bench.batches]


def price_of(seen: Evidence, budget: float) -> float:
    """The price per MAC at which the exits of least loss + price * cost spend the budget on the dense runs."""
    scale = float(seen.loss.max()) or 1.0
    low, high = 1e-12, 1e6
    for _ in range(50):
        price = (low * high) ** 0.5
        taken = (seen.loss + scale * price * seen.cost[:, None]).argmin(1)  # (calls, B)
        spent = np.where(seen.free[:, None], seen.cost[taken], 1.0).mean()
        low, high = (price, high) if spent > budget else (low, price)
    return scale * (low * high) ** 0.5


# ---- seconds -------------------------------------------------------------------------------------------------------


def seconds(bench: DepthBench, search: DepthSearch, thresholds: dict, budget: float) -> dict[str, float]:
    """Seconds per image as shares of full depth's, measured in turn: static, thresholds, and those in flight."""
    size = bench.config.eval.timing_batch
    parts = {"schedule": search.make("schedule", budget), "thresholds": thresholds}
    search.draft.write_text(json.dumps(search.facts | parts))
    policies = {"full": EXIT_POLICIES["full"]()}
    policies |= {name: bench.policy(part, search.draft) for name, part in (("static", "schedule"), ("thresholds",) * 2)}
    jobs = {name: (policy, False) for name, policy in policies.items()}
    if suits(bench.model, policies["thresholds"], bench.sampler.guidance):
        jobs["inflight"] = (policies["thresholds"], True)

    def job(policy, inflight: bool) -> Callable[[], float]:
        ids = np.arange(size * IN_FLIGHT)
        options = dict(plan=bench.plan, policy=policy, batch_size=size, inflight=inflight)
        return timed(lambda: list(bench.sampler.images(ids, seed=bench.seed, **options)), len(ids))

    taken = time_in_turn([job(*way) for way in jobs.values()], bench.config.eval.timing_runs, bench.sampler.run)
    median = dict(zip(jobs, map(statistics.median, taken), strict=True))
    return {name: value / median["full"] for name, value in median.items() if name != "full"}
