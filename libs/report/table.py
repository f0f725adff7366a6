"""The numbers of the report: headline cards, and the table of all points."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from libs.report import plots
from libs.report.pieces import card, paragraph
from libs.report.read import Point
from libs.report.text import (
    MACS,
    duration,
    percent,
    plus_minus,
    quality_name,
    quality_word,
    series_name,
    sig,
    time_unit,
)
from libs.report.verdict import best_fixed, change, groups, outside_noise, saved, saving_ratio

PAIRED = (("psnr", "PSNR to full, dB"), ("ssim", "SSIM to full"))
CHOSEN = ' class="chosen"'


def cards(
    points: Sequence[Point], full: Point | None, chosen: Point | None, floor: float | None, n_real: int | None
) -> str:
    """Headline numbers of full depth and the recommended point, with the fixed layer and the floor to hold against."""
    word = quality_word(points[0].quality_key)
    found = []
    if full is not None and chosen is not None:
        timed = bool(full.seconds and chosen.seconds)
        value = f"{sig(full.seconds / chosen.seconds)}×" if timed else "–"
        more = f"{duration(full.seconds)} to {duration(chosen.seconds)} per image" if timed else "not timed"
        found.append(card(f"Speed-up at {chosen.label}", value, "", more, main=True))
    for point in (full, chosen):
        if point is not None:
            batch = f"batch {point.record.get('batch_size', 'not recorded')}"
            found.append(card(point.label, sig(point.images_per_s), "images/s", batch))
    if chosen is not None:
        known = chosen.mean_depth is not None
        more = f"{percent(chosen.mean_depth / chosen.depth)} of the layers" if known else "not recorded"
        found.append(card("Mean depth", sig(chosen.mean_depth), f"of {chosen.depth}", more))
    if full is not None:
        found.append(card(f"{word}, {full.label}", *split(full), "smaller is better"))
    if chosen is not None:
        share = change(chosen, full) if full is not None else None
        noise = {True: ", outside noise", False: ", inside noise", None: ""}
        more = "" if share is None else percent(share, signed=True) + noise[outside_noise(chosen, full)]
        found.append(card(f"{word}, {chosen.label}", *split(chosen), more))
    fixed = best_fixed(points, full)
    if fixed is None:
        found.append(card("Best fixed layer", "–", "", "none was evaluated"))
    else:
        speed = f"{sig(full.seconds / fixed.seconds)}×" if full and full.seconds and fixed.seconds else "–"
        more = f"speed-up; {word} {plus_minus(fixed.quality, fixed.spread)}"
        found.append(card(f"Best fixed: {fixed.label}", speed, "", more))
    more = (
        "not measured" if floor is None else f"halves of {n_real} real images" if n_real else "one half against another"
    )
    return "".join(found) + card("Real-halves floor", sig(floor), "", more)


def split(point: Point) -> tuple[str, str]:
    """Quality and its spread, for the two sizes of type on a card."""
    value, _, spread = plus_minus(point.quality, point.spread).partition("\u00a0±")
    return value, f"±{spread}" if spread else ""


def table(points: Sequence[Point], full: Point | None, chosen: Point | None) -> str:
    """All points, one row each, by series and from fast to slow."""
    several = len({p.run for p in points}) > 1
    order = plots.family_order(points)
    factor, unit = time_unit(max((p.seconds for p in points if p.seconds is not None), default=1.0))
    word = quality_word(points[0].quality_key)
    paired = [(key, name) for key, name in PAIRED if any(p.metric(key) is not None for p in points)]
    heads = ["Point", word, "against full depth", "noise", f"{unit} / image", "range of runs", "images / s", "speed-up"]
    heads += ["mean depth", "GMACs / image", "NFE", "time saved", "MACs saved", "time / MACs saved"]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads + [name for _, name in paired])
    body = ""
    for group in groups(points):
        tone = "ink" if group[0].family == "full" else f"s{order.index(group[0].family) % len(plots.LIGHT.series)}"
        name = f'<span class="dot" style="background:var(--{tone})"></span>{escape(series_name(group[0], several))}'
        width = len(heads) + len(paired)
        body += f'<tr class="group"><th colspan="{width}"><span class="stay">{name}</span></th></tr>\n'
        timed = all(p.seconds is not None for p in group)
        for p in sorted(group, key=lambda p: p.seconds if timed else p.nfe):
            cells = row(p, full, factor) + [sig(p.metric(key)) for key, _ in paired]
            body += (
                f'<tr{CHOSEN if p is chosen else ""}><th>{escape(p.label)}</th>'
                + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
            )  # fmt: skip
    note = (
        f"Quality is {quality_name(points[0].quality_key)}, mean ± standard deviation over noise seeds. The ratio is "
        f"time saved over MACs saved: 1 means that every saved operation saves its share of time. {MACS}"
    )
    return (
        f'<div class="table"><table class="points"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        + paragraph(note, "small")
    )


def row(p: Point, full: Point | None, factor: float) -> list[str]:
    """The cells of one point after its name; a dash for what was not measured or has no meaning."""
    share = change(p, full) if full is not None and p is not full else None
    noise = {True: "outside", False: "inside", None: "unknown"}[outside_noise(p, full)] if share is not None else "–"
    low, high = (sig(f(p.seconds_runs) * factor) if p.seconds_runs else "" for f in (min, max))
    speed = f"{sig(full.seconds / p.seconds)}×" if full and full.seconds and p.seconds else "–"
    less = [None if p is full else saved(p, full, what) for what in ("seconds", "gmacs")]
    return [
        plus_minus(p.quality, p.spread),
        "–" if share is None else percent(share, signed=True),
        noise,
        sig(p.seconds * factor) if p.seconds is not None else "–",
        f"{low} – {high}" if low else "–",
        sig(p.images_per_s),
        speed,
        sig(p.mean_depth),
        sig(p.gmacs),
        str(p.nfe),
        *("–" if value is None else percent(value) for value in less),
        sig(saving_ratio(p, full), 2),
    ]
