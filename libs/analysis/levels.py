"""The tables of level skipping (Giladi, Meir, Kawar and Elad) on trained networks, beside the published ones.

Does a U-Net that is left early beat fewer DDIM steps at equal seconds? Quality and seconds are measured in one process;
qualities are kept as they come, so that a run that was cut goes on.
"""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from libs import files
from libs.evaluation.measure import Bench
from libs.evaluation.sweep import Method, Point, make_point
from libs.evaluation.timing import time_in_turn, timing_job
from libs.metrics.frechet import Frechet
from libs.report.text import sig
from libs.run import Run, say_progress
from libs.sampling.sampler import Sampler

CS = (0, 1, 2, 3, 5)
STAND_INS = ("zero", "duplicate", "interpolate")
COMPARED = ("plain", *STAND_INS, "control", "matched")  # plain: before fine-tuning; control: fine-tuned at full depth
OURS = 2  # c of the third table, whose network, `matched`, is trained on batches of one k(t), with zeros
PUBLISHED_SAMPLERS = {  # by eta; DDPM has the larger of its two variances, as their numbers at few steps show
    **{eta: ("ddim", {"eta": float(eta)}) for eta in ("0", "0.5", "1")},
    "DDPM": ("ddpm", {"variance": "beta"}),
}
FIRST = "first table"  # eta's place there: DDPM with the smaller one, as its steps are fewer than theirs
CALLS = 20  # of a timing; seconds are proportional to calls, as k(t) takes the same shares of any even grid

# CIFAR-10, as printed in the report: FID at 1,000 DDPM steps; time saved in percent; FID by steps.
PUBLISHED_FID = {
    "plain": (3.17, 16.38, 73.15, 115.09, 143.34),
    "zero": (4.58, 4.46, 5.59, 9.40, 16.19),
    "duplicate": (4.91, 4.55, 7.62, 14.69, 31.79),
    "interpolate": (4.96, 4.71, 5.03, 7.02, 11.47),
}
PUBLISHED_SAVED = {
    "zero": (0, 30.59, 47.52, 51.44, 57.46),
    "duplicate": (0, 32.15, 45.63, 51.99, 58.38),
    "interpolate": (0, 20.86, 29.34, 32.68, 36.19),
}
PUBLISHED_STEPS = {  # eta -> ours with c = 2 at 20, 40, 100, 200, 1000 steps; DDIM at 10, 20, 50, 100, 1000
    "0": ((16.80, 12.48, 9.74, 8.75, 7.79), (13.46, 6.84, 4.67, 4.16, 4.04)),
    "0.5": ((17.96, 12.754, 9.43, 8.23, 6.90), (16.66, 8.35, 5.25, 4.46, 4.29)),
    "1": ((29.00, 18.71, 11.90, 8.92, 6.00), (41.07, 18.36, 8.01, 5.78, 4.73)),
    "DDPM": ((209.72, 124.69, 56.15, 28.01, 4.57), (367.43, 133.37, 32.72, 9.99, 3.17)),
}


@dataclass(frozen=True)
class Setting:
    """One cell: a network, how many levels it bypasses (c), its sampler (`eta`: of PUBLISHED_SAMPLERS, or FIRST)."""

    network: str
    c: int
    eta: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.network}-c{self.c}-eta{self.eta}-{self.steps}"

    def point(self, networks: Mapping[str, Sampler]) -> Point:
        sampler = networks[self.network]
        algorithm, settings = PUBLISHED_SAMPLERS.get(self.eta, ("ddpm", {"variance": "posterior"}))
        config = copy.deepcopy(sampler.config)
        config.sample.update(algorithm=algorithm, grid="")
        config.sample[algorithm].update(settings)
        method = Method("levels", {"c": float(self.c)}, steps=self.steps) if self.c else Method(steps=self.steps)
        return make_point(method, replace(sampler, config=config))


def tables(folder: Path, *, steps: int, ours: Sequence[int], ddim: Sequence[int], images: int, runs: int) -> dict:
    """Measure what the three tables hold, on the runs `folder`/<network>; writes levels.json there.

    Args:
        steps: DDPM steps of the first table.
        ours, ddim: numbers of steps of the third.
        images: per noise seed of eval.seeds.
        runs: rounds of timing.

    Returns:
        {"fid": {cell: mean over seeds}, "seconds": {cell: of a call on one image}, "quality_key", and the arguments}.

    Raises:
        ValueError: a network is missing, or a number of steps is none that DDPM's 1,000 levels allow.
    """
    for name, values in (("images", [images]), ("runs", [runs]), ("steps", [steps, *ours, *ddim])):
        if any(not 1 <= value <= (1_000 if name == "steps" else 10**9) for value in values):
            raise ValueError(f"--{name}: {values} must be at least 1, and steps at most 1000")
    missing = [name for name in COMPARED if not (folder / name / "last.ckpt").exists()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: bash scripts/digits_levels.sh trains them")
    run = Run.single(folder)
    networks = {name: replace(Sampler.load(folder / name, device="cpu"), run=run) for name in COMPARED}
    for sampler in networks.values():
        sampler.config.sample.n_samples = images
    bench = Bench.open(networks["plain"])
    asked = dict(steps=steps, ours=list(ours), ddim=list(ddim), images=images, quality_key=bench.quality_key)
    path = folder / "levels.json"
    found = files.read_json(path, "the kept cells") if path.exists() else {}
    kept = found.get("cells", {})

    cells = [Setting(network, c, FIRST, steps) for network in ("plain", *STAND_INS) for c in CS]
    cells += [Setting("matched", OURS, eta, n) for eta in PUBLISHED_SAMPLERS for n in ours]
    cells += [Setting("control", 0, eta, n) for eta in PUBLISHED_SAMPLERS for n in ddim]
    for cell in say_progress(cells, len(cells), "levels", run):
        point = cell.point(networks)
        key = bench.key(point)
        if kept.get(cell.name, {}).get("key") != key:
            kept[cell.name] = {"key": key, "fid": quality(point, bench)}
            run.write_json(path.name, found | {"cells": kept})

    timed = [Setting(network, c, "0", CALLS) for network in STAND_INS for c in CS]
    timed += [Setting("matched", OURS, "0", CALLS), Setting("control", 0, "0", CALLS)]
    seconds = time_in_turn([timing_job(cell.point(networks)) for cell in timed], runs, run)
    per_call = {f"{c.network}-c{c.c}": statistics.median(s) / CALLS for c, s in zip(timed, seconds, strict=True)}
    result = asked | {"seconds_per_call": per_call, "cells": {cell.name: kept[cell.name] for cell in cells}}
    run.write_json(path.name, result)
    return result


def quality(point: Point, bench: Bench) -> float:
    """Frechet distance, mean over the noise seeds."""
    values = []
    for seed in bench.config.eval.seeds:
        frechet = Frechet(bench.extractor, bench.reference)
        bench.sample(point, seed, [frechet])
        values.append(bench.distance(frechet, point, seed))
    return statistics.fmean(values)


def fid(found: dict, *cell) -> float:
    return found["cells"][Setting(*cell).name]["fid"]


def beaten(found: dict) -> tuple[int, list[str]]:
    """How often early exits beat fewer DDIM steps: cells of ours that are better than every plain cell which takes no
    more seconds; of how many. A cell faster than every plain one has no rival and does not count."""
    per_call, wins, compared = found["seconds_per_call"], [], 0
    plain = [
        (n * per_call["control-c0"], fid(found, "control", 0, eta, n))
        for eta in PUBLISHED_SAMPLERS
        for n in found["ddim"]
    ]
    for eta in PUBLISHED_SAMPLERS:
        for n in found["ours"]:
            seconds, own = n * per_call[f"matched-c{OURS}"], fid(found, "matched", OURS, eta, n)
            rivals = [distance for spent, distance in plain if spent <= seconds]
            compared += bool(rivals)
            if rivals and own < min(rivals):
                wins.append(f"eta {eta}, {n} steps")
    return compared, wins


def markdown(found: dict) -> str:
    """The three tables and the answer; published CIFAR-10 numbers in brackets, where their setting is the same."""
    key, per_call = found["quality_key"], found["seconds_per_call"]
    columns = " | ".join(f"c = {c}" for c in CS)
    lines = [f"{key}, {found['steps']} DDPM steps, {found['images']} images (FID on CIFAR-10, published)", ""]
    lines += [f"| missing | {columns} |", "|---" * (len(CS) + 1) + "|"]
    for network, theirs in PUBLISHED_FID.items():
        ours = [sig(fid(found, network, c, FIRST, found["steps"])) for c in CS]
        cells = [f"{own} ({published})" for own, published in zip(ours, theirs, strict=True)]
        label = "zero, before fine-tuning" if network == "plain" else network
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "Seconds saved, in percent (CIFAR-10, published)", "", f"| missing | {columns} |"]
    lines += ["|---" * (len(CS) + 1) + "|"]
    for network, theirs in PUBLISHED_SAVED.items():
        saved = [100 * (1 - per_call[f"{network}-c{c}"] / per_call[f"{network}-c0"]) for c in CS]
        cells = [f"{s:.0f} ({p:.0f})" for s, p in zip(saved, theirs, strict=True)]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    share = per_call[f"matched-c{OURS}"] / per_call["control-c0"]
    heads = [*(f"ours {n}" for n in found["ours"]), *(f"DDIM {n}" for n in found["ddim"])]
    lines += ["", f"{key} by steps; a step of ours (zero, c = {OURS}) takes {share:.2f} of a plain one's time"]
    lines += ["", f"| eta | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for eta in PUBLISHED_SAMPLERS:
        cells = [sig(fid(found, "matched", OURS, eta, n)) for n in found["ours"]]
        cells += [sig(fid(found, "control", 0, eta, n)) for n in found["ddim"]]
        lines.append(f"| {eta} | {' | '.join(cells)} |")
    for eta, (theirs, plain) in PUBLISHED_STEPS.items():
        lines.append(f"\nPublished, eta {eta}: ours {', '.join(map(str, theirs))} at 20, 40, 100, 200, 1000 steps; ")
        lines[-1] += f"DDIM {', '.join(map(str, plain))} at 10, 20, 50, 100, 1000"
    compared, wins = beaten(found)
    lines += ["", f"Against the best plain sampling of no more seconds: better in {len(wins)} of {compared} cells"]
    return "\n".join(lines) + (f" ({'; '.join(wins)})" if wins else "")
