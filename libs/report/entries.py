"""From evaluation directories to comparable entries: one per model and point, over training seeds and noise seeds.

A model is a network with a way of training it; its runs are training seeds. One evaluation is one model with one run.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

from libs.report.families import BASELINES, PLAIN
from libs.report.read import Evaluation, Result, json_object, positive
from libs.report.statistics import Estimate, difference, over_seeds, ratio

# Settings that do not make another model: which seed and files, how it is sampled, how it is measured.
NOT_THE_MODEL = ("seed", "nnet_path", "pretrained_weight", "sample", "exit", "eval", "cpu", "tracker", "tf32")
UNIFORM = ("", "time_uniform", "power:1", "power:1.0")  # `sample.grid` of evenly spaced calls


@dataclass(frozen=True, eq=False)
class Entry:
    """One point of one model: `points[i]` is its measurement with the weights of training run i."""

    model: str
    points: tuple[Result, ...]
    trainings: tuple[int | None, ...]  # training seeds, where known
    scale: tuple[float | None, ...]  # per run: what turns seconds into shares of the reference's full-depth seconds
    where: str = ""  # calls and grid, if another point of the model has the same label

    @property
    def first(self) -> Result:
        return self.points[0]

    @property
    def family(self) -> str:
        return self.first.family

    @property
    def label(self) -> str:
        return self.first.label + self.where

    @property
    def method(self) -> tuple[str, str]:
        """Entries of one method differ in its settings alone."""
        return self.model, self.family

    @property
    def early(self) -> bool:
        return self.family not in BASELINES

    @property
    def plain(self) -> bool:
        """All layers at every call: the network as anybody would sample it."""
        return self.family in PLAIN

    @property
    def evenly_spaced(self) -> bool:
        """Whether the calls are evenly spaced in time; records without a grid were made before there were others."""
        return self.grid in UNIFORM

    @property
    def grid(self) -> str:
        return str((self.first.record.get("sampler") or {}).get("grid") or "")

    @property
    def placement(self) -> str:
        """`20 evenly spaced calls`, `7 calls on power:2.5`, `5 calls of its plan`"""
        n = self.first.nfe
        if planned(self.first):
            return f"{n} calls of its plan"
        return f"{n} evenly spaced calls" if self.evenly_spaced else f"{n} calls on {self.grid}"

    @cached_property
    def quality(self) -> tuple[dict[int, float], ...]:
        """Per training run: noise seed -> distance, smaller is better."""
        return tuple(by_seed(point) for point in self.points)

    @cached_property
    def mean(self) -> float:
        return over_seeds(self.quality).mean

    @cached_property
    def selection(self) -> float | None:
        """Distance on the noise seed that chooses settings, mean over runs."""
        return mean([p.metric(f"{p.quality_key}_selection") for p in self.points])

    @property
    def choosing(self) -> float:
        """What settings are chosen by: the selection seed, or the reported ones where a file has no other."""
        return self.mean if self.selection is None else self.selection

    @cached_property
    def seconds(self) -> float | None:
        """Per image as measured."""
        return mean([p.seconds for p in self.points])

    @cached_property
    def cost(self) -> float | None:
        """Share of the reference's full-depth seconds: one over the speed-up that a page quotes."""
        shares = [p.pace * k for p, k in zip(self.points, self.scale, strict=True) if None not in (p.pace, k)]
        return geometric_mean(shares) if len(shares) == len(self.points) else None

    @cached_property
    def gmacs(self) -> float | None:
        return mean([p.gmacs for p in self.points])

    @cached_property
    def mean_depth(self) -> float | None:
        return mean([p.mean_depth for p in self.points])

    def name(self, several_models: bool) -> str:
        return f"{self.label} · {self.model}" if several_models else self.label


def planned(point: Result) -> bool:
    """Whether a file decided the calls, so that they differ between training runs of one setting."""
    return (point.record.get("exit") or {}).get("name") == "planned"


def mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else fmean(values)


def by_seed(p: Result) -> dict[int, float]:
    values = p.quality_per_seed or (p.quality,)
    seeds = p.record.get("seeds", [])
    return dict(zip(seeds if len(seeds) == len(values) else range(len(values)), values, strict=True))


def gap(a: Entry, b: Entry) -> Estimate | None:
    """Distance of a minus that of b; None for unequal numbers of images, as a Fréchet distance falls with the number.

    Paired where both come from the same training seeds: these share initial weights, order of the data and noise.
    """
    if n_images(a) != n_images(b):
        return None
    same = a.model == b.model or (None not in a.trainings and a.trainings == b.trainings)
    return difference(a.quality, b.quality, same)


def change(a: Entry, b: Entry) -> Estimate | None:
    """`gap` as a share of b's distance."""
    found = gap(a, b)
    return None if found is None or not b.mean else found.map(lambda value: value / abs(b.mean))


def n_images(entry: Entry) -> set:
    return {p.record.get("n_images") for p in entry.points}


def speedup(a: Entry, b: Entry) -> Estimate | None:
    """How many times as fast as b a is; None where their seconds were not measured or cannot be compared."""
    if a.cost is None or b.cost is None:
        return None
    if a is b:
        return Estimate(1.0)
    runs = [
        [[s * scale for s in p.seconds_runs or (p.seconds,)] for p, scale in zip(e.points, e.scale, strict=True)]
        for e in (b, a)
    ]
    found = ratio(*runs, paired=a.first.timed_with == b.first.timed_with)
    return replace(found, mean=b.cost / a.cost) if found.low is None else found


# ---- models and their runs -----------------------------------------------------------------------------------------


def by_model(evaluations: Sequence[Evaluation], named: Sequence[str | None]) -> dict[str, list[list[Evaluation]]]:
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


def entries(evaluations: Sequence[Evaluation], named: Sequence[str | None]) -> tuple[list[Entry], list[str]]:
    """Every point that all runs of its model have, and notes on what a reader must know.

    `named[i]` is the model that evaluation i belongs to; None finds out.
    """
    together = timed_together(evaluations) or (list(evaluations) if len(evaluations) == 1 else None)
    models = by_model(together or evaluations, named)
    scales, notes = costs(models, together is not None)
    found = []
    for model, runs in models.items():
        tables = [by_identity(run) for run in runs]  # key -> (point, evaluation)
        for key in tables[0]:
            if all(key in others for others in tables):
                cells = [others[key] for others in tables]
                seeds = tuple((json_object(e.dir / "training.json") or {}).get("seed") for _, e in cells)
                found.append(
                    Entry(model, tuple(p for p, _ in cells), seeds, tuple(scales[str(e.dir)] for _, e in cells))
                )
        missing = {key[1] for others in tables for key in others if not all(key in one for one in tables)}
        if missing:
            notes.append(f"Left out, as not every run of {model} has them: {', '.join(sorted(missing))}.")
    if not found:
        raise ValueError(f"{', '.join(str(e.dir) for e in evaluations)}: no point was measured in all of them")
    for tell in (lambda e: e.placement, lambda e: settings_words(e.first)):  # what tells points of one label apart
        labels = Counter((e.model, e.label) for e in found)
        found = [e if labels[e.model, e.label] == 1 else replace(e, where=f"{e.where}, {tell(e)}") for e in found]
    return found, notes + warnings([p for e in found for p in e.points])


def by_identity(run: Sequence[Evaluation]) -> dict[tuple, tuple[Result, Evaluation]]:
    """The points of one training run by what identifies them; where two evaluations have one, the first counts."""
    cells: dict[tuple, tuple[Result, Evaluation]] = {}
    for evaluation in run:
        for p in evaluation.points:
            solver = () if planned(p) else (str(p.record.get("sampler", {})), p.nfe)
            key = (p.family, p.label, p.slug, *solver, str(p.record.get("guidance")), str(exit_of(p)))
            cells.setdefault(key, (p, evaluation))
    return cells


def exit_of(p: Result) -> dict:
    """The settings of the exit policy; a file by its name, without the weights' in front of a plan's."""
    settings = dict(sorted((p.record.get("exit") or {}).items()))
    if path := settings.get("path"):
        file = Path(str(path))
        name = file.parent.name if file.stem in ("trace", "last") else file.name
        settings["path"] = re.sub(r"^.*-(?=plan-)", "", name)
    return settings


def settings_words(p: Result) -> str:
    """Everything about how a point is sampled, in words."""
    solver = {} if planned(p) else p.record.get("sampler") or {}
    found = {k: v for k, v in {**exit_of(p), **solver}.items() if k not in ("name", "steps", "grid")}
    return ", ".join(f"{key} {value}" for key, value in found.items()) or "other settings"


def warnings(points: Sequence[Result]) -> list[str]:
    """What makes two points of a page incomparable."""
    notes = []
    for keys, what in (
        (("n_images",), "Distances of unequal numbers of images are not compared."),
        (("seeds",), "Only the noise seeds that two points share are compared."),
        (("device", "threads", "batch_size", "precision", "float32_products"), "Their seconds are not comparable."),
        (("commit",), "They were made by different code."),
    ):
        for key in keys:
            values = sorted({str(p.record[key]) for p in points if key in p.record})
            if len(values) > 1:
                notes.append(f"Points differ in {key} ({', '.join(values)}). {what}")
    if any(p.metric(f"{p.quality_key}_selection") is None for p in points):
        notes.append("Some points lack a selection seed: their settings are chosen on the seeds that are reported.")
    return notes


# ---- seconds of different evaluations ------------------------------------------------------------------------------


def timed_together(evaluations: Sequence[Evaluation]) -> list[Evaluation] | None:
    """The evaluations with the seconds of one interleaved run (timing.json of scripts.time_together), if there is one.

    None where not all of them took part in it. Points that it did not time have no seconds.
    """
    timings = [json_object(evaluation.dir / "timing.json") for evaluation in evaluations]
    if None in timings or len({str(timing.get("run")) for timing in timings}) > 1:
        return None

    def retimed(point: Result, timing: dict) -> Result:
        runs = positive(timing.get("seconds", {}), point.slug, point.dir / "timing.json")
        machine = {key: timing[key] for key in ("device", "threads", "float32_products") if key in timing}
        seconds = median(runs) if runs else None
        record = point.record | machine
        return replace(point, seconds=seconds, seconds_runs=runs, timed_with=str(timing.get("run")), record=record)

    return [
        replace(e, points=tuple(retimed(p, timing) for p in e.points))
        for e, timing in zip(evaluations, timings, strict=True)
    ]


def costs(models: dict[str, list[list[Evaluation]]], together: bool) -> tuple[dict[str, float | None], list[str]]:
    """Per evaluation directory, what turns its seconds into a share of the reference's full-depth seconds.

    Points of one evaluation were timed in turn, those of two were not. A network that is the reference's is therefore
    divided by its own full-depth seconds; another network has only the clock, and only on the same machine.
    """
    evaluations = [(model, e) for model, runs in models.items() for run in runs for e in run]
    reference = full_of(evaluations[0][1])
    if reference is None or reference.pace is None:
        return {str(e.dir): None for _, e in evaluations}, []
    if together:  # the mean over its runs is what counts as 1
        first = next(iter(models.values()))
        seconds = geometric_mean([full.pace for run in first if (full := full_of(run[0])) and full.pace])
        return {str(e.dir): 1 / seconds for _, e in evaluations}, []
    same = [full for _, e in evaluations if (full := full_of(e)) and same_network(full, reference)]
    alike = [f.pace * reference.gmacs / f.gmacs for f in same if machine_of(f) == machine_of(reference)]
    seconds = geometric_mean(alike or [reference.pace])
    scales: dict[str, float | None] = {}
    other, unknown = [], []
    for model, e in evaluations:
        full = full_of(e)
        scales[str(e.dir)] = None
        if full is not None and same_network(full, reference):
            scales[str(e.dir)] = full.gmacs / reference.gmacs / full.pace
        elif machine_of(e.points[0]) == machine_of(reference):
            scales[str(e.dir)] = 1 / seconds
            other.append(model)
        else:
            unknown.append(model)
    notes = [
        f"The seconds come from {len(evaluations)} evaluations, not from one interleaved run: each is divided by its "
        "own full-depth seconds. scripts.time_together measures them in one."
    ]
    if other:
        notes.append(
            f"{', '.join(dict.fromkeys(other))}: not the network of {evaluations[0][0]}, or without a timed full-depth "
            "point. Seconds are compared as the clock had them, with any drift of the machine in between."
        )
    if unknown:
        notes.append(
            f"{', '.join(dict.fromkeys(unknown))}: another network on another device, with other threads or another "
            "batch size. Its seconds are not compared."
        )
    return scales, notes


def full_of(evaluation: Evaluation) -> Result | None:
    return next((point for point in evaluation.points if point.family == "full"), None)


def same_network(full: Result, reference: Result) -> bool:
    """Whether two timed full-depth points cost the same per network call."""
    if full.pace is None or not full.gmacs or not reference.gmacs or full.depth != reference.depth:
        return False
    return math.isclose(full.gmacs / full.nfe, reference.gmacs / reference.nfe, rel_tol=1e-6)


def machine_of(point: Result) -> tuple:
    keys = ("device", "threads", "batch_size", "float32_products")
    return tuple(str(point.record.get(key)) for key in keys)
