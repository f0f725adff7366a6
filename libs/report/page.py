"""What the page shows, as plain values for the templates beside this module; one page for one or many evaluations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from libs.report import figures
from libs.report.entries import Entry, change, speedup
from libs.report.read import Evaluation, Exits
from libs.report.text import (
    MACS,
    NBSP,
    decibels,
    family_name,
    percent,
    quality_name,
    quality_word,
    sig,
    signed,
    speedup_text,
    time_unit,
)
from libs.report.verdict import (
    RULE,
    claim,
    fastest_of_each,
    full_depth,
    rival_of,
    verdicts,
    worth_of_looking,
)

SHOWN = 8  # images of a point


@cache
def templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(sig=sig, percent=percent, signed=signed, times=speedup_text, family=family_name)
    return found


def render(evaluations: Sequence[Evaluation], entries: Sequence[Entry], notes: Sequence[str], tolerance: float) -> str:
    """The page as one HTML document that fetches nothing."""
    said = claim(entries, tolerance)
    several = len({entry.model for entry in entries}) > 1
    full = full_depth(entries)
    places = {evaluation.dir: evaluation for evaluation in evaluations}
    shown = slides(entries, places, said.chosen)
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(dict.fromkeys(entry.model for entry in entries)),
            subtitle=subtitle(entries),
            claim=said,
            basis=basis(said.chosen or entries[0]),
            full=next((look for look in shown if look.entry is full), None),
            looks=[look for look in shown if look.entry is not full],
            chart=figures.frontier(entries, said.chosen, tolerance, lambda e: look_facts(e, entries, full)),
            tolerance=tolerance,
            table=points_table(entries, said.chosen, several),
            fastest=[(e, *against(e, entries)) for e in fastest_of_each(entries, tolerance)],
            several=several,
            verdicts=verdicts(entries),
            controls=worth_of_looking(entries),
            rule=RULE,
            macs=MACS,
            runs=[evaluation_sections(evaluation) for evaluation in evaluations],
            notes=[*notes, *dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes)],
            ramp=figures.gradient(),
            view=(figures.WIDTH, figures.HEIGHT, figures.LEFT, figures.RIGHT, figures.TOP, figures.BOTTOM),
        )
    )


def subtitle(entries: Sequence[Entry]) -> str:
    first = entries[0].first
    sampler = first.record.get("sampler") or {}
    parts = [f"{len(entries)} points", f"{first.depth} layers"]
    if sampler:
        grid = f" on {entries[0].grid}" if entries[0].grid else ""
        parts.append(f"{sampler.get('name', 'sampler not named')}, {first.nfe} calls{grid}")
    if first.record.get("n_images"):
        parts.append(f"{first.record['n_images']} images per noise seed")
    return " · ".join(parts)


def basis(entry: Entry) -> str:
    """What an interval of this entry is over."""
    if len(entry.points) > 1:
        return f"95 % intervals over {len(entry.points)} training seeds"
    n = len(entry.quality[0])
    if n == 1:
        return "one noise seed, so the noise is unknown"
    return f"95 % intervals over {n} noise seeds of one training"


def against(entry: Entry, entries: Sequence[Entry]) -> tuple:
    """(speed-up over full depth, over the honest rival, the rival, change against full depth)"""
    full, rival = full_depth(entries), rival_of(entry, entries)
    over = None if rival is None else speedup(entry, rival)
    return (None, over, rival, None) if full is None else (speedup(entry, full), over, rival, change(entry, full))


# ---- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slide:
    """A point as the slider shows it."""

    entry: Entry
    name: str
    chosen: bool
    images: list[str]  # data URIs
    pixels: bool  # small images: shown larger than they are, with sharp pixels
    depths: list[float] | None  # mean layers per call of each image
    map: dict | None
    exits: str
    facts: list[tuple[str, str]]
    cost: float


def slides(entries: Sequence[Entry], places: dict[Path, Evaluation], chosen: Entry | None) -> list[Slide]:
    """The points of the reference's model that have images or exits, cheap ones first."""
    full = full_depth(entries)
    model = entries[0].model if full is None else full.model
    found = []
    for entry in entries:
        evaluation = places[entry.first.dir]
        images = evaluation.images(entry.first, SHOWN)
        exits = evaluation.exits(entry.first)
        if entry.model != model or (images is None and exits is None):
            continue
        depths = None
        if images and len(images) > 1 and exits is not None and exits.used.shape[2] >= len(images):
            depths = exits.used[:, :, : len(images)].mean(axis=(0, 1)).tolist()
        found.append(
            Slide(
                entry=entry,
                name=entry.label,
                chosen=entry is chosen,
                images=[figures.data_uri(image) for image in images or ()],
                pixels=bool(images) and max(images[0].size) < 64,
                depths=depths,
                map=None if exits is None else figures.depth_map(exits, map_label(entry, exits)),
                exits="" if exits is None else exit_sentence(exits),
                facts=look_facts(entry, entries, full),
                cost=entry.cost if entry.cost is not None else entry.gmacs or 0.0,
            )
        )
    return sorted(found, key=lambda look: -look.cost)


def look_facts(entry: Entry, entries: Sequence[Entry], full: Entry | None) -> list[tuple[str, str]]:
    word = quality_word(entry.first.quality_key)
    facts = [(word, sig(entry.mean))]
    if full is not None and entry is not full:
        faster, over, _, changed = against(entry, entries)
        facts += [("against full depth", signed(changed)), ("speed-up", speedup_text(faster))]
        if not entry.plain:
            facts.append(("over best plain", speedup_text(over)))
        facts.append(("PSNR to full depth", decibels(mean_metric(entry, "psnr"), mean_metric(entry, "ssim"))))
    if entry.mean_depth is not None:
        facts.append(("mean depth", f"{sig(entry.mean_depth)} of {entry.first.depth} layers"))
    return [*facts, ("calls", str(entry.first.nfe))]


def mean_metric(entry: Entry, key: str) -> float | None:
    values = [p.metric(key) for p in entry.points]
    return None if None in values else float(np.mean(values))


def map_label(entry: Entry, exits: Exits) -> str:
    pair = ""
    if exits.used.shape[1] == 2:
        pair = f" Guidance pairs: {(entry.first.record.get('guidance') or {}).get('pair', 'not recorded')}."
    return f"{entry.label}: share of images that leave after each layer, at every call from noise to data.{pair}"


def exit_sentence(exits: Exits) -> str:
    """Whether exits follow time or the image: shares of the variance of the exit; of the conditional branch, if two."""
    used = exits.used[:, 0].astype(np.float64)  # (calls, n)
    branch = " of the conditional branch" if exits.used.shape[1] == 2 else ""
    if used.var() == 0:
        return f"Every image{branch} leaves after layer {used[0, 0]:.0f} at every call."
    time, image = used.mean(1).var() / used.var(), used.mean(0).var() / used.var()
    low, high = np.percentile(used.mean(0), (5, 95))
    return (
        f"Time explains {percent(time)} of the variance of the exit{branch}, the image {percent(image)}. Nine in ten "
        f"images: {sig(low)} to {sig(high)} layers."
    )


# ---- table ---------------------------------------------------------------------------------------------------------


def points_table(entries: Sequence[Entry], chosen: Entry | None, several: bool) -> dict[str, Any]:
    """Heads and rows; a cell is (text, number to sort by). The speed-up stands second."""
    key = entries[0].first.quality_key
    factor, unit = time_unit(max((e.seconds for e in entries if e.seconds is not None), default=1.0))
    heads = ["point", "speed-up", "against full depth", quality_word(key), "over best plain", "depth", "GMACs", "calls"]
    heads += [f"{unit} / image", "images / s", "PSNR, dB", "SSIM"]
    rows = []
    for e in sorted(entries, key=lambda e: (e.cost is None, e.cost if e.cost is not None else e.gmacs or 0)):
        faster, over, _, changed = against(e, entries)
        rate = None if not e.seconds else 1 / e.seconds
        psnr, ssim = mean_metric(e, "psnr"), mean_metric(e, "ssim")
        cells = [
            (speedup_text(faster), faster and faster.mean),
            (
                signed(changed) if e.family != "full" or changed is None or changed.mean else "–",
                changed and changed.mean,
            ),
            (sig(e.mean), e.mean),
            (speedup_text(None if e.plain else over), None if e.plain or not over else over.mean),
            (sig(e.mean_depth), e.mean_depth),
            (sig(e.gmacs), e.gmacs),
            (str(e.first.nfe), e.first.nfe),
            (sig(None if e.seconds is None else e.seconds * factor), e.seconds),
            (sig(rate), rate),
            (decibels(psnr, ssim).removesuffix(f"{NBSP}dB"), psnr),
            (sig(ssim), ssim),
        ]
        rows.append(dict(name=e.name(several), family=family_name(e.family), cells=cells, chosen=e is chosen))
    return dict(heads=heads, rows=rows, quality=quality_name(key))


# ---- one evaluation ------------------------------------------------------------------------------------------------


def evaluation_sections(evaluation: Evaluation) -> dict[str, Any]:
    """The folded sections of one evaluation directory."""
    maps, train, trained = evaluation.uncertainty(), evaluation.train, ""
    if train:
        minutes = f" in {train[-1]['seconds'] / 60:,.0f} minutes" if "seconds" in train[-1] else ""
        trained = f"{train[-1]['step']:,.0f} steps{minutes}."
    return dict(
        name=evaluation.name,
        maps=[] if maps is None else [figures.uncertainty(maps, i) for i in range(min(2, len(maps.ids)))],
        trained=trained,
        charts=figures.training(train) if train else [],
        facts=provenance(evaluation),
        config=evaluation.config and json.dumps(evaluation.config, indent=2, ensure_ascii=False),
        real=halves_note(evaluation),
    )


RECORDED = ("device", "threads", "batch_size", "n_images", "seeds", "selection_seed", "sampler", "guidance", "commit")


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    records = [p.record for p in evaluation.points]

    def every(key: str) -> str:
        found = [r[key] for r in records if r.get(key) is not None]
        texts = dict.fromkeys(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in found)
        return "; ".join(texts) or "not recorded"

    versions = [r["versions"] for r in records if isinstance(r.get("versions"), dict)]
    names = dict.fromkeys(f"{name} {version}" for each in versions for name, version in each.items())
    dates = sorted(str(r["time"]) for r in records if r.get("time"))
    return [
        ("directory", evaluation.name),
        ("command", every("command")),
        *((key.replace("_", " "), every(key)) for key in RECORDED),
        ("versions", ", ".join(names) or "not recorded"),
        ("evaluated", " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "not recorded"),
    ]


def halves_note(evaluation: Evaluation) -> str | None:
    """The distance between two halves of the real images, which is no floor: its numbers of images are others."""
    point = evaluation.points[0]
    value = evaluation.reference.get(f"{point.quality_key}_real_halves")
    if value is None:
        return None
    n_real, n = evaluation.reference.get("n_real"), point.record.get("n_images")
    n_half = evaluation.reference.get("n_half", n_real and n_real // 2)
    halves = "two halves of the real images" + (f" ({n_half} each)" if n_half else "")
    return (
        f"{quality_word(point.quality_key)} between {halves}: {sig(value)}. A distance falls with the number of "
        f"images, so this is no floor for the distances above{f', of {n} images' if n else ''}."
    )
