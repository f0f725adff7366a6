"""The comparison as one HTML document: a sentence per budget, one figure, one table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from libs.comparison.entries import Entry, difference, estimate
from libs.comparison.verdict import RULE, Verdict
from libs.report.pieces import figure, paragraph
from libs.report.plots import MARKERS, Figures, render, tick_plainly
from libs.report.style import CSS
from libs.report.text import MACS, family_name, percent, plus_minus, quality_name, quality_word, sig, time_unit

AXES = {
    "cost": "seconds, share of full depth",
    "gmacs": "GMACs per image",
    "mean_depth": "mean depth, layers per call",
}


def document(
    entries: Sequence[Entry],
    verdicts: Sequence[Verdict],
    findings: Sequence[str],
    notes: Sequence[str],
    title: str,
    quality_key: str,
) -> str:
    items = "".join(f'<li class="{v.tone}">{escape(v.text)}</li>\n' for v in verdicts)
    items += "".join(f"<li>{escape(text)}</li>\n" for text in findings)
    name = quality_name(quality_key)
    caption = (
        f"{name}, smaller is better, mean and 95 % confidence interval over training seeds where there are several, "
        f"else over noise seeds. A line joins the settings of one method. {MACS}"
    )
    methods = ", ".join(method_name(method, entries) for method in methods_of(entries))
    sections = [
        ("Verdict", f'<ul class="verdicts">\n{items}</ul>\n' + paragraph(RULE, "small after")),
        ("Quality against seconds, arithmetic and depth", figure(draw(entries, name), f"{name}: {methods}", caption)),
        ("All points", table(entries, quality_key) + "".join(paragraph(note, "small") for note in notes)),
    ]
    body = "".join(f"<section><h2>{escape(head)}</h2>\n{html}</section>\n" for head, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1></header>\n{body}</main>\n</body>\n</html>\n"
    )


def methods_of(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(entry.method for entry in entries))


def method_name(method: tuple[str, str], entries: Sequence[Entry]) -> str:
    model, family = method
    return family_name(family) + (f" of {model}" if len({entry.model for entry in entries}) > 1 else "")


# ---- figure --------------------------------------------------------------------------------------------------------


def draw(entries: Sequence[Entry], name: str) -> Figures:
    rows = -(-len(methods_of(entries)) // 3)  # of the legend
    return render(draw_panels, (12.5, 5.0 + 0.28 * rows), (5.2, 11.0 + 0.84 * rows), entries, name)


def draw_panels(figure, theme, narrow, entries, name) -> None:
    panels = figure.subplots(3, 1, sharey=True) if narrow else figure.subplots(1, 3, sharey=True)
    means = [entry.mean for entry in entries]
    if min(means) > 0 and max(means) > 4 * min(means):
        tick_plainly(panels[0], means)
    models = list(dict.fromkeys(entry.model for entry in entries))
    families = [f for f in dict.fromkeys(entry.family for entry in entries) if f != "full"]
    handles = []
    for method in methods_of(entries):  # colours tell families, markers and lines tell models
        model, number = models.index(method[0]), families.index(method[1]) if method[1] != "full" else 0
        color = theme.ink if method[1] == "full" else theme.series[number % len(theme.series)]
        face = color if number < len(theme.series) else theme.card  # hollow when the colours start again
        marker, dashes = MARKERS[model % len(MARKERS)], ("-", "--", ":", "-.")[model % 4]
        for axes, x in zip(panels, AXES, strict=True):
            group = [entry for entry in entries if entry.method == method and getattr(entry, x) is not None]
            group.sort(key=lambda entry: getattr(entry, x))
            at = [getattr(entry, x) for entry in group]
            found = [estimate(entry.quality) for entry in group]
            margins = [min(e.margin or 0.0, 0.9 * e.mean) for e in found]  # a log axis has no place for less
            handle = axes.errorbar(
                at, [e.mean for e in found], margins, color=color, marker=marker, mfc=face, mec=color, ls=dashes,
                lw=1.3, elinewidth=0.9, ms=6, alpha=0.9,
            )  # fmt: skip
        handles.append(handle)
    for axes, label in zip(panels, AXES.values(), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    names = [method_name(method, entries) for method in methods_of(entries)]
    figure.suptitle(f"{name}, smaller is better", x=0.01, ha="left", fontsize=12, color=theme.muted)
    figure.legend(handles, names, loc="outside lower left", ncols=1 if narrow else 3, frameon=False, fontsize=10.5)


# ---- table ---------------------------------------------------------------------------------------------------------


def table(entries: Sequence[Entry], quality_key: str) -> str:
    factor, unit = time_unit(max((e.seconds for e in entries if e.seconds is not None), default=1.0))
    full = next(entry for entry in entries if entry.family == "full")
    heads = ["Point", quality_word(quality_key), "seeds", "against full depth", "noise", "share of seconds", "speed-up"]
    heads += [f"{unit} / image", "GMACs / image", "mean depth", "sampler", "NFE"]
    body = ""
    for method in methods_of(entries):
        body += f'<tr class="group"><th colspan="{len(heads)}">{escape(method_name(method, entries))}</th></tr>\n'
        group = [entry for entry in entries if entry.method == method]
        for entry in sorted(group, key=lambda entry: (entry.cost is None, entry.cost, entry.steps)):
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row(entry, full, factor))
            body += f"<tr><th>{escape(entry.label)}</th>{cells}</tr>\n"
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    note = (
        f"{quality_word(quality_key)}: mean ± standard error. Seeds: training x noise. Seconds as measured; shares are "
        "what is compared."
    )
    return (
        f'<div class="table"><table class="points"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        + paragraph(note, "small")
    )


def row(entry: Entry, full: Entry, factor: float) -> list[str]:
    found, gap = estimate(entry.quality), difference(entry, full)
    against, noise = "–", "–"
    if entry is not full:
        against = percent(gap.mean / full.mean, signed=True) if full.mean else sig(gap.mean)
        noise = {True: "outside", False: "inside", None: "unknown"}[gap.clear]
    return [
        plus_minus(found.mean, found.error),
        f"{len(entry.quality)} x {min(len(seeds) for seeds in entry.quality)}",
        against,
        noise,
        "–" if entry.cost is None else percent(entry.cost),
        "–" if entry.cost is None else f"{sig(1 / entry.cost)}×",
        "–" if entry.seconds is None else sig(entry.seconds * factor),
        sig(entry.gmacs),
        f"{sig(entry.mean_depth)} of {entry.depth}",
        entry.sampler,
        str(entry.steps),
    ]
