"""Time the points of several evaluations in one interleaved run, so that their seconds can be compared.

    python -m scripts.time_together runs/excess-0/eval runs/small-0/eval
    python -m scripts.compare runs/excess-0/eval runs/small-0/eval

Seconds within one evaluation are measured in turn; those of two evaluations are not, and the machine may have been
slower during one of them. Loads every directory's config and weights, measures nothing but seconds, and writes
timing.json into each directory; scripts.compare uses it where all its directories were timed together.
"""

import argparse
import json
import statistics
import uuid
from pathlib import Path

from ml_collections import ConfigDict

import utils
from libs import regimes
from libs.evaluation.evaluate import load_model, time_in_turn, timing_job
from libs.evaluation.sweep import points
from libs.run import Run, describe_machine


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.time_together",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="directory with config.json of an evaluation")
    parser.add_argument("--runs", type=int, default=5, help="rounds through all points, after one to warm up")
    args = parser.parse_args(argv)
    try:
        if args.runs < 1:
            raise ValueError(f"--runs={args.runs}: at least 1 is needed")
        print(json.dumps(time_together([Path(text) for text in args.directories], args.runs)))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def time_together(directories: list[Path], n_runs: int) -> dict[str, dict[str, float]]:
    """Directory -> slug -> median seconds per image."""
    configs = [ConfigDict(json.loads((directory / "config.json").read_text())) for directory in directories]
    if len({(config.cpu, config.mixed_precision, config.eval.timing_batch) for config in configs}) > 1:
        raise ValueError(
            "the evaluations differ in cpu, mixed_precision or eval.timing_batch; such seconds are not alike"
        )
    accelerator = utils.make_accelerator(configs[0], directories[0])
    jobs, places = [], []
    for config, directory in zip(configs, directories, strict=True):
        run, regime = Run(directory, accelerator), regimes.of(config)
        model = load_model(config, run)
        for point in points(config, model, regime):
            jobs.append(timing_job(point, model, config, regime, run))
            places.append((directory, point.slug))
    seconds = time_in_turn(jobs, n_runs, run)
    timing = {"run": uuid.uuid4().hex, **describe_machine()}
    for directory in directories:
        own = {slug: runs for (place, slug), runs in zip(places, seconds, strict=True) if place == directory}
        Run(directory, accelerator).write_json("timing.json", {**timing, "seconds": own})
    found: dict[str, dict[str, float]] = {}
    for (directory, slug), runs in zip(places, seconds, strict=True):
        found.setdefault(str(directory), {})[slug] = statistics.median(runs)
    return found


if __name__ == "__main__":
    main()
