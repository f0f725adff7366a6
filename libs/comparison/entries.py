"""From evaluation directories to comparable entries: one per model and point, over training seeds and noise seeds.

A model is a network with a way of training it; its runs are training seeds. Seconds become a share of what full depth
of the first model costs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from libs.report.read import Evaluation, Point, json_object
from libs.report.verdict import BASELINES, full_depth

# Settings that do not make another model: which seed and files, how it is sampled, how it is measured.
NOT_THE_MODEL = ("seed", "nnet_path", "pretrained_weight", "sample", "exit", "eval", "cpu", "tracker")
# Student's t for a two-sided 95 % interval, by degrees of freedom from 1; beyond the table, 2.1 is on the safe side.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error: None, with 0 degrees of freedom, where one seed is all there is."""

    mean: float
    error: float | None
    freedom: int

    @property
    def margin(self) -> float | None:
        """Half the 95 % confidence interval."""
        if self.error is None:
            return None
        return self.error * (STUDENT[self.freedom - 1] if self.freedom <= len(STUDENT) else 2.1)

    @property
    def clear(self) -> bool | None:
        """Whether zero lies outside the interval."""
        return None if self.margin is None else abs(self.mean) > self.margin


@dataclass(frozen=True)
class Entry:
    """One point of one model."""

    model: str
    family: str
    label: str
    slug: str  # the label as a folder's name
    sampler: str
    steps: int
    depth: int  # K
    quality: tuple[dict[int, float], ...]  # per training run: noise seed -> distance, smaller is better
    trainings: tuple[int | None, ...]  # their training seeds, where known
    selection: float | None  # distance on the noise seed that chooses settings, mean over runs
    seconds: float | None  # per image as measured, mean over runs
    cost: float | None  # share of the reference's full-depth seconds
    gmacs: float | None
    mean_depth: float | None

    @property
    def method(self) -> tuple[str, str]:
        """Entries of one method differ in its settings alone."""
        return self.model, self.family

    @property
    def early(self) -> bool:
        return self.family not in BASELINES

    @property
    def mean(self) -> float:
        return estimate(self.quality).mean

    def name(self, several_models: bool) -> str:
        """`“threshold 0.98, residual, refresh 4 · B”`: quoted, as it holds commas."""
        return f"“{self.label} · {self.model}”" if several_models else f"“{self.label}”"


def estimate(quality: Sequence[dict[int, float]]) -> Estimate:
    """Over training runs where there are several (noise seeds averaged within each), else over noise seeds."""
    runs = [statistics.fmean(seeds.values()) for seeds in quality]
    values = runs if len(runs) > 1 else list(quality[0].values())
    if len(values) < 2:
        return Estimate(runs[0], None, 0)
    return Estimate(statistics.fmean(runs), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def difference(a: Entry, b: Entry) -> Estimate:
    """a - b. Paired by run and noise seed where both have the same runs or training seeds; else of independent means.

    Models of one training seed share their initial weights, the order of the data and the noise.
    """
    if a.model == b.model or (None not in a.trainings and a.trainings == b.trainings):
        paired = [
            {seed: one[seed] - two[seed] for seed in one.keys() & two.keys()}
            for one, two in zip(a.quality, b.quality, strict=True)
        ]
        if all(paired):
            return estimate(paired)
    one, two = estimate(a.quality), estimate(b.quality)
    if one.error is None or two.error is None:
        return Estimate(one.mean - two.mean, None, 0)
    return Estimate(one.mean - two.mean, math.hypot(one.error, two.error), min(one.freedom, two.freedom))


# ---- models and their runs -----------------------------------------------------------------------------------------


def group(evaluations: Sequence[Evaluation], named: Sequence[str | None]) -> dict[str, list[list[Evaluation]]]:
    """Model name -> training runs -> evaluations of each run.

    Evaluations of the same name are one model. Without a name, they are if they were trained with the same settings but
    for the seed; a seed met again with other weights is another model, as nothing says what else differs.
    """
    models: dict[str, list[list[Evaluation]]] = {}
    seeds: dict[str, dict[Any, str]] = {}  # settings -> training seed -> weights, of unnamed models
    names: dict[str, str] = {}
    for evaluation, name in zip(evaluations, named, strict=True):
        weights = weights_of(evaluation)
        if name is None:
            trained = json_object(evaluation.dir / "training.json") or evaluation.config or {"dir": str(evaluation.dir)}
            key = json.dumps({k: v for k, v in trained.items() if k not in NOT_THE_MODEL}, sort_keys=True)
            seed = trained.get("seed")
            if seeds.setdefault(key, {}).setdefault(seed, weights) != weights:
                key = f"{key} {weights}"
            name = names.setdefault(key, evaluation.name)
        runs = models.setdefault(name, [])
        same = next((run for run in runs if weights_of(run[0]) == weights), None)
        runs.append([evaluation]) if same is None else same.append(evaluation)
    return models


def weights_of(evaluation: Evaluation) -> str:
    """What tells a training run from another: its weights' content, or the directory where that is not recorded."""
    return str(evaluation.points[0].record.get("weights", evaluation.dir))


def entries(models: dict[str, list[list[Evaluation]]], together: bool) -> tuple[list[Entry], list[str]]:
    """Every point that all runs of its model have, and notes on what a reader must know.

    `together`: all seconds come from one interleaved run.
    """
    shares, notes = costs(models, together)
    found = []
    for model, runs in models.items():
        tables = [table(run) for run in runs]  # key -> (point, evaluation)
        for key in tables[0]:
            if not all(key in others for others in tables):
                continue
            cells = [others[key] for others in tables]
            seeds = [(json_object(e.dir / "training.json") or {}).get("seed") for _, e in cells]
            found.append(entry(model, [p for p, _ in cells], seeds, [shares[str(e.dir)] for _, e in cells]))
        missing = {key[1] for others in tables for key in others if not all(key in one for one in tables)}
        if missing:
            notes.append(f"Left out, as not every run of {model} has them: {', '.join(sorted(missing))}.")
    return found, notes


def table(run: Sequence[Evaluation]) -> dict[tuple, tuple[Point, Evaluation]]:
    """The points of one training run by what identifies them; where two evaluations have one, the first counts."""
    cells: dict[tuple, tuple[Point, Evaluation]] = {}
    for evaluation in run:
        for p in evaluation.points:
            sampler = p.record.get("sampler", {})
            key = (p.family, p.label, sampler.get("name"), p.nfe, str(p.record.get("guidance")))
            cells.setdefault(key, (p, evaluation))
    return cells


def entry(model: str, points: Sequence[Point], seeds: Sequence[int | None], shares: Sequence[float | None]) -> Entry:
    first = points[0]

    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else statistics.fmean(values)

    def by_seed(p: Point) -> dict[int, float]:
        values = p.quality_per_seed or (p.quality,)
        seeds = p.record.get("seeds", [])
        return dict(zip(seeds if len(seeds) == len(values) else range(len(values)), values, strict=True))

    timed = [(p.seconds, share) for p, share in zip(points, shares, strict=True)]
    return Entry(
        model=model,
        family=first.family,
        label=first.label,
        slug=first.slug,
        sampler=str(first.record.get("sampler", {}).get("name", "not recorded")),
        steps=first.nfe,
        depth=first.depth,
        quality=tuple(by_seed(p) for p in points),
        trainings=tuple(seeds),
        selection=mean([p.metric(f"{p.quality_key}_selection") for p in points]),
        seconds=mean([p.seconds for p in points]),
        cost=mean([None if None in both else both[0] * both[1] for both in timed]),
        gmacs=mean([p.gmacs for p in points]),
        mean_depth=mean([p.mean_depth for p in points]),
    )


# ---- seconds of different evaluations ------------------------------------------------------------------------------


def costs(models: dict[str, list[list[Evaluation]]], together: bool) -> tuple[dict[str, float | None], list[str]]:
    """Per evaluation directory, what turns its seconds into a share of the reference's full-depth seconds.

    Points of one evaluation were timed in turn, those of two were not. A network that is the reference's is therefore
    divided by its own full-depth seconds; another network has only the clock, and only on the same machine.
    """
    evaluations = [(model, e) for model, runs in models.items() for run in runs for e in run]
    reference = full_depth(evaluations[0][1].points)
    if reference is None or reference.seconds is None or not reference.gmacs:
        raise ValueError(f"{evaluations[0][1].dir}: the first directory needs a timed full-depth point to compare with")
    if together:  # the mean over its runs is what counts as 1
        first = next(iter(models.values()))
        seconds = statistics.fmean(full.seconds for run in first if (full := full_depth(run[0].points)))
        return {str(e.dir): 1 / seconds for _, e in evaluations}, []
    same = [full for _, e in evaluations if (full := full_depth(e.points)) and same_network(full, reference)]
    seconds = statistics.fmean(f.seconds * reference.gmacs / f.gmacs for f in same if machine(f) == machine(reference))
    shares: dict[str, float | None] = {}
    other, unknown = [], []
    for model, e in evaluations:
        full = full_depth(e.points)
        shares[str(e.dir)] = None
        if full is not None and same_network(full, reference):
            shares[str(e.dir)] = full.gmacs / reference.gmacs / full.seconds
        elif machine(e.points[0]) == machine(reference):
            shares[str(e.dir)] = 1 / seconds
            other.append(model)
        else:
            unknown.append(model)
    notes = []
    if len(evaluations) > 1:
        notes.append(
            f"The seconds come from {len(evaluations)} evaluations, not from one interleaved run: each is divided by "
            "its own full-depth seconds, so that a machine that was slower during one of them cancels. "
            "scripts.time_together would measure them in one."
        )
    if other:
        notes.append(
            f"{', '.join(dict.fromkeys(other))}: not the network of {evaluations[0][0]}, or without a timed full-depth "
            "point. Seconds are compared as the clock had them, and a drift of the machine in between is not removed."
        )
    if unknown:
        notes.append(
            f"{', '.join(dict.fromkeys(unknown))}: another network on another device, with other threads or another "
            "batch size. Its seconds are not compared."
        )
    return shares, notes


def same_network(full: Point, reference: Point) -> bool:
    """Whether two timed full-depth points cost the same per network call."""
    if full.seconds is None or not full.gmacs or full.depth != reference.depth:
        return False
    return math.isclose(full.gmacs / full.nfe, reference.gmacs / reference.nfe, rel_tol=1e-6)


def machine(point: Point) -> tuple:
    return tuple(str(point.record.get(key)) for key in ("device", "threads", "batch_size"))
