"""Evaluations of several methods, models and training seeds against each other, at equal seconds. Reads files only."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from libs.comparison.entries import Entry, entries, estimate, group
from libs.comparison.findings import fastest_within, worth_of_looking
from libs.comparison.page import document
from libs.comparison.timing import timed_together
from libs.comparison.verdict import BUDGETS, RULE, Verdict, verdicts
from libs.report import read
from libs.report.verdict import warnings

__all__ = ["BUDGETS", "RULE", "Entry", "Verdict", "compare", "entries", "group", "verdicts", "write"]


def compare(
    directories: Sequence[str | Path], names: Sequence[str | None] | None = None
) -> tuple[list[Entry], list[Verdict], list[str], str]:
    """Entries, a verdict per budget, notes, and the quality's key; the first directory's full depth is the reference.

    `names[i]` is the model that directory i belongs to; None finds out (`libs.comparison.entries.group`). Raises
    ValueError where the directories cannot be compared.
    """
    evaluations = read(directories)
    together = timed_together(evaluations) if len(evaluations) > 1 else evaluations
    evaluations = together or evaluations
    found, notes = entries(group(evaluations, names or [None] * len(evaluations)), together is not None)
    points = [point for evaluation in evaluations for point in evaluation.points]
    notes += [warning.text for warning in warnings(points)]
    if any(entry.selection is None for entry in found):
        notes.append("Some points lack a selection seed: their settings are chosen on the seeds that are reported.")
    return found, verdicts(found), notes, points[0].quality_key


def write(directories: Sequence[str | Path], names: Sequence[str | None] | None, output: str | Path) -> list[str]:
    """Write the page to `output` (.html) and its numbers beside it (.json); returns all sentences, the notes last."""
    found, sentences, notes, key = compare(directories, names)
    findings = [fastest_within(found), *worth_of_looking(found)]
    html = document(found, sentences, findings, notes, "Methods at equal seconds", key)
    numbers = {
        "quality_key": key,
        "rule": RULE,
        "findings": findings,
        "notes": notes,
        "verdicts": [
            {
                "budget": v.budget,
                "tone": v.tone,
                "text": v.text,
                "order": [[e.model, e.family, e.label] for e in v.order],
                "ties": [[e.model, e.family, e.label] for e in v.ties],
            }
            for v in sentences
        ],
        "points": [asdict(e) | {"mean": e.mean, "standard_error": estimate(e.quality).error} for e in found],
    }
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((output, html), (output.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    return [v.text for v in sentences] + findings + notes
