"""Seconds per image, in turn: what slows the machine for a while hits everything that is compared."""

import json
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from libs import regimes
from libs.evaluation.sweep import Point, points
from libs.files import read_json, read_lines, write_json
from libs.run import Alone, Run, describe_machine, hold, say_progress, set_tf32
from libs.sampling.inflight import IN_FLIGHT
from libs.sampling.sampler import Sampler


def timing_job(point: Point) -> Callable[[], float]:
    """Generates a batch of `eval.timing_batch` images, in this process alone; returns the seconds per image.

    With `sample.inflight`, which is for more images than a batch, it is as many batches as are on their way at once.
    """
    sampler, config = point.sampler, point.sampler.config
    alone = replace(point, sampler=replace(sampler, run=Alone(sampler.run.device, sampler.run.precision)))
    size, inflight = config.eval.timing_batch, config.sample.inflight
    ids = np.arange(size * (IN_FLIGHT if inflight else 1))

    options = dict(seed=config.eval.selection_seed, batch_size=size, inflight=inflight)
    return timed(lambda: list(alone.images(ids, **options)), len(ids))  # to the CPU


def timed(work: Callable[[], Any], n: int = 1) -> Callable[[], float]:
    """`work` as a job of `time_in_turn`: does it, and returns the seconds per image, of which it makes `n`."""

    def job() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / n

    return job


def time_in_turn(jobs: Sequence[Callable[[], float]], n_runs: int, run: Run) -> list[list[float]]:
    """One warm-up each, then `n_runs` rounds through all jobs."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in say_progress(range(n_runs + 1), n_runs + 1, "seconds", run):
        for job, runs in zip(jobs, seconds, strict=True):
            spent = job()
            if number:
                runs.append(spent)
    return seconds


def time_together(directories: Sequence[Path], n_runs: int) -> dict[str, dict[str, float]]:
    """Time the points of several evaluations in one run; writes timing.json into each directory.

    Returns:
        directory -> slug -> median seconds per image.

    Raises:
        ValueError: a directory without config.json, in use, or evaluations whose seconds are not alike.
    """
    configs = [ConfigDict(read_json(directory / "config.json", "the evaluation")) for directory in directories]
    for directory, config in zip(directories, configs, strict=True):
        if missing := [key for key in ("cpu", "mixed_precision", "nnet_path", "sample", "eval") if key not in config]:
            raise ValueError(f"{directory}/config.json has no {', '.join(missing)}: it is of no evaluation")
    alike = [(c.cpu, c.mixed_precision, c.eval.timing_batch, c.get("tf32", False)) for c in configs]
    if len(set(alike)) > 1:
        raise ValueError(
            "the evaluations differ in cpu, mixed_precision, eval.timing_batch or --tf32; such seconds are not alike"
        )
    locks = [hold(directory) for directory in directories]  # kept until the end
    set_tf32(alike[0][-1])
    run = Alone("cpu" if configs[0].cpu else None, configs[0].mixed_precision or "no")
    places, jobs = [], []
    for config, directory in zip(configs, directories, strict=True):
        todo = points(Sampler.open(config, regimes.of(config), run))
        check_same(todo, directory)
        for point in todo:
            jobs.append(timing_job(point))
            places.append((directory, point.slug))
    seconds = time_in_turn(jobs, n_runs, run)
    timing = {"run": uuid.uuid4().hex, **describe_machine()}
    found: dict[str, dict[str, float]] = {}
    for directory in directories:
        own = {slug: runs for (place, slug), runs in zip(places, seconds, strict=True) if place == directory}
        write_json(directory / "timing.json", {**timing, "seconds": own})
        found[str(directory)] = {slug: statistics.median(runs) for slug, runs in own.items()}
    for lock in locks:
        lock.release()
    return found


def check_same(todo: Sequence[Point], directory: Path) -> None:
    """Refuse to time other weights or calls than results.jsonl measured: a plan may have been made anew since."""
    lines = read_lines(directory / "results.jsonl", "the results of the evaluation")
    try:
        measured = {line["slug"]: line for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory}/results.jsonl is damaged: evaluate again first") from None
    for point in todo:
        now = {"weights": point.sampler.weights, "nfe": point.plan.nfe, **point.solver}
        line = measured.get(point.slug, {})
        then = line | (line.get("sampler") or {})  # records of earlier versions say less
        changed = [key for key, value in now.items() if key in then and then[key] != value]
        if changed or not line:
            raise ValueError(
                f"{directory}: the point {point.slug} is not as it was measured ({', '.join(changed) or 'no result'}): "
                "evaluate again first"
            )
