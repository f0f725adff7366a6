"""The report: evaluation directories in, one static HTML file out, and its numbers as JSON. Reads files only.

`read` turns files into points, `entries` points into comparable entries, `verdict` entries into sentences, `figures`
into marks, and `page` fills the templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libs.files import atomic_write, write_json
from libs.report.entries import Entry, change, entries, speedup
from libs.report.page import render
from libs.report.read import Evaluation, Point, read
from libs.report.statistics import over_seeds
from libs.report.verdict import (
    RULE,
    TOLERANCE,
    bounds,
    claim,
    fastest_of_each,
    full_depth,
    headline,
    rival_of,
    setting,
    verdicts,
    worth_of_looking,
)

__all__ = ["Entry", "Evaluation", "Point", "entries", "headline", "numbers", "read", "write"]


def write(
    directories: Sequence[str | Path],
    output: str | Path | None = None,
    names: Sequence[str | None] | None = None,
    json_file: str | Path | None = None,
) -> tuple[Path, list[str]]:
    """Write the page on one or more evaluation directories; returns its path and its sentences, the notes last.

    Args:
        directories: folders with results.jsonl; full depth of the first is what seconds are shares of.
        output: where to write; default `<first>/report.html`.
        names: the model that each directory belongs to; None finds out (`libs.report.entries.group`).
        json_file: where to write `numbers` as well.

    Raises:
        ValueError: a file is malformed (the message names file and line), or the directories cannot be compared.
    """
    evaluations = read(directories)
    found, notes = entries(evaluations, names or [None] * len(evaluations))
    tolerance = evaluations[0].tolerance
    tolerance = TOLERANCE if tolerance is None else tolerance
    output = Path(output) if output is not None else Path(directories[0]) / "report.html"
    html = render(evaluations, found, notes, tolerance)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output, "w") as file:
        file.write(html)
    if json_file is not None:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, numbers(found, notes, tolerance))
    said = [*claim(found, tolerance).sentences, *(v.text for v in verdicts(found)), *worth_of_looking(found), *notes]
    return output, said


def numbers(found: Sequence[Entry], notes: Sequence[str], tolerance: float) -> dict[str, Any]:
    """Everything that the page says, for other programs; `points` has a row per setting."""
    several = len({entry.model for entry in found}) > 1
    return {
        "quality_key": found[0].first.quality_key,
        "rule": RULE,
        "headline": headline(found, tolerance),
        "claim": list(claim(found, tolerance).sentences),
        "fastest": [setting(entry) for entry in fastest_of_each(found, tolerance)],
        "controls": worth_of_looking(found),
        "notes": list(notes),
        "verdicts": [
            {
                "budget": v.budget,
                "tone": v.tone,
                "text": v.text,
                "order": [entry.name(several) for entry in v.order],
                "ties": [entry.name(several) for entry in v.ties],
            }
            for v in verdicts(found)
        ],
        "points": [row(entry, found) for entry in found],
    }


def row(entry: Entry, found: Sequence[Entry]) -> dict[str, Any]:
    """One setting: what it is, its quality with interval, and its costs, also relative to its honest rival."""
    full, rival, quality = full_depth(found), rival_of(entry, found), over_seeds(entry.quality)
    over = None if rival is None else speedup(entry, rival)
    against = None if full is None or entry is full else change(entry, full)
    return setting(entry) | {
        "slug": entry.first.slug,
        "n_images": entry.first.record.get("n_images"),
        "trainings": list(entry.trainings),
        "quality_per_seed": [dict(seeds) for seeds in entry.quality],
        "quality": quality.mean,
        "quality_interval": bounds(quality),
        "quality_change": against and against.mean,
        "quality_change_interval": bounds(against),
        "selection": entry.selection,
        "mean_depth": entry.mean_depth,
        "gmacs": entry.gmacs,
        "seconds": entry.seconds,
        "seconds_relative_to_full": entry.cost,
        "seconds_relative_to_best_plain": over and 1 / over.mean,
        "best_plain": rival and rival.label,
    }
