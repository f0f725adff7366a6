"""The report: evaluation directories in, one static HTML file out, and its numbers as JSON. Reads files only.

`read` turns files into points, `entries` points into comparable entries, `verdict` entries into sentences, `figures`
into marks, and `page` fills the templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libs.files import write_file, write_json
from libs.report.entries import Entry, change, entries, speedup
from libs.report.page import render
from libs.report.read import Evaluation, Result, read_evaluations
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


@dataclass(frozen=True)
class Report:
    """One or many evaluations, read and made comparable."""

    evaluations: Sequence[Evaluation]
    entries: Sequence[Entry]
    notes: Sequence[str]
    tolerance: float  # how much worse than full depth the recommended point may be

    def write(self, output: str | Path) -> Path:
        """Write the page, complete or not at all."""
        html = render(self.evaluations, self.entries, self.notes, self.tolerance)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_file(output, html)
        return Path(output)

    def write_numbers(self, output: str | Path) -> None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(output, self.numbers())

    def sentences(self) -> list[str]:
        """The claim, who wins at equal seconds, what looking at the images is worth, and the notes."""
        said = claim(self.entries, self.tolerance).sentences
        won = [verdict.text for verdict in verdicts(self.entries)]
        return [*said, *won, *worth_of_looking(self.entries), *self.notes]

    def numbers(self) -> dict[str, Any]:
        """What the page says, for other programs; `points` has a row per setting."""
        found = self.entries
        several = len({entry.model for entry in found}) > 1
        return {
            "dataset": ((self.evaluations[0].config or {}).get("dataset") or {}).get("name"),
            "commit": found[0].first.record.get("commit"),
            "quality_key": found[0].first.quality_key,
            "rule": RULE,
            "headline": headline(found, self.tolerance),
            "claim": list(claim(found, self.tolerance).sentences),
            "fastest": [setting(entry) for entry in fastest_of_each(found, self.tolerance)],
            "controls": worth_of_looking(found),
            "notes": list(self.notes),
            "verdicts": [
                {"budget": v.budget, "tone": v.tone, "text": v.text}
                | {key: [entry.name(several) for entry in getattr(v, key)] for key in ("order", "ties")}
                for v in verdicts(found)
            ],
            "points": [row(entry, found) for entry in found],
        }


def load_report(directories: Sequence[str | Path], names: Sequence[str | None] | None = None) -> Report:
    """Read evaluation directories; seconds are shares of what full depth of the first takes.

    Args:
        directories: folders with results.jsonl.
        names: the model that each directory belongs to; None finds out (`libs.report.entries.by_model`).

    Raises:
        ValueError: a file is malformed (the message names file and line), or the directories cannot be compared.
    """
    evaluations = read_evaluations(directories)
    found, notes = entries(evaluations, names or [None] * len(evaluations))
    tolerance = evaluations[0].tolerance
    return Report(evaluations, found, notes, TOLERANCE if tolerance is None else tolerance)


def row(entry: Entry, found: Sequence[Entry]) -> dict[str, Any]:
    """One setting: what it is, its quality with interval, and its costs, also relative to its honest rival."""
    full, rival, quality = full_depth(found), rival_of(entry, found), over_seeds(entry.quality)
    over = None if rival is None else speedup(entry, rival)
    beside = None if rival is None else change(entry, rival)
    against = None if full is None or entry is full else change(entry, full)
    return setting(entry) | {
        "slug": entry.first.slug,
        "n_images": entry.first.record.get("n_images"),
        "trainings": list(entry.trainings),
        "noise_seeds": sorted(entry.quality[0]),
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
        "seconds_relative_to_best_plain_interval": over and over.high and [1 / over.high, 1 / over.low],
        "quality_change_over_best_plain": beside and beside.mean,
        "quality_change_over_best_plain_interval": beside and bounds(beside),
        "best_plain": rival and rival.label,
    }
