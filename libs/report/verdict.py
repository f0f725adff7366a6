"""What the entries say: the recommended point, its honest rival, who wins at equal seconds; also where it is bad news.

The honest rival of a point is the best plain sampling at its quality: all layers, as few calls as do, on the best grid
that was evaluated, chosen on the selection seed. A speed-up over evenly spaced calls is named as such.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from libs.report.entries import Entry, change, gap, n_images, speedup
from libs.report.families import CONTROLS
from libs.report.statistics import Estimate
from libs.report.text import percent, quality_word, sig, signed, speedup_text

TOLERANCE = 0.05  # where the evaluation did not record its eval.tolerance
EQUAL = 0.02  # qualities, and costs within a budget, that differ by this share count as equal
BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # shares of the reference's full-depth seconds
RULE = (
    "Settings are chosen on the selection seed and reported on the other noise seeds. Intervals are 95 %, Student's t, "
    "of paired differences: over training seeds where there are several, else over noise seeds of one training. A "
    "difference counts if three values or more exclude zero; there is no correction for how many methods take part. A "
    "plain sampling runs all layers at every call."
)


# ---- who is held against whom --------------------------------------------------------------------------------------


def full_depth(entries: Sequence[Entry]) -> Entry | None:
    """The reference: full depth of the first model that has it."""
    return next((entry for entry in entries if entry.family == "full"), None)


def uniform(entries: Sequence[Entry]) -> Entry | None:
    """Full depth on evenly spaced calls: the reference if it is, else of its solver the one with the most calls."""
    full = full_depth(entries)
    if full is None or full.evenly_spaced:
        return full
    even = [e for e in entries if e.plain and e.evenly_spaced and e.model == full.model and solver(e) == solver(full)]
    return max(even, key=lambda e: e.first.nfe, default=None)


def only_even(entries: Sequence[Entry]) -> bool:
    """Whether no plain sampling was evaluated on another grid than the evenly spaced one."""
    return all(e.evenly_spaced for e in entries if e.plain)


def solver(entry: Entry) -> str:
    return str((entry.first.record.get("sampler") or {}).get("name"))


def best_plain(entries: Sequence[Entry], model: str, quality: float) -> Entry | None:
    """The fastest plain sampling of `model` whose distance on the selection seed is at most `quality`; None if none is.

    Without seconds, the one with the fewest GMACs.
    """
    good = [e for e in entries if e.plain and e.model == model and e.choosing <= quality]
    return cheapest(good)


def rival_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The honest rival of an entry: the best plain sampling at its quality, 2 % allowed, by its own network.

    Where none is as good, it is the best there is. A model whose plain sampling was not evaluated is held against that
    of the reference.
    """
    full = full_depth(entries)
    own = any(e.plain and e.model == entry.model for e in entries)
    model = entry.model if own or full is None else full.model
    alike = [e for e in entries if n_images(e) == n_images(entry)]
    plain = [e for e in alike if e.plain and e.model == model]
    as_good = best_plain(alike, model, (1 + EQUAL) * entry.choosing)
    return as_good or min(plain, key=lambda e: e.choosing, default=None)


def simpler_than(chosen: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The fastest setting without any choice per image or call that is as good, 2 % allowed: the same layer for all
    images and calls, or all layers of another, smaller network; None if none is."""
    return cheapest([e for e in simple(chosen, entries) if e.choosing <= (1 + EQUAL) * chosen.choosing])


def ahead_of(chosen: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The fastest such setting that no early exit of its seconds matches, 2 % allowed for both, and that is better than
    `chosen` outside the noise; None if there is none."""
    timed = [e for e in entries if e.early and e.cost is not None and n_images(e) == n_images(chosen)]

    def alone(setting: Entry) -> bool:
        early = [e for e in timed if e.cost <= (1 + EQUAL) * setting.cost]
        return chosen in early and all(e.choosing > (1 + EQUAL) * setting.choosing for e in early)

    found = [e for e in simple(chosen, entries) if e.cost is not None and clearly_better(e, chosen)]
    return cheapest([e for e in found if alone(e)])


def clearly_better(a: Entry, b: Entry) -> bool:
    """Whether the distance of a is smaller than that of b outside the noise."""
    found = gap(a, b)
    return found is not None and found.mean < 0 and found.excludes() is True


def simple(chosen: Entry, entries: Sequence[Entry]) -> list[Entry]:
    alike = [e for e in entries if n_images(e) == n_images(chosen)]
    return [e for e in alike if e.family == "fixed" or e.plain and e.model != chosen.model]


def cheapest(entries: Sequence[Entry]) -> Entry | None:
    timed = [e for e in entries if e.cost is not None]
    counted = [e for e in entries if e.gmacs is not None]
    if timed:
        return min(timed, key=lambda e: e.cost)
    return min(counted, key=lambda e: e.gmacs, default=None)


def cheaper(a: Entry, b: Entry) -> bool:
    """Whether a costs less than b: in seconds if both were timed, else in GMACs."""
    if None not in (a.cost, b.cost):
        return a.cost < b.cost
    return None not in (a.gmacs, b.gmacs) and a.gmacs < b.gmacs


def good_enough(entries: Sequence[Entry], tolerance: float) -> list[Entry]:
    """At most `tolerance` worse than the reference's full depth on the selection seed, and cheaper than it."""
    full = full_depth(entries)
    if full is None:
        return []
    alike = [e for e in entries if n_images(e) == n_images(full) and e is not full]
    return [e for e in alike if e.choosing <= (1 + tolerance) * full.choosing and cheaper(e, full)]


def recommend(entries: Sequence[Entry], tolerance: float) -> Entry | None:
    """The early-exit entry that is good enough and the most times as fast as its honest rival; never one that is slower
    than full depth.

    It is as good as its rival, `tolerance` or 2 % allowed; where none is, it is the fastest that is good enough.
    """
    allowed = 1 + max(EQUAL, tolerance)
    good = [e for e in good_enough(entries, tolerance) if e.early]
    rivals = [(e, rival_of(e, entries)) for e in good]
    fair = [(e, r) for e, r in rivals if r is not None and e.choosing <= allowed * r.choosing]
    if not fair:
        return cheapest(good)
    return max(fair, key=lambda pair: times_as_fast(*pair))[0]


def times_as_fast(entry: Entry, rival: Entry) -> float:
    """By the seconds of one run; by GMACs where these were not measured."""
    timed = None not in (entry.cost, rival.cost)
    return rival.cost / entry.cost if timed else rival.gmacs / entry.gmacs


def fastest_of_each(entries: Sequence[Entry], tolerance: float) -> list[Entry]:
    """For every method its fastest setting that is good enough, fastest first; controls are no methods."""
    methods: dict[tuple[str, str], list[Entry]] = {}
    for entry in good_enough(entries, tolerance):
        if entry.family not in CONTROLS:
            methods.setdefault(entry.method, []).append(entry)
    best = [found for settings in methods.values() if (found := cheapest(settings))]
    return sorted(best, key=lambda e: (e.cost is None, e.cost if e.cost is not None else e.gmacs))


# ---- the claim -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a page says first. `tone` is seen from early exit: "good", "bad", "even" or "plain"."""

    tone: str
    sentences: tuple[str, ...]
    chosen: Entry | None = None


def claim(entries: Sequence[Entry], tolerance: float) -> Claim:
    """Two sentences: the recommended point against evenly spaced full depth, and against its honest rival."""
    full, even = full_depth(entries), uniform(entries)
    several = len({entry.model for entry in entries}) > 1
    if full is None:
        return Claim("plain", ("No full-depth point was evaluated, so nothing can be compared with it.",))
    if not any(entry.early for entry in entries):
        return Claim("plain", ("No early-exit policy was evaluated.",))
    chosen = recommend(entries, tolerance)
    if chosen is None:
        plain = cheapest([e for e in good_enough(entries, tolerance) if e.plain])
        rest = f" {plain.name(several)} is." if plain else ""
        text = f"No early exit is both faster than full depth and at most {percent(tolerance)} worse."
        return Claim("bad", (text + rest,))
    base = even or full
    word = quality_word(chosen.first.quality_key)
    name = chosen.name(several)
    first = f"{name[0].upper()}{name[1:]} {cost_words(chosen, base)} {calls(base, several)}; its {word} changes by "
    first += f"{signed(change(chosen, base))}."
    tone, second = against_rival(chosen, rival_of(chosen, entries), base, entries, several)
    simpler, ahead = simpler_than(chosen, entries), ahead_of(chosen, entries)
    if simpler is not None and as_fast(simpler, chosen) and not clearly_better(simpler, chosen):
        found, does, tone = simpler, "does as well", "bad" if tone == "bad" else "even"
    elif simpler is not None and as_fast(simpler, chosen):
        found, does, tone = simpler, "is better and as fast", "bad"
    elif ahead is not None:
        found, does, tone = ahead, "is better than every early exit of no more seconds", "bad"
    else:
        return Claim(tone, (first, second), chosen)
    name = found.name(several)
    warning = f"{name[0].upper()}{name[1:]} {does}: it {cost_words(found, chosen)} the recommended point, its {word} "
    warning += f"differs by {signed(change(found, chosen))}."
    return Claim(tone, (warning, first, second), chosen)


def as_fast(a: Entry, b: Entry) -> bool:
    """Whether a is as fast as b or faster, 2 % and the noise allowed."""
    found = speedup(a, b)
    return found is not None and (found.mean >= 1 - EQUAL or found.excludes(1.0) is False)


def cost_words(a: Entry, b: Entry) -> str:
    """`is 2.50× [2.31, 2.70] as fast as`, or in GMACs, which are no speed-up."""
    found = speedup(a, b)
    if found is not None:
        return f"is {speedup_text(found)} as fast as"
    if None in (a.gmacs, b.gmacs):
        return "was not timed against"
    return f"needs {percent(a.gmacs / b.gmacs)} of the GMACs (not timed) of"


def calls(base: Entry, several: bool) -> str:
    """Full depth by what tells its samplings apart: the number of calls and where they lie."""
    told = base.where or (not base.evenly_spaced and base.grid in base.first.label)
    return base.name(several) if told else f"{base.name(several)} ({base.placement})"


def against_rival(
    chosen: Entry, rival: Entry | None, base: Entry, entries: Sequence[Entry], several: bool
) -> tuple[str, str]:
    """Tone and second sentence. `base` is what the first sentence was about."""
    if rival is None:
        return "plain", "No plain sampling was evaluated."
    found = speedup(chosen, rival)
    outside = None if found is None else found.excludes(1.0)
    tone = "plain" if found is None else "even" if not outside else "good" if found.mean > 1 else "bad"
    if only_even(entries):
        note = "Only evenly spaced calls were evaluated for plain sampling, so this is a speed-up over those"
        if rival is base:
            return tone, f"{note}."
        note = f" {note}."
    else:
        note = ""
    if rival is base:
        return tone, f"No better placed or fewer calls at full depth are as good and faster.{note}"
    noise = {True: "", False: ", inside the noise", None: ", with too few runs to tell"}[outside] if found else ""
    text = f"The best plain sampling of that quality is {calls(rival, several)}"
    if rival.choosing > (1 + EQUAL) * chosen.choosing:
        text = f"No plain sampling that was evaluated is as good; the best is {calls(rival, several)}"
    return tone, f"{text}: early exit {cost_words(chosen, rival)} it{noise}.{note}"


def headline(entries: Sequence[Entry], tolerance: float) -> dict | None:
    """The claim as numbers, for files; None where no early exit is good enough.

    `speedup_over_uniform` and `quality_change` (share of the distance) are against full depth on evenly spaced calls,
    `speedup_over_best_plain` and `quality_change_over_best_plain` against the honest rival; `…_over_simpler` against
    the best fixed layer or smaller network of that quality; `ahead` is one that no exit of its seconds matches. A value
    is None where its counterpart was not evaluated or not timed, an interval where there is one value only.
    """
    chosen, even = recommend(entries, tolerance), uniform(entries)
    if chosen is None:
        return None
    rival, simpler = rival_of(chosen, entries), simpler_than(chosen, entries)
    found: dict[str, Estimate | None] = {
        "speedup_over_uniform": even and speedup(chosen, even),
        "speedup_over_best_plain": rival and speedup(chosen, rival),
        "quality_change": even and change(chosen, even),
        "quality_change_over_best_plain": rival and change(chosen, rival),
        "speedup_over_simpler": simpler and speedup(chosen, simpler),
        "quality_change_over_simpler": simpler and change(chosen, simpler),
    }
    return {
        **{key: value and value.mean for key, value in found.items()},
        "intervals": {key: bounds(value) for key, value in found.items()},
        "setting": setting(chosen),
        "uniform": even and setting(even),
        "best_plain": rival and setting(rival),
        "simpler": simpler and setting(simpler),
        "ahead": (ahead := ahead_of(chosen, entries)) and setting(ahead),
        "other_grids": not only_even(entries),
        "tolerance": tolerance,
        "training_runs": len(chosen.points),
        "noise_seeds": min(len(seeds) for seeds in chosen.quality),
        "timing_runs": min(len(p.seconds_runs) for p in chosen.points),
    }


def bounds(found: Estimate | None) -> list[float] | None:
    return None if found is None or found.low is None else [found.low, found.high]


def setting(entry: Entry) -> dict:
    record = entry.first.record
    known = {key: record[key] for key in ("exit", "sampler", "guidance", "grid", "plan") if record.get(key) is not None}
    if path := known.get("exit", {}).get("path"):  # where it lay says nothing on another machine
        known["exit"] = known["exit"] | {"path": Path(path).name}
    return {"model": entry.model, "family": entry.family, "label": entry.label, "nfe": entry.first.nfe} | known


# ---- at equal seconds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`order` has one entry per method within the budget, best first; `ties` are not clearly worse than the first."""

    budget: float
    order: tuple[Entry, ...]
    ties: tuple[Entry, ...]
    tone: str  # seen from early exit
    text: str


def verdicts(entries: Sequence[Entry]) -> list[Verdict]:
    """Who is best within each budget of seconds, as far as somebody is; budgets with the same answer are said once."""
    full = full_depth(entries)
    if full is None or full.cost is None:
        return []
    several = len({entry.model for entry in entries}) > 1
    alike = [e for e in entries if n_images(e) == n_images(full)]
    found = [verdict(choose(alike, budget), budget, several) for budget in BUDGETS]
    answers = [v.text.partition(", ")[2] for v in found]  # without the budget
    return [v for i, v in enumerate(found) if i == 0 or answers[i] != answers[i - 1]]


def choose(entries: Sequence[Entry], budget: float) -> list[Entry]:
    """For every method its best setting within the budget on the selection seed; best method on the others first."""
    methods: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.family not in CONTROLS and entry.cost is not None and entry.cost <= budget * (1 + EQUAL):
            method = (entry.model, "plain") if entry.plain else entry.method
            methods.setdefault(method, []).append(entry)
    chosen = [min(settings, key=lambda entry: entry.choosing) for settings in methods.values()]
    return sorted(chosen, key=lambda entry: entry.mean)


def verdict(order: Sequence[Entry], budget: float, several: bool) -> Verdict:
    lead = f"Within {percent(budget)} of full-depth seconds"
    if not order:
        return Verdict(budget, (), (), "plain", f"{lead}, no method is fast enough.")
    best, *others = order
    ties = tuple(other for other in others if not gap(other, best).excludes())
    name = f"{best.name(several)} ({sig(best.mean)} at {percent(best.cost)})"
    rival = next((e for e in others if e.early != best.early), None)
    kind = "without early exit" if best.early else "early exit"
    if not others:
        text = f"{lead}, only {name} is fast enough."
    elif ties:
        tied = "; ".join(f"{other.name(several)} ({more(other, best)})" for other in ties)
        text = f"{lead}, nobody wins: {name} is not told from {tied}."
    else:
        text = f"{lead}, {name} wins; next is {others[0].name(several)}, {more(others[0], best)}."
    if rival is not None and rival not in ties and rival is not others[0]:
        text += f" The best {kind}, {rival.name(several)}, has {more(rival, best)}."
    if rival is None:
        tone = "good" if best.early else "bad"
        text += f" {'Nothing' if best.early else 'No'} {kind} is this fast." if others else ""
    else:
        tone = "even" if rival in ties else "good" if best.early else "bad"
    return Verdict(budget, tuple(order), ties, tone, text)


def more(other: Entry, best: Entry) -> str:
    """`+12 % [+3.0, +21]`"""
    return signed(change(other, best))


def worth_of_looking(entries: Sequence[Entry]) -> list[str]:
    """A sentence per control that copies the depths of a policy without looking at the images."""
    several = len({entry.model for entry in entries}) > 1
    sentences = []
    for control in entries:
        source = re.search(r" path ([^\s,]+)", control.label) if control.family in CONTROLS else None
        policy = next((e for e in entries if source and e.model == control.model and e.first.slug == source[1]), None)
        found = policy and gap(policy, control)
        if found:
            outside = {True: "outside the noise", False: "inside the noise", None: "with too few seeds to tell"}
            sentences.append(
                f"{policy.name(several)} against {control.name(several)}, which copies its depths without looking at "
                f"the images: {signed(change(policy, control))}, {outside[found.excludes()]} "
                f"({sig(policy.mean_depth)} layers against {sig(control.mean_depth)})."
            )
    return sentences
