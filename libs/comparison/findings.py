"""What a comparison says besides its budgets: the price of a given quality, and what looking at the images is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence

from libs.comparison.entries import Entry, difference
from libs.comparison.verdict import CONTROLS, by, noise
from libs.report.text import percent, sig

TOLERANCE = 0.05


def fastest_within(entries: Sequence[Entry], tolerance: float = TOLERANCE) -> str:
    """For every method its fastest setting at most `tolerance` worse than the reference's full depth, fastest first.

    The selection seed says which settings are good enough; the distances that are shown are those of the other seeds.
    """
    full = next(entry for entry in entries if entry.family == "full")
    lead = f"At most {percent(tolerance)} worse than full depth on the selection seed, the fastest of each method: "
    fastest: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        known = entry is not full and None not in (entry.cost, entry.selection, full.selection)
        if known and entry.selection <= (1 + tolerance) * full.selection and entry.family not in CONTROLS:
            best = fastest.setdefault(entry.method, entry)
            fastest[entry.method] = min(best, entry, key=lambda e: e.cost)
    if not fastest:
        return lead + "none is."
    several = len({entry.model for entry in entries}) > 1
    found = []
    for entry in sorted(fastest.values(), key=lambda entry: entry.cost):
        gap = difference(entry, full)
        change = f"{100 * gap.mean / full.mean:+.1f}\u00a0%, {noise(gap, full, entry)}"  # a tenth, near the tolerance
        found.append(f"{entry.name(several)} {sig(1 / entry.cost)}× ({change})")
    return lead + "; ".join(found) + "."


def worth_of_looking(entries: Sequence[Entry]) -> list[str]:
    """A sentence per control that copies the depths of a policy without looking at the images."""
    several = len({entry.model for entry in entries}) > 1
    sentences = []
    for control in entries:
        if control.family not in CONTROLS:
            continue
        source = re.search(r" path ([^\s,]+)", control.label)
        policy = next((e for e in entries if source and e.model == control.model and e.slug == source[1]), None)
        if policy is not None:
            worse = difference(control, policy).mean < 0
            depths = f"{sig(policy.mean_depth)} layers against {sig(control.mean_depth)}"
            sentences.append(
                f"{policy.name(several)} has {by(control, policy, worse)} than {control.name(several)}, which copies "
                f"its depths without looking at the images; {depths}."
            )
    return sentences
