"""Figures as numbers for the templates: where ticks, marks and lines stand in an SVG, and small pictures as data URIs.

Colours are names that the style sheet gives a value per theme; maps have one fixed scale, bright is large in both.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from libs.report.entries import Entry, gap
from libs.report.read import Exits, Uncertainty
from libs.report.text import family_name, quality_name, sig
from libs.report.verdict import full_depth

WIDTH, HEIGHT = 720, 400  # user units; text is larger in them on narrow screens
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 16, 52
TONES, MARKS = 6, ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Axis:
    """Values `low` to `high` at the user units `start` to `stop`, with few round ticks."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.stop - self.start), 1)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """(place, text) of at most `most` ticks."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**e for e in exponents for m in steps if self.low <= m * 10.0**e <= self.high]
                if len(found) <= most:
                    break
            if len(found) >= 3:
                return [(self(x), f"{x:g}") for x in found[:most]]
        rough = (self.high - self.low) / most or 1
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(i * step), f"{i * step:.10g}") for i in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    name: str
    tone: str  # "s0" … or "ink"
    mark: str = "circle"
    hollow: bool = False
    line: str = ""  # points of a polyline
    dots: list[dict] = field(default_factory=list)  # x, y, bar (top, bottom) or None, title, chosen


@dataclass(frozen=True)
class Chart:
    label: str  # what a reader who cannot see it hears
    x: Axis
    y: Axis
    series: list[Series]
    band: tuple[float, float] | None = None  # top, and bottom: full depth
    names: tuple[str, str] = ("", "")


def axes(xs: Sequence[float], ys: Sequence[float], log: bool | None = None) -> tuple[Axis, Axis]:
    low, high = min(ys), max(ys)
    log = low > 0 and high > 4 * low if log is None else log and low > 0
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    span = (0.85 * low, 1.2 * high) if log else (low - pad, high + pad)
    return Axis(0.0, max(xs) * 1.04 or 1.0, LEFT, WIDTH - RIGHT), Axis(*span, HEIGHT - BOTTOM, TOP, log)


def polyline(at: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in at)


def frontier(
    entries: Sequence[Entry], chosen: Entry | None, tolerance: float, facts: Callable[[Entry], list[tuple[str, str]]]
) -> Chart | None:
    """Quality against seconds (GMACs where nothing was timed), as shares of full depth; None without either.

    Bars are 95 % intervals of the difference to full depth, which therefore has none. A mark's title is its `facts`.
    """
    full, several = full_depth(entries), len({entry.model for entry in entries}) > 1
    timed = any(entry.cost is not None for entry in entries)
    unit = 1.0 if timed or full is None or not full.gmacs else full.gmacs
    cost = {id(e): e.cost if timed else e.gmacs and e.gmacs / unit for e in entries}
    shown = [e for e in entries if cost[id(e)] is not None]
    if not shown:
        return None
    x, y = axes([cost[id(e)] for e in shown], [e.mean for e in shown])
    methods = list(dict.fromkeys(e.method for e in shown))  # colours tell families, marks tell models
    models = list(dict.fromkeys(model for model, _ in methods))
    families = [family for family in dict.fromkeys(e.family for e in shown) if family != "full"]
    series = []
    for model, family in methods:
        group = sorted((e for e in shown if e.method == (model, family)), key=lambda e: cost[id(e)])
        dots = []
        for e in group:
            found = gap(e, full) if full is not None and e is not full else None
            bar = None if found is None or found.low is None else (y(full.mean + found.high), y(full.mean + found.low))
            title = "\n".join([e.name(several), *(f"{key}: {value}" for key, value in facts(e))])
            dots.append(dict(x=x(cost[id(e)]), y=y(e.mean), bar=bar, title=title, chosen=e is chosen))
        number = families.index(family) if family != "full" else 0
        best = [d for i, d in enumerate(dots) if all(e.mean > group[i].mean for e in group[:i])]
        series.append(
            Series(
                name=family_name(family) + (f" · {model}" if several else ""),
                tone="ink" if family == "full" else f"s{number % TONES}",
                mark=MARKS[models.index(model) % len(MARKS)],
                hollow=number >= TONES,
                line=polyline([(d["x"], d["y"]) for d in best]),  # the settings that no cheaper one of it beats
                dots=dots,
            )
        )
    top = None if full is None else (y((1 + tolerance) * full.mean), y(full.mean))
    names = (f"{'seconds' if timed else 'GMACs'} per image, full depth = 1", quality_name(shown[0].first.quality_key))
    label = f"{names[1]} against {names[0]}: {', '.join(s.name for s in series)}"
    return Chart(label, x, y, series, top, names)


def training(rows: Sequence[dict[str, float]]) -> list[Chart]:
    """Losses, and where logged the squared error of the first, middle and last exit, against the training step."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    exits = sorted((key for key in keys if re.fullmatch(r"err_\d+", key)), key=lambda key: int(key[4:]))
    some = [exits[i] for i in sorted({0, len(exits) // 2, len(exits) - 1})] if exits else []
    groups = {"loss": [k for k in ("loss", "simple", "uem", "layers") if k in keys], "squared error after layer": some}
    charts = []
    for title, columns in groups.items():
        curves = {key: curve(rows, key) for key in columns}
        curves = {key: found for key, found in curves.items() if len(found)}
        if not curves:
            continue
        every = np.concatenate(list(curves.values()))  # (n, 2)
        x, y = axes(every[:, 0].tolist(), every[:, 1].tolist(), log=bool(every[:, 1].min() > 0))
        series = [
            Series(key.removeprefix("err_"), f"s{i}", line=polyline([(x(a), y(b)) for a, b in found]))
            for i, (key, found) in enumerate(curves.items())
        ]
        charts.append(Chart(f"{title} against the training step", x, y, series, names=("training step", title)))
    return charts


def curve(rows: Sequence[dict[str, float]], key: str, most: int = 200) -> np.ndarray:
    """(n, 2) steps and finite values, averaged over consecutive lines where there are more than `most`."""
    pairs = np.array([(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])])
    if not len(pairs):
        return pairs
    return np.array([chunk.mean(axis=0) for chunk in np.array_split(pairs, min(most, len(pairs)))])


# ---- pictures ------------------------------------------------------------------------------------------------------


def ramp(values: np.ndarray) -> np.ndarray:
    """Values of 0 to 1 in the page's one colour scale, (..., 3) uint8."""
    from matplotlib import colormaps

    return (colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255).round().astype(np.uint8)


def gradient() -> str:
    """The colour scale as stops of a CSS gradient."""
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in ramp(np.linspace(0, 1, 9)))


def data_uri(image: Image.Image, most: int = 192) -> str:
    """Small images as they are (PNG), large ones reduced to `most` pixels (WebP)."""
    if max(image.size) <= 64:
        return encoded(image, "PNG", optimize=True)
    if max(image.size) > 2 * most:
        image = image.copy()
        image.thumbnail((most, most))
    return encoded(image, "WEBP", quality=88)


def png_uri(pixels: np.ndarray) -> str:
    """(H, W, 3 or 4) uint8, exactly."""
    return encoded(Image.fromarray(pixels), "PNG", optimize=True)


def encoded(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def exit_shares(exits: Exits, branch: int) -> np.ndarray:
    """(depth + 1, calls): share of the images that used k layers at each call; columns add up to 1."""
    used = exits.used[:, branch]  # (calls, n)
    return np.stack([np.bincount(row, minlength=exits.depth + 1) for row in used], axis=1) / used.shape[1]


def depth_map(exits: Exits, label: str) -> dict:
    """Share of images that leave after each layer (upwards) at each call (noise left), a panel per guidance branch."""
    calls = exits.used.shape[0]
    lowest = 0 if (exits.used == 0).any() else 1  # exit 0 leaves before the first layer
    names = ("conditional branch", "null branch") if exits.used.shape[1] == 2 else ("",)
    rows = exits.depth + 1 - lowest
    height = 150
    panels = [
        dict(name=name, uri=png_uri(ramp(exit_shares(exits, branch)[lowest:][::-1])))
        for branch, name in enumerate(names)
    ]
    every = -(-rows // 4)
    layers = [(k, height * (1 - (k - lowest + 0.5) / rows)) for k in range(exits.depth, lowest - 1, -every)]
    inner = WIDTH - LEFT - RIGHT
    times_ = [(LEFT + inner * (i + 0.5) / calls, f"{exits.t[i]:.2f}") for i in range(0, calls, -(-calls // 7))]
    return dict(label=label, panels=panels, layers=layers, times=times_, height=height, inner=inner)


def some(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values, evenly spread, ends included."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))


def uncertainty(maps: Uncertainty, image: int) -> dict:
    """u above the true difference for one image: rows are exits but the last, columns times, noise end left.

    Both have one scale, the square root of the value up to the largest of either, so that deep layers can be seen.
    """
    depth = [i for i in range(len(maps.k)) if maps.k[i] < maps.k.max() or len(maps.k) == 1]
    exits = [depth[i] for i in some(np.array(depth), 3)]
    times_ = some(maps.t, 6)
    times_ = times_[np.argsort(-maps.t[times_], kind="stable")]
    most = float(max(v[:, depth, image].max() for v in (maps.u, maps.error))) or 1.0
    rows, names = [maps.x0[times_, image].transpose(0, 2, 3, 1)], ["image"]  # each (times, H, W, 1 or 3)
    for k in exits:
        rows += [ramp(np.sqrt(np.clip(v[times_, k, image], 0, None) / most)) for v in (maps.u, maps.error)]
        names += [f"u after {maps.k[k]}", "true"]
    height, width = maps.x0.shape[-2:]  # larger than the maps, by a whole factor, where the network denoises latents
    gap_ = max(1, round(0.08 * width))
    mosaic = np.zeros((len(rows) * (height + gap_) - gap_, len(times_) * (width + gap_) - gap_, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            y, x = i * (height + gap_), j * (width + gap_)
            tile = tile.repeat(height // len(tile), 0).repeat(width // tile.shape[1], 1)
            mosaic[y : y + height, x : x + width, :3] = tile
            mosaic[y : y + height, x : x + width, 3] = 255
    at = [f"{maps.t[i]:.2f}" for i in times_]
    ids = int(maps.ids[image])
    return dict(id=ids, uri=png_uri(mosaic), rows=names, times=at, most=sig(most), size=mosaic.shape[:2])
