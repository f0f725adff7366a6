"""A static schedule and thresholds per (time, exit) that spend a given share of the full-depth MACs of one sampler.

Learns from full-depth samplings in which every exit is looked at, then runs what it found: early exits change where
later calls are evaluated, so what the closed loop spends is measured and corrected on one noise seed, and reported
from another. The file lies beside the weights; exit.name=schedule and exit.name=calibrated read it. It knows
config.sample.residual, given config.sample.refresh. Where the times of the calls are free too: libs/analysis/budget.py.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict

from libs.analysis import calibration
from libs.analysis.calibration import Bins, Evidence
from libs.evaluation.records import config_hash
from libs.evaluation.reference import open_reference
from libs.exits import EXIT_POLICIES, ExitPolicy, Trace, looking_back
from libs.files import write_json
from libs.metrics.cost import CONVENTION, macs_per_image
from libs.metrics.extractors import build_extractor
from libs.metrics.frechet import Frechet
from libs.metrics.paired import Paired
from libs.models import EarlyExitModel
from libs.regimes import Regime
from libs.run import Run, describe_machine
from libs.sampling.denoiser import Guidance
from libs.sampling.dense import DenseCall, sample_dense
from libs.sampling.images import Images
from libs.sampling.plans import Plan
from libs.sampling.sampler import Sampler, split
from libs.sampling.stored import name_beside

POLICY_OF = {"schedule": "schedule", "thresholds": "calibrated"}  # part of the file -> the policy that reads it


@dataclass(frozen=True)
class DepthBench:
    """What samples are made with. Noise seed `seed` is learned from, the next corrects, the one after is reported."""

    sampler: Sampler
    n: int
    seed: int

    @property
    def config(self) -> ConfigDict:
        return self.sampler.config

    @property
    def model(self) -> EarlyExitModel:
        return self.sampler.model

    @cached_property
    def plan(self) -> Plan:
        return self.sampler.plan()

    @property
    def batches(self) -> list[np.ndarray]:
        return split(np.arange(self.n), self.config.sample.mini_batch_size)

    def policy(self, part: str, path: Path) -> ExitPolicy:
        """The policy that reads `part` of the file, with the configured residual correction."""
        policy = EXIT_POLICIES[POLICY_OF[part]](path=str(path))
        return looking_back(policy, residual=self.config.sample.residual, refresh=self.config.sample.refresh)

    def images(self, policy: ExitPolicy, seed: int, n: int | None = None, plan: Plan | None = None) -> list[Images]:
        """The first `n` images, by default of the configured calls."""
        options = dict(plan=plan or self.plan, policy=policy, batch_size=self.config.sample.mini_batch_size)
        return list(self.sampler.images(np.arange(n or self.n), seed=seed, **options))

    def share(self, images: list[Images]) -> float:
        """MACs spent, as a share of full depth."""
        trace = Trace.concatenate([batch.trace for batch in images])
        full = trace.used.shape[0] * trace.used.shape[1] * self.model.macs().at(self.model.depth)
        return float(macs_per_image(trace, self.model.macs()).mean() / full)

    def evidence(self) -> Evidence:
        """Dense runs along full-depth trajectories of all images."""
        rows = [self.dense_batch(ids) for ids in self.batches]
        macs, points = self.model.macs(), self.model.points
        full = macs.at(self.model.depth)
        ask = np.array([macs.ask[k] for k in points[:-1]] + [0]) / full
        ahead = self.model.uem.ahead
        refresh = self.config.sample.refresh
        return Evidence(
            t=self.plan.t.numpy(),
            u=np.concatenate([u for u, _, _ in rows], axis=2),
            loss=np.concatenate([loss for _, loss, _ in rows], axis=2),
            static=np.average([static for _, _, static in rows], axis=0, weights=[len(ids) for ids in self.batches]),
            free=np.array([not refresh or number % refresh > 0 for number in range(self.plan.nfe)]),
            cost=np.array([macs.at(k) for k in points]) / full,
            ask=ask * (not ahead),
            ahead=macs.ask[0] / full if ahead else 0.0,
        )

    def dense_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u, loss (calls, E, B) and static loss (calls, E) of one batch; see `Evidence`."""
        refresh, residual, guidance = self.config.sample.refresh, self.config.sample.residual, self.sampler.guidance
        reach = calibration.reach(self.plan)
        u, losses, statics = [], [], []
        base: torch.Tensor | float = 0.0

        def look(call: DenseCall) -> None:
            nonlocal base
            if residual and call.number % refresh == 0:
                base = call.gap  # what a corrected early output is short of later on
            gap = call.gap - base  # (E, B, C, H, W)
            square, static = gap.square().flatten(3).mean(3), gap  # (E, B, C)
            if guidance.scale:  # eps_guided is linear: what a row's gap counts for in it, by channel
                static = torch.stack([guidance.apply(of_exit) for of_exit in gap])
                square = square * share_of_rows(guidance, gap.shape[2]).to(gap).repeat_interleave(len(ids), dim=0)
            loss, static = square.mean(2), static.square().flatten(1).mean(1)  # (E, B), (E,)
            weight = float(reach[call.number]) ** 2
            u.append(call.u.cpu().numpy())
            losses.append(weight * loss.double().cpu().numpy())
            statics.append(weight * static.double().cpu().numpy())

        sample_dense(self.sampler, ids, look, seed=self.seed, plan=self.plan)
        return np.stack(u).astype(np.float64), np.stack(losses), np.stack(statics)


def share_of_rows(guidance: Guidance, channels: int) -> torch.Tensor:
    """(2, C): the squared weights of the conditional and of the null prediction in the guided one."""
    n = guidance.channels or channels
    share = torch.tensor([[1.0], [0.0]]).repeat(1, channels)
    share[:, :n] = torch.tensor([[(1 + guidance.scale) ** 2], [guidance.scale**2]])
    return share


class DepthSearch:
    """Makes the two parts of a calibration file, and measures each by writing it and running what reads it."""

    def __init__(self, bench: DepthBench, path: Path, facts: dict, n_bins: int):
        self.bench, self.facts = bench, facts
        self.draft = path.with_name(f".{path.name}.draft.part")
        self.seen = bench.evidence()
        self.bins = Bins.of(self.seen.t, n_bins)
        self.floors = {
            "schedule": self.seen.cheapest,
            "thresholds": calibration.cheapest_thresholds(self.seen, self.bins),
        }

    def make(self, part: str, budget: float) -> dict:
        if part == "schedule":
            chosen, spent = calibration.schedule(self.seen.static, self.seen.cost, self.seen.free, budget)
            loss = float(self.seen.static[np.arange(len(chosen)), chosen].sum())
            layers = np.array(self.bench.model.points)[chosen].tolist()
            return {"t": self.seen.t.tolist(), "layers": layers, "open_loop": spent, "loss": loss}
        table, spent = calibration.thresholds(self.seen, self.bins, budget)
        chosen = calibration.exits_taken(self.seen, self.bins, table)  # (calls, B)
        loss = float(np.take_along_axis(self.seen.loss, chosen[:, None], axis=1).mean(2).sum())
        return {"edges": self.bins.edges, "max_u": table.tolist(), "open_loop": spent, "loss": loss}

    def images(self, part: str, content: dict, seed: int, n: int | None = None) -> list[Images]:
        write_json(self.draft, self.facts | {part: content})
        return self.bench.images(self.bench.policy(part, self.draft), seed, n)

    def spends(self, part: str, content: dict) -> float:
        """Closed loop, on the correcting seed. A schedule spends the same on every image: one is enough."""
        n = 1 if part == "schedule" else None
        return self.bench.share(self.images(part, content, self.bench.seed + 1, n))

    def for_budget(self, part: str, budget: float) -> dict:
        return calibration.meet(
            budget,
            self.floors[part],
            lambda target: self.make(part, target),
            lambda content: self.spends(part, content),
        )

    def for_quality(self, part: str, most: float, distance) -> dict:
        """The cheapest content with a `distance` at most a share `most` above full depth's, on the correcting seed.

        Of as many images as an evaluation's: the same loss is a smaller share of the distance of fewer.
        """
        seed, n = self.bench.seed + 1, self.bench.config.sample.n_samples
        full = distance(self.bench.images(EXIT_POLICIES["full"](), seed, n))
        return calibration.cheapest_within(
            most,
            self.floors[part],
            lambda target: self.make(part, target),
            lambda content: distance(self.images(part, content, seed, n)) / full - 1,
        )


def calibrate(config, regime: Regime, run: Run, *, budget=None, max_quality_loss=None, n_images, seed, n_bins) -> dict:
    """Write the calibration file into the run's directory; returns its content."""
    check_calibration(config, run, budget, max_quality_loss, n_images, seed, n_bins)
    bench = DepthBench(Sampler.open(config, regime, run), n_images, seed)
    full_macs = bench.plan.nfe * (1 + (config.sample.scale > 0)) * bench.model.macs().at(bench.model.depth)
    asked = {"budget": budget} if budget is not None else {"max_quality_loss": max_quality_loss}
    path = run.dir / name_beside(config.nnet_path, file_name(config, asked))
    facts = {
        "asked": asked,
        "sampler": {"name": config.sample.algorithm, "steps": config.sample.sample_steps},
        "residual": config.sample.residual,
        "refresh": config.sample.refresh,
        "convention": f"share of the full-depth {CONVENTION}",
        "full_depth_gmacs": full_macs / 1e9,
        "seeds": {"learned": seed, "corrected": seed + 1, "reported": seed + 2},
        **facts_of(bench.sampler, n_images),
    }
    search = DepthSearch(bench, path, facts, n_bins)
    distance = None if max_quality_loss is None else distance_of(config, regime, run)
    n = n_images if distance is None else config.sample.n_samples
    full = bench.images(EXIT_POLICIES["full"](), seed + 2, n)
    try:
        for part in POLICY_OF:
            if distance is None:
                content = search.for_budget(part, budget)
            else:
                content = search.for_quality(part, max_quality_loss, distance)
            facts[part] = content | report(search, part, content, full, distance)
            run.say(f"{part}: " + ", ".join(f"{key} {value:.4g}" for key, value in summary(facts[part]).items()))
    finally:
        search.draft.unlink(missing_ok=True)
    write_json(path, facts)
    return facts | {"path": str(path)}


def facts_of(sampler: Sampler, n_images: int) -> dict:
    """What every file of a calibration says about the network that it is for."""
    return {
        "points": list(sampler.model.points),
        "depth": sampler.model.depth,
        "guidance": asdict(sampler.guidance),
        "n_images": n_images,
        "config_hash": config_hash(sampler),
        "nnet_path": sampler.config.nnet_path,
        **describe_machine(),
    }


def report(search: DepthSearch, part: str, content: dict, full: list[Images], distance) -> dict:
    """What the finished part does on noise seeds that shaped nothing."""
    images = search.images(part, content, search.bench.seed + 2, sum(len(batch.ids) for batch in full))
    paired = Paired(Images.concatenate(full))
    for batch in images:
        paired.update(batch)
    trace = Trace.concatenate([batch.trace for batch in images])
    found = {"closed_loop": search.bench.share(images), "mean_depth": float(trace.used.mean())}
    budget = search.facts["asked"].get("budget")
    if budget is not None:
        found["met"] = bool(abs(found["closed_loop"] - budget) <= 0.02 * budget)
        if not found["met"]:
            costs = np.array([search.bench.model.macs().at(k) for k in search.bench.model.points])
            step = np.diff(costs).max() / costs[-1] / search.bench.plan.nfe
            search.bench.sampler.run.say(
                f"{part}: the budget {budget:g} is missed by more than 2 %: at one call, the next "
                f"exit is up to {step:.4f} of full depth away"
            )
    found |= paired.compute(search.bench.sampler.run)
    if distance is not None:
        most, lost = search.facts["asked"]["max_quality_loss"], distance(images) / distance(full) - 1
        found |= {"quality_loss": lost, "met": bool(lost <= most)}
        if not found["met"]:
            search.bench.sampler.run.say(
                f"{part}: it loses {lost:.4g} and not {most:g} on a noise seed that did not choose it; more images "
                "(sample.n_samples) leave less to chance"
            )
    return found


def summary(part: dict) -> dict[str, float]:
    return {key: value for key, value in part.items() if isinstance(value, float)}


def distance_of(config, regime: Regime, run: Run):
    """images -> Frechet distance to the configured reference."""
    extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
    reference = open_reference(config, regime, extractor, run)

    def distance(images: list[Images]) -> float:
        frechet = Frechet(extractor, reference)
        for batch in images:
            frechet.update(batch)
        return frechet.compute(run)[Frechet.key_of(extractor)]

    return distance


def calls_name(config) -> str:
    """`6-power-2`: the number of calls and their grid, for the names of files that hold for these calls only."""
    words = re.findall(r"[\w.]+", config.sample.grid)
    if len(words) > 2:  # times of one's own
        words = [hashlib.sha256(config.sample.grid.encode()).hexdigest()[:8]]
    return "-".join([str(config.sample.sample_steps), *words])


def file_name(config, asked: dict) -> str:
    ((name, value),) = asked.items()
    parts = [name.replace("_", "-"), f"{value:g}", config.sample.algorithm, calls_name(config)]
    if config.sample.residual or config.sample.refresh:
        parts.append(f"{'residual' if config.sample.residual else 'refresh'}-{config.sample.refresh}")
    return "-".join(parts) + ".json"


def check_calibration(config, run: Run, budget, max_quality_loss, n_images: int, seed: int, n_bins: int) -> None:
    if (budget is None) == (max_quality_loss is None):
        raise ValueError("give either --budget (a share of the full-depth MACs) or --max_quality_loss, not both")
    if max_quality_loss is not None and not max_quality_loss >= 0:
        raise ValueError(f"--max_quality_loss={max_quality_loss:g}: it is a share of full depth's distance, at least 0")
    if n_bins < 1:
        raise ValueError(f"--bins={n_bins}: it must be at least 1")
    if config.sample.residual and not config.sample.refresh:
        raise ValueError("sample.residual is on: calibration needs sample.refresh, which says when it is measured")
    check_images(config, run, n_images, seed)


def check_images(config, run: Run, n_images: int, seed: int) -> None:
    """Refuse images and calls that no calibration may learn from."""
    if config.exit.name == "planned" or config.sample.forecast.every != 1:
        what = "exit.name=planned" if config.exit.name == "planned" else "sample.forecast"
        raise ValueError(f"{what} is set: calibration learns from every call of the configured solver; leave it out")
    if n_images < 1:
        raise ValueError(f"--images={n_images}: it must be at least 1")
    evaluated = {*config.eval.seeds, config.eval.selection_seed}
    if {seed, seed + 1, seed + 2} & evaluated:
        raise ValueError(f"--seed={seed}: it and the next two must not be among the evaluation's {sorted(evaluated)}")
    if run.world > 1:
        raise ValueError(f"calibration runs in one process; {run.world} were started")
