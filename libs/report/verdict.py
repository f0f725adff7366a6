"""What the points say, in sentences computed from them, including when they speak against early exit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from libs.evaluation.families import BASELINES
from libs.report.read import Exits, Point, Uncertainty
from libs.report.text import duration, percent, point_name, quality_word, series_name, sig

TOLERANCE = 0.10  # "as good as full depth" allows a distance this much larger


@dataclass(frozen=True)
class Verdict:
    lead: str
    text: str
    tone: str = "plain"  # "good" | "bad" | "even" | "plain", seen from early exit


def full_depth(points: Sequence[Point]) -> Point | None:
    return next((point for point in points if point.family == "full"), None)


def bar(full: Point) -> float:
    return full.quality + TOLERANCE * abs(full.quality)


def within_tolerance(point: Point, full: Point) -> bool:
    return point.quality <= bar(full)


def indistinguishable(point: Point, full: Point) -> bool:
    """Better than full depth, or worse by no more than the noise over seeds."""
    return point.quality <= full.quality or outside_noise(point, full) is False


# what counts as full-depth quality, and how a sentence says it
BARS = {
    f"within {percent(TOLERANCE)} of full-depth quality": within_tolerance,
    "as good as full depth up to noise": indistinguishable,
}


def cost_of(full: Point) -> str | None:
    """What "fast" means here: measured seconds if there are any, else GMACs, else nothing."""
    return next((name for name in ("seconds", "gmacs") if getattr(full, name) is not None), None)


def fastest(points: Sequence[Point], full: Point, good: Callable = within_tolerance) -> Point | None:
    """Cheapest point that passes the bar `good(point, full)`."""
    cost = cost_of(full)
    good = [p for p in points if cost and getattr(p, cost) is not None and good(p, full)]
    return min(good, key=lambda p: getattr(p, cost), default=None)


def recommend(points: Sequence[Point], full: Point | None) -> tuple[Point | None, str]:
    """The point to recommend, and why: the one the evaluation marked, else the fastest early exit within the bar."""
    marked = next((point for point in points if point.recommended), None)
    if marked is not None:
        return marked, "marked by the evaluation"
    policies = [point for point in points if point.family not in BASELINES]
    if full is not None and (best := fastest(policies, full)) is not None:
        return best, f"the fastest early-exit point within {percent(TOLERANCE)} of full-depth quality"
    closest = min(policies, key=lambda p: p.quality, default=None)
    return closest, "the early-exit point of best quality, as none is shown to be within the bar"


def best_fixed(points: Sequence[Point], full: Point | None) -> Point | None:
    """The fixed layer to hold against early exit: the fastest within the bar, else the best in quality."""
    fixed = [point for point in points if point.family == "fixed"]
    best = fastest(fixed, full) if full is not None else None
    return best or min(fixed, key=lambda p: p.quality, default=None)


def outside_noise(a: Point, b: Point) -> bool | None:
    """Whether two qualities differ by more than the noise over seeds; None with fewer than two seeds.

    With the same noise seeds, both points start from the same noise, and what counts is the spread of the differences:
    the limit is 4.3 standard errors, the 95 % Student-t interval of three seeds. With other seeds, it is twice the two
    points' combined standard deviation.
    """
    if a.spread is None or b.spread is None:
        return None
    if a.record.get("seeds") == b.record.get("seeds") and len(a.quality_per_seed) == len(b.quality_per_seed):
        differences = [x - y for x, y in zip(a.quality_per_seed, b.quality_per_seed, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return abs(statistics.fmean(differences)) > 4.3 * error
    return abs(a.quality - b.quality) > 2 * math.hypot(a.spread, b.spread)


def timings_overlap(a: Point, b: Point) -> bool | None:
    """Whether the timing runs leave open who is faster; None with fewer than two runs.

    Points of one evaluation are timed in turn, so run i of both saw the same machine: one of them must win every run.
    Otherwise the ranges must not overlap.
    """
    if len(a.seconds_runs) < 2 or len(b.seconds_runs) < 2:
        return None
    if a.dir == b.dir and len(a.seconds_runs) == len(b.seconds_runs):
        return len({x < y for x, y in zip(a.seconds_runs, b.seconds_runs, strict=True)}) == 2
    return max(min(a.seconds_runs), min(b.seconds_runs)) <= min(max(a.seconds_runs), max(b.seconds_runs))


def saved(point: Point, full: Point | None, what: str) -> float | None:
    """Share of full depth's `seconds` or `gmacs` that the point does not spend."""
    if full is None or getattr(point, what) is None or not getattr(full, what):
        return None
    return 1 - getattr(point, what) / getattr(full, what)


def saving_ratio(point: Point, full: Point | None) -> float | None:
    """Time saved over GMACs saved: 1 = every saved operation saves its share of time. None below 1 % saved."""
    time, macs = saved(point, full, "seconds"), saved(point, full, "gmacs")
    return None if time is None or macs is None or macs < 0.01 else time / macs


def noise_words(a: Point, b: Point) -> str:
    outside = outside_noise(a, b)
    if outside is None:
        return "one noise seed, so the noise is unknown"
    seeds = min(len(a.quality_per_seed), len(b.quality_per_seed))
    return f"{'outside' if outside else 'inside'} the noise over {seeds} seeds"


def change(point: Point, base: Point) -> float | None:
    return (point.quality - base.quality) / abs(base.quality) if base.quality else None


def against(point: Point, base: Point) -> str:
    """`26.9 against 25.9 (+4 %, inside the noise over 3 seeds)`"""
    share = change(point, base)
    lead = f"{percent(share, signed=True)}, " if share is not None else ""
    return f"{sig(point.quality)} against {sig(base.quality)} ({lead}{noise_words(point, base)})"


def cost_words(point: Point, cost: str) -> str:
    return f"{duration(point.seconds)} per image" if cost == "seconds" else f"{sig(point.gmacs)} GMACs per image"


def relative_cost(point: Point, base: Point, cost: str) -> str:
    if cost == "gmacs":
        return f"{sig(point.gmacs / base.gmacs)}× the GMACs"
    return f"{sig(base.seconds / point.seconds)}× the speed"


def verdicts(points: Sequence[Point], floor: float | None = None) -> list[Verdict]:
    """Sentences on the points of a report; the first full-depth point is the reference.

    First who wins at full-depth quality, then the fastest good point of every family, what the baselines reach at the
    recommended point's cost, how much saved arithmetic becomes saved time, and what makes the points incomparable.
    """
    several = len({point.run for point in points}) > 1
    full = full_depth(points)
    if full is None:
        return [
            Verdict("No reference.", "No full-depth point was evaluated, so nothing can be compared with it."),
            *warnings(points),
        ]
    cost = cost_of(full)
    if cost is None:
        text = "Full depth has neither a time nor GMACs, so no point can be called faster than it."
        return [Verdict("No cost.", text), *warnings(points)]
    found = winners(points, full, cost, several)
    found += [family_verdict(group, full, cost, several) for group in groups(points) if full not in group]
    chosen, _ = recommend(points, full)
    if chosen is not None:
        found += equal_cost(points, chosen, cost, several)
        ratio = saving_ratio(chosen, full)
        if ratio is not None:
            text = (
                f"At {point_name(chosen, several)}, GMACs fall by {percent(saved(chosen, full, 'gmacs'))} and time by "
                f"{percent(saved(chosen, full, 'seconds'))}, a ratio of {sig(ratio, 2)}."
            )
            found.append(Verdict("Arithmetic and time.", text))
    if floor:
        text = (
            f"Two halves of the real images are {sig(floor)} apart and full depth is at {sig(full.quality)}, "
            f"{sig(full.quality / floor, 2)} times that: savings are measured on a model that far from its data."
        )
        found.append(Verdict("The floor.", text))
    return found + warnings(points)


def groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points by series, in order: full depth, exit policies, fixed layers, fewer steps."""
    rank = {"full": 0, "fixed": 2, "steps": 3}
    series = sorted({p.series: rank.get(p.family, 1) for p in points}.items(), key=lambda item: item[1])
    return [[p for p in points if p.series == key] for key, _ in series]


def winners(points: Sequence[Point], full: Point, cost: str, several: bool) -> list[Verdict]:
    """Early exit against everything else, at each of the BARS; the second needs noise to be known."""
    if all(p.family in BASELINES for p in points):
        return [Verdict("No early exit here.", "No early-exit policy was evaluated, so nothing can be said about one.")]
    first, second = (winner(points, full, cost, several, words) for words in BARS)
    if not any(p.family in ("fixed", "steps") for p in points):
        text = "Neither fixed layers nor fewer steps were evaluated: without them this is no evidence for early exit."
        first = Verdict(first.lead, f"{first.text} {text}", first.tone)
    if full.spread is None:
        return [first]
    second = Verdict(f"At a stricter bar, {second.lead[0].lower()}{second.lead[1:]}", second.text, second.tone)
    return [first, second]


def winner(points: Sequence[Point], full: Point, cost: str, several: bool, words: str) -> Verdict:
    policies = [p for p in points if p.family not in BASELINES]
    baselines = [p for p in points if p.family in BASELINES]
    early, base = fastest(policies, full, BARS[words]), fastest(baselines, full, BARS[words])  # full depth passes
    base_name = point_name(base, several)
    if early is None:
        other = (
            "and nothing else is faster than full depth"
            if base is full
            else f"while {base_name} is, at {relative_cost(base, full, cost)} of full depth"
        )
        return Verdict("Early exit loses.", f"None of its points is {words}, {other}.", "bad")
    text = (
        f"Among the points {words}, the fastest early exit is {point_name(early, several)} ({cost_words(early, cost)}) "
        f"and the fastest without early exit is {base_name} ({cost_words(base, cost)}): early exit has "
        f"{relative_cost(early, base, cost)}."
    )
    overlap = timings_overlap(early, base) if cost == "seconds" else False
    if overlap:
        lead, tone = "A tie.", "even"
        text += " Their timing runs disagree, so neither is faster."
    else:
        wins = getattr(early, cost) < getattr(base, cost)
        lead, tone = ("Early exit wins.", "good") if wins else ("Early exit loses.", "bad")
        if overlap is None:
            text += " With fewer than two timing runs the noise of the clock is unknown."
        elif cost == "seconds":
            text += " All timing runs agree."
    if cost == "gmacs":
        text += " No times were measured, and GMACs are not a speed-up."
    return Verdict(lead, f"{text} {quality_word(full.quality_key)} {against(early, base)}.", tone)


def family_verdict(group: Sequence[Point], full: Point, cost: str, several: bool) -> Verdict:
    name = series_name(group[0], several)
    lead = f"{name[0].upper()}{name[1:]}."
    best = fastest(group, full)
    if best is None:
        closest = min(group, key=lambda p: p.quality)
        text = (
            f"No point within {percent(TOLERANCE)} of full-depth quality; the closest, {point_name(closest, several)}, "
            f"is at {against(closest, full)}."
        )
        return Verdict(lead, text)
    text = (
        f"Fastest within {percent(TOLERANCE)} of full-depth quality: {point_name(best, several)}, "
        f"{cost_words(best, cost)}, {relative_cost(best, full, cost)} of full depth, at {against(best, full)}."
    )
    return Verdict(lead, text)


def equal_cost(points: Sequence[Point], chosen: Point, cost: str, several: bool) -> list[Verdict]:
    """The best quality every baseline reaches without spending more than the recommended point (2 % allowed)."""
    limit = getattr(chosen, cost)
    if limit is None:
        return []
    parts, better = [], False
    for family in ("fixed", "steps"):
        rivals = [p for p in points if p.family == family and p is not chosen and getattr(p, cost) is not None]
        if not rivals:
            continue
        rival = min((p for p in rivals if getattr(p, cost) <= 1.02 * limit), key=lambda p: p.quality, default=None)
        if rival is None:
            parts.append(f"{series_name(rivals[0], False)} has no point this cheap")
            continue
        better |= rival.quality < chosen.quality
        parts.append(f"{point_name(rival, several)} reaches {against(rival, chosen)}")
    if not parts:
        return []
    text = f"For no more than {point_name(chosen, several)} costs ({cost_words(chosen, cost)}), {'; '.join(parts)}."
    return [Verdict("At equal time." if cost == "seconds" else "At equal GMACs.", text, "bad" if better else "plain")]


def warnings(points: Sequence[Point]) -> list[Verdict]:
    """What makes two points of the report incomparable."""
    found = []
    for keys, what in (
        (
            ("n_images", "seeds"),
            "Their qualities are not strictly comparable: a Fréchet distance depends on the number of images.",
        ),
        (("device", "threads", "batch_size"), "Their seconds are not comparable."),
        (("commit",), "They were made by different code."),
    ):
        for key in keys:
            values = sorted({str(p.record[key]) for p in points if key in p.record})
            if len(values) > 1:
                found.append(Verdict("Careful.", f"Points differ in {key} ({', '.join(values)}). {what}", "even"))
    return found


# ---- what the traces say -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Variance of the exit layer, split; the three shares add up to 1 unless the variance is 0 (all shares 0)."""

    time: float  # between calls: a schedule over time would reproduce it
    image: float  # between images: some images are deeper at every call
    both: float  # the rest: which image is deep depends on the call
    variance: float  # in layers squared


def variance_shares(used: np.ndarray) -> Shares:
    """Two-way decomposition of layers used (calls, n) into call, image and interaction."""
    used = used.astype(np.float64)
    total = used.var()
    if total == 0:
        return Shares(0.0, 0.0, 0.0, 0.0)
    time, image = used.mean(axis=1).var() / total, used.mean(axis=0).var() / total
    return Shares(time, image, max(0.0, 1 - time - image), total)


def exit_sentence(exits: Exits) -> str:
    """One sentence on whether exits follow time or the image; under guidance, of the conditional branch."""
    shares = variance_shares(exits.used[:, 0])
    branch = " of the conditional branch" if exits.used.shape[1] == 2 else ""
    if shares.variance == 0:
        layer = int(exits.used[0, 0, 0])
        return f"Every image{branch} leaves after layer {layer} at every call: there is nothing to adapt."
    lead = (
        f"Time alone explains {percent(shares.time)} of the variance of the exit layer{branch}, the image alone "
        f"{percent(shares.image)}, and the two together the other {percent(shares.both)}"
    )
    if shares.time >= 0.9:
        return f"{lead}: a fixed schedule over time would leave at nearly the same layers."
    if shares.time >= 0.5:
        return f"{lead}: mostly a schedule over time, with some adaptation to the image."
    return f"{lead}: the policy adapts to the image more than to time."


def correlations(maps: Uncertainty) -> tuple[float | None, float | None]:
    """How well u ranks the true error: Spearman over all pixels, and the median within one time and exit.

    The first can be high merely because both fall with time and depth; the second cannot. None where a side is
    constant, as the error of the last layer is.
    """
    cells = [spearman(u, e) for us, es in zip(maps.u, maps.error, strict=True) for u, e in zip(us, es, strict=True)]
    known = [value for value in cells if value is not None]
    return spearman(maps.u, maps.error), statistics.median(known) if known else None


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # ties share their mean rank
    if min(rank.std() for rank in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])
