"""Seconds that scripts.time_together measured in one interleaved run, in place of those of separate evaluations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from libs.report.read import Evaluation, json_object


def timed_together(evaluations: Sequence[Evaluation]) -> list[Evaluation] | None:
    """The evaluations with the seconds of one common run (timing.json), or None if there is no run of all of them.

    Points that this run did not time have no seconds.
    """
    timings = [json_object(evaluation.dir / "timing.json") for evaluation in evaluations]
    if None in timings or len({timing["run"] for timing in timings}) > 1:
        return None

    def retimed(point, timing):
        runs = timing["seconds"].get(point.slug, ())
        seconds = statistics.median(runs) if runs else None
        return replace(
            point,
            seconds=seconds,
            seconds_runs=tuple(runs),
            images_per_s=None if seconds is None else 1 / seconds,
            record=point.record | {key: timing[key] for key in ("device", "threads") if key in timing},
        )

    return [
        replace(e, points=tuple(retimed(p, timing) for p in e.points))
        for e, timing in zip(evaluations, timings, strict=True)
    ]
