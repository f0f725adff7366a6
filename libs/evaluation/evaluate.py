"""Evaluation: quality, cost and seconds of full depth, early exits and their competitors, from the same seeds."""

from collections.abc import Sequence
from pathlib import Path

from libs.build import check_ranges
from libs.evaluation import records
from libs.evaluation.measure import Bench, FullDepth, check_images_are_ours, measure_point
from libs.evaluation.sweep import Point, points
from libs.evaluation.timing import time_in_turn, timing_job
from libs.evaluation.uncertainty_maps import save_uncertainty_maps
from libs.files import read_json, remove_parts
from libs.regimes import Regime
from libs.run import Run, describe_machine, say_progress, tf32
from libs.sampling.inflight import suits
from libs.sampling.sampler import Sampler


def evaluate(config, regime: Regime, run: Run) -> list[dict]:
    """Measure every point; write results.jsonl, grids, traces and uncertainty maps to the run's directory.

    What an interrupted or an earlier evaluation finished, and nothing that a point depends on has changed since, is not
    measured again. Seconds are measured at the end, all points in turn, so that a drift of the machine's speed hits all
    of them alike.
    """
    check_ranges(config)
    if run.is_main:  # what a killed evaluation left
        images = Path(config.sample.path).glob("*/seed-*") if config.sample.path else ()
        for folder in (*run.dir.glob("points/*"), *images):
            remove_parts(folder)
    run.barrier()
    sampler = Sampler.open(config, regime, run)
    training = records.training_of(config)
    todo = points(sampler)
    bench = Bench.open(sampler)
    for point in todo:
        check_unseen(point)
        check_images_are_ours(point)
    run.barrier()  # nobody may write while others still look
    say_lockstep(todo, run)

    folder = run.dir / "points"
    full = FullDepth(todo[0], folder / todo[0].slug, bench.key(todo[0]))
    measured = [
        measure_point(point, bench, full, folder / point.slug)
        for point in say_progress(todo, len(todo), "evaluate", run)
    ]
    lines: list[dict] = []
    if run.is_main:
        seconds = time_in_turn([timing_job(point) for point in todo], config.eval.timing_runs, run)
        machine = describe_machine() | {"weights": sampler.weights}
        lines = [records.result_line(p, m, s, machine) for p, m, s in zip(todo, measured, seconds, strict=True)]
        (run.dir / "timing.json").unlink(missing_ok=True)  # of scripts.time_together, for older results
        records.keep_training(training, run)
        chosen = {"mixed_precision": run.precision, "tf32": tf32()}  # not by the config alone
        run.write_json("config.json", config.to_dict() | chosen)
        records.write_results(lines, run)
        said = records.claim_of(lines, run)
        records.write_results(lines, run)
        save_uncertainty_maps(sampler, run.dir / "umaps.npz", config.eval.seeds[0])
        run.say(records.summary_lines(lines, said))
    run.barrier()
    return lines


def check_unseen(point: Point) -> None:
    """ValueError where noise seeds that chose a point's plan, schedule or gates are to be reported."""
    path = str(point.exit.get("path", ""))
    made = read_json(path, f"exit.{point.exit['name']}.path").get("seeds", {}) if path.endswith(".json") else {}
    chose = [seed for use, seed in made.items() if use != "reported"] if isinstance(made, dict) else []
    if seen := [seed for seed in point.sampler.config.eval.seeds if seed in chose]:
        raise ValueError(f"eval.seeds has {seen}, with which {path} was made: report other noise seeds")


def say_lockstep(todo: Sequence[Point], run: Run) -> None:
    lockstep = [point.label for point in todo if not suits(point.sampler.model, point.policy, point.sampler.guidance)]
    if todo[0].sampler.config.sample.inflight and lockstep:
        run.say(f"note: sample.inflight has no effect on {', '.join(lockstep)}: these run in lockstep")
