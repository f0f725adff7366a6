"""The report's page: sections of HTML from evaluations; no script, nothing fetched, well-formed as XML too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from libs.report import panels, plots
from libs.report.pieces import data_uri, facts, figure, paragraph
from libs.report.read import Evaluation, Point
from libs.report.style import CSS
from libs.report.table import cards, table
from libs.report.text import MACS, point_name, quality_name, quality_word, series_name, sig
from libs.report.verdict import Verdict, correlations, exit_sentence, full_depth, groups, recommend, verdicts


def render(evaluations: Sequence[Evaluation]) -> str:
    """The report as one HTML document."""
    points = [point for evaluation in evaluations for point in evaluation.points]
    full = full_depth(points)
    chosen, _ = recommend(points, full)
    floor = next((f for e in evaluations if (f := e.floor()) is not None), None)
    sections = [
        ("verdict", "Verdict", verdict_section(evaluations, points, full, floor)),
        ("frontier", "Frontier", frontier_section(points, full, chosen, floor)),
        ("points", "All points", table(points, full, chosen)),
    ]
    several = len(evaluations) > 1
    for i, evaluation in enumerate(evaluations):
        end = f" · {evaluation.name}" if several else ""
        tag = f"-{i + 1}" if several else ""
        sections += [
            (f"exits{tag}", f"Where images leave{end}", exits_section(evaluation, full)),
            (f"samples{tag}", f"Samples{end}", samples_section(evaluation, full)),
            (f"uncertainty{tag}", f"Uncertainty{end}", uncertainty_section(evaluation)),
            (f"training{tag}", f"Training{end}", training_section(evaluation)),
            (f"provenance{tag}", f"Provenance{end}", provenance_section(evaluation)),
        ]
    title = "Early exit: " + ", ".join(e.name for e in evaluations)
    targets = [(tag, name) for tag, name, _ in sections]
    if several:  # one link per run instead of one per section
        targets = targets[:3] + [(f"exits-{i + 1}", e.name) for i, e in enumerate(evaluations)]
    links = "".join(f'<a href="#{tag}">{escape(name)}</a>\n' for tag, name in targets)
    body = "".join(f'<section><h2 id="{tag}">{escape(name)}</h2>\n{html}</section>\n' for tag, name, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>\n{paragraph(subtitle(points), 'sub')}<nav>{links}</nav></header>\n"
        f"{body}</main>\n</body>\n</html>\n"
    )


def subtitle(points: Sequence[Point]) -> str:
    record = points[0].record
    sampler = record.get("sampler") or {}
    parts = [f"{len(points)} points", f"a network of {points[0].depth} layers"]
    if sampler:
        parts.append(f"{sampler.get('name', 'sampler not named')}, {sampler.get('steps', '?')} steps")
    seeds = record.get("seeds") or []
    if record.get("n_images"):
        parts.append(
            f"{record['n_images']} images" + (f" for each of {len(seeds)} noise seeds" if len(seeds) > 1 else "")
        )
    return " · ".join(parts)


# ---- sections ------------------------------------------------------------------------------------------------------


def verdict_section(
    evaluations: Sequence[Evaluation], points: Sequence[Point], full: Point | None, floor: float | None
) -> str:
    chosen, why = recommend(points, full)
    n_real = next((e.reference["n_real"] for e in evaluations if "n_real" in e.reference), None)
    html = f'<div class="cards">{cards(points, full, chosen, floor, n_real)}</div>\n'
    if chosen is None:
        html += paragraph("No early-exit policy was evaluated, so there is no point to recommend.", "small")
    else:
        html += paragraph(f"Recommended: {point_name(chosen, len(evaluations) > 1)}, {why}.", "small")
    html += f'<ul class="verdicts">{"".join(map(item, verdicts(points, floor)))}</ul>\n'
    return html + paragraph(
        "Points share their noise seeds, so a difference is called outside the noise when its mean over seeds exceeds "
        "4.3 standard errors (95 % Student-t interval of three seeds). Training seeds are not part of it.",
        "small after",
    )


def item(verdict: Verdict) -> str:
    return f'<li class="{verdict.tone}"><b>{escape(verdict.lead)}</b> {escape(verdict.text)}</li>\n'


def frontier_section(points: Sequence[Point], full: Point | None, chosen: Point | None, floor: float | None) -> str:
    name = quality_name(points[0].quality_key)
    several = len({p.run for p in points}) > 1
    names = ", ".join(dict.fromkeys(series_name(p, several) for p in points))
    depth = "Depth counts layers per network call."
    if any(p.family == "steps" for p in points):
        depth += " Fewer steps keep every layer, so that family stands on a vertical line."
    html = ""
    for x, title, caption in (
        ("seconds", "measured time", "Horizontal bars span the timing runs. Only this plot shows a speed-up."),
        ("gmacs", "arithmetic", MACS),
        ("mean_depth", "mean depth", depth),
    ):
        if not plots.has_axis(points, x):
            html += paragraph(f"No point reports its {title}, so that plot is left out.", "small")
            continue
        if any(p.spread for p in points):
            caption += " Vertical bars are ± one standard deviation over noise seeds."
        if several:
            caption += f" Solid lines, and names without a run, are of {points[0].run}."
        drawn = plots.frontier(points, x, full, chosen, floor)
        html += f"<h3>Quality against {title}</h3>\n" + figure(drawn, f"{name} against {title}: {names}", caption)
    if floor is None:
        html += paragraph("The real-halves floor was not measured (reference.json), so it is not drawn.", "small")
    if {p.family for p in points} <= {"full"}:
        html += paragraph("Only full depth was evaluated: there is no frontier yet.", "small")
    return html


def exits_section(evaluation: Evaluation, full: Point | None) -> str:
    chosen, _ = recommend(evaluation.points, full)
    if chosen is None:
        return paragraph("No early-exit policy was evaluated, so there are no exits to show.")
    exits = evaluation.exits(chosen)
    if exits is None:
        where = f"points/{chosen.slug}/trace.npz"
        return paragraph(f"No trace was saved for {chosen.label} ({where}), so its exits cannot be shown.")
    caption = (
        f"{chosen.label}: the layer after which images leave, at every call of the network, in sampling order from "
        f"noise (t = 1) to data. Layer {exits.depth} is the full network."
    )
    if exits.used.shape[1] == 2:
        pair = (chosen.record.get("guidance") or {}).get("pair", "not recorded")
        caption += f" Guidance runs two branches; pairing: {pair}."
    depths = exits.used.mean(axis=(0, 1))  # (n,)
    spread = (
        f"{chosen.label}: mean depth of each of {len(depths)} images over its {len(exits.t)} calls, from "
        f"{sig(depths.min())} to {sig(depths.max())} layers. A narrow peak means that all images cost the same."
    )
    return (
        paragraph(exit_sentence(exits))
        + figure(panels.heat_map(exits), f"Exit layer by sampling call for {chosen.label}", caption)
        + figure(panels.histogram(exits), f"Mean depth per image for {chosen.label}", spread)
    )


def samples_section(evaluation: Evaluation, full: Point | None) -> str:
    chosen, _ = recommend(evaluation.points, full)
    shown, folded, missing = "", "", []
    for group in groups(evaluation.points):
        for p in sorted(group, key=lambda p: (p is not chosen, p.quality)):
            data = evaluation.grid(p)
            if data is None:
                missing.append(p.label)
            elif p.family in ("fixed", "steps"):
                folded += grid(p, data)
            else:
                shown += grid(p, data, ", recommended" if p is chosen else "")
    if not shown and not folded:
        return paragraph("No sample grid was saved (points/<slug>/grid.png).")
    html = paragraph("The same noise in the same place of every grid: what differs is the depth, or the steps.", "sub")
    if shown:
        html += f'<div class="grids">{shown}</div>\n'
    if folded:
        summary = "<summary>Baselines: fixed layers and fewer steps</summary>"
        html += f'<details>{summary}<div class="grids">{folded}</div></details>\n'
    return html + (paragraph(f"No grid was saved for {', '.join(missing)}.", "small") if missing else "")


def grid(p: Point, data: bytes, note: str = "") -> str:
    width = int.from_bytes(data[16:20], "big")  # in a PNG's first chunk
    kind = "pixels" if width < 640 else "photo"  # small images are shown larger than they are: keep their pixels sharp
    return (
        f'<figure><img class="{kind}" src="{data_uri(data, "image/png")}" alt="Samples, {escape(p.label)}"/>'
        f"<figcaption><b>{escape(p.label)}</b><br/>"
        f"{escape(quality_word(p.quality_key))} {escape(sig(p.quality) + note)}</figcaption></figure>\n"
    )


def uncertainty_section(evaluation: Evaluation, most: int = 2) -> str:
    maps = evaluation.uncertainty()
    if maps is None:
        return paragraph("No uncertainty maps were saved (umaps.npz).")
    html = paragraph(
        "The uncertainty u that an exit predicts for every pixel, above the true difference of its output to the last "
        "layer's (mean over channels). Bright is large; one colour scale, shown below, holds for all times and layers."
    )
    every, within = correlations(maps)
    if every is not None and within is not None:
        judged = "well" if within >= 0.6 else "somewhat" if within >= 0.3 else "hardly at all"
        html += paragraph(
            f"Spearman correlation of u with the true difference: {every:.2f} over everything, and {within:.2f} "
            f"(median) within one time and layer, where time and depth cannot help. There u ranks pixels {judged}."
        )
    for image, number in enumerate(maps.ids[:most]):
        drawn = panels.uncertainty_maps(maps, image)
        html += figure(drawn, f"Uncertainty maps of image {number}", f"Image {number}.")
    return html


def training_section(evaluation: Evaluation) -> str:
    rows = evaluation.train
    if not rows or not panels.training_panels(rows):
        return paragraph("No training log lies beside the results (train.jsonl).")
    caption = f"{rows[-1]['step']:,.0f} training steps"
    if "seconds" in rows[-1]:
        caption += f" in {rows[-1]['seconds'] / 60:,.1f} minutes"
    return figure(panels.training(rows), "Training curves", f"{caption}. Layers are shaded from the first to the last.")


RECORDED = (
    "device", "threads", "batch_size", "n_images", "seeds", "sampler", "guidance", "commit", "config_hash",
)  # fmt: skip


def provenance_section(evaluation: Evaluation) -> str:
    records = [p.record for p in evaluation.points]

    def every(key: str) -> str:
        values = dict.fromkeys(
            json.dumps(r[key], ensure_ascii=False) if not isinstance(r[key], str) else r[key]
            for r in records
            if r.get(key) is not None
        )
        return "; ".join(values) or "not recorded"

    found = [r["versions"] for r in records if isinstance(r.get("versions"), dict)]
    versions = dict.fromkeys(f"{name} {version}" for each in found for name, version in each.items())
    command = every("command")
    if command == "not recorded" and evaluation.config:
        command = str(evaluation.config.get("command", command))
    times = sorted(str(r["time"]) for r in records if r.get("time"))
    rows = [("directory", evaluation.name), ("command", command)]
    rows += [(key.replace("_", " "), every(key)) for key in RECORDED]
    rows += [("versions", ", ".join(versions) or "not recorded")]
    rows += [("evaluated", " to ".join(dict.fromkeys([times[0], times[-1]])) if times else "not recorded")]
    html = facts(rows) + "".join(paragraph(text, "small") for text in evaluation.notes)
    if evaluation.config is None:
        return html + paragraph("No config.json lies beside the results.", "small")
    text = json.dumps(evaluation.config, indent=2, ensure_ascii=False)
    return html + f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>\n"
