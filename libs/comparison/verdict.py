"""Who wins at a budget of seconds, by how much, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from libs.comparison.entries import Entry, Estimate, difference
from libs.report.text import percent, sig

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.8)  # shares of the reference's full-depth seconds
CONTROLS = ("matched_static", "matched_random")  # copies of a policy's depths: they need the policy
SLACK = 0.02  # a point may exceed the budget by this share of it
RULE = (
    "A method is a family of points of one model. Its setting within the budget (2 % allowed) with the smallest "
    "distance on the selection seed takes part, with its distances on the other noise seeds. A difference is outside "
    "the noise if its 95 % confidence interval excludes zero (Student's t; paired by noise seed within a model, and by "
    "training seed between models that have the same ones). The interval is over training seeds where there are "
    "several, else over noise seeds, and then says nothing about another training of the same model. There is no "
    "correction for how many methods take part. Controls that copy the depths of a policy take no part; they have "
    "sentences of their own."
)


@dataclass(frozen=True)
class Verdict:
    """`order` has one entry per method within the budget, best first; `ties` are not clearly worse than the first."""

    budget: float
    order: tuple[Entry, ...]
    ties: tuple[Entry, ...]
    tone: str  # "good" | "bad" | "even" | "plain", seen from early exit
    text: str


def verdicts(entries: Sequence[Entry], budgets: Sequence[float] = BUDGETS) -> list[Verdict]:
    """One per budget; the first full-depth entry is what the budgets are shares of."""
    several = len({entry.model for entry in entries}) > 1
    full = next(entry for entry in entries if entry.family == "full")
    return [verdict(entries, budget, full, several) for budget in budgets]


def choose(entries: Sequence[Entry], budget: float) -> list[Entry]:
    """For every method its setting within the budget, best method first."""
    methods: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.family not in CONTROLS and entry.cost is not None and entry.cost <= budget * (1 + SLACK):
            methods.setdefault(entry.method, []).append(entry)
    chosen = []
    for settings in methods.values():
        known = all(entry.selection is not None for entry in settings)
        chosen.append(min(settings, key=lambda entry: entry.selection if known else entry.mean))
    return sorted(chosen, key=lambda entry: entry.mean)


def verdict(entries: Sequence[Entry], budget: float, full: Entry, several: bool) -> Verdict:
    order = choose(entries, budget)
    lead = f"At {percent(budget)} of full-depth seconds"
    if not order:
        return Verdict(budget, (), (), "plain", f"{lead}, no method is fast enough.")
    best, *others = order
    ties = tuple(other for other in others if difference(other, best).clear is not True)
    name = f"{best.name(several)}, {sig(best.mean)} at {percent(best.cost)}"
    if not others:
        text = f"{lead}, only one method is fast enough: {name}"
    elif not ties:
        text = f"{lead}, the winner is {name}: {by(others[0], best)} than the next, {others[0].name(several)}"
    else:
        tied = " and ".join(f"{other.name(several)}, {by(other, best, worse=True)}" for other in ties)
        text = f"{lead}, nobody wins: {name}, is not distinguishable from {tied}"
    tone, rest = early_exit(best, order, ties, several)
    text += f"{rest}; full depth has {sig(full.mean)}."
    return Verdict(budget, tuple(order), ties, tone, text)


def early_exit(best: Entry, order: Sequence[Entry], ties: Sequence[Entry], several: bool) -> tuple[str, str]:
    """The tone, and what the sentence must add about the other kind: early exit or its competitors."""
    rival = next((entry for entry in order if entry.early != best.early), None)
    if rival is None:
        what = "nothing without early exit" if best.early else "no early exit"
        return ("good" if best.early else "bad"), f"; {what} is this fast"
    outside = difference(rival, best).clear
    tone = "even" if not outside else "good" if best.early else "bad"
    if best.early and (rival in ties or rival is order[1]):
        return tone, ""
    if best.early:
        return tone, f"; the best without early exit, {rival.name(several)}, is {by(rival, best, worse=True)}"
    if outside:
        return tone, f"; early exit loses, its best is {rival.name(several)}, {by(rival, best, worse=True)}"
    word = "is not shown to lose" if outside is None else "does not lose outside the noise"
    return tone, f"; early exit {word}: {rival.name(several)}, {by(rival, best, worse=True)}"


def by(other: Entry, best: Entry, worse: bool = False) -> str:
    """`3.1 less (12 %, outside the noise of 3 training seeds)`, or `3.1 more (...)` seen from the worse one."""
    gap = difference(other, best)
    share = f"{percent(gap.mean / abs(best.mean))}, " if best.mean else ""
    return f"{sig(abs(gap.mean))} {'more' if worse else 'less'} ({share}{noise(gap, best, other)})"


def noise(gap: Estimate, best: Entry, other: Entry) -> str:
    if gap.clear is None:
        return "one seed, so the noise is unknown"
    runs = min(len(best.quality), len(other.quality))
    seeds = f"{runs} training seeds" if runs > 1 else f"{gap.freedom + 1} noise seeds of one training"
    return f"{'outside' if gap.clear else 'inside'} the noise of {seeds}"
