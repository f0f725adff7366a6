"""Figures as SVG, each drawn for light and dark pages and for wide and narrow screens; the frontier plots."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from libs.report.read import Point
from libs.report.text import quality_name, series_name, sig, time_unit
from libs.report.verdict import bar, groups

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
MARKERS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Theme:
    """Colours of one page theme; `series` starts with threshold, fixed, steps (Okabe-Ito hues, tuned for contrast)."""

    ink: str
    muted: str
    grid: str
    card: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]  # 0 to 1, light to strong on this card


LIGHT = Theme(
    "#1c2126",
    "#69727c",
    "#e4e6e9",
    "#ffffff",
    ("#0b68ad", "#c4510c", "#00805d", "#a3508a", "#8f6400", "#4c5bb8"),
    ("#ffffff", "#cfe3f3", "#7db5de", "#2f7fbd", "#0a4a80", "#06294a"),
)
DARK = Theme(
    "#e9ebee",
    "#98a2ad",
    "#31373e",
    "#1c2025",
    ("#62b0ee", "#f28f55", "#42c79d", "#e193c6", "#ddb04c", "#a0a9f5"),
    ("#1c2025", "#17385a", "#1f5f96", "#3e90cf", "#8cc3ee", "#e3f2fd"),
)


@dataclass(frozen=True)
class Figures:
    """The four renderings of one figure, SVG text, by (theme, width)."""

    light: str
    dark: str
    light_narrow: str
    dark_narrow: str


def render(draw: Callable[..., None], wide: tuple[float, float], narrow: tuple[float, float], *args) -> Figures:
    """Run `draw(figure, theme, is_narrow, *args)` four times; sizes are in inches at 72 CSS pixels to the inch."""
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def svg(theme: Theme, size: tuple[float, float], is_narrow: bool) -> str:
        style = {
            "font.family": ["DejaVu Sans"],  # measured with this, shown in the reader's own font
            "font.size": 12.0,
            "svg.fonttype": "none",
            "svg.hashsalt": "report",
            "text.color": theme.ink,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.muted,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12.0,
            "axes.titlelocation": "left",
            "axes.titlecolor": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.major.size": 3,
            "ytick.major.size": 0,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": theme.grid,
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "image.interpolation": "nearest",
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)  # gives text a size before anything is saved
            draw(figure, theme, is_narrow, *args)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", buffer.getvalue())
        return re.sub(r"(font: (?:[\w.]+ )*[\d.]+px) [^;\"]*", rf"\1 {FONT}", text)

    return Figures(svg(LIGHT, wide, False), svg(DARK, wide, False), svg(LIGHT, narrow, True), svg(DARK, narrow, True))


def import_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The report draws with matplotlib: pip install matplotlib") from error
    return matplotlib


def family_order(points: Sequence[Point]) -> list[str]:
    """Families in colour order: the three that every report has keep their colours whatever else was evaluated."""
    known = ["threshold", "fixed", "steps"]
    return known + sorted({p.family for p in points} - {"full", *known})


# ---- frontiers -----------------------------------------------------------------------------------------------------

AXES = {
    "mean_depth": "mean depth, layers per network call",
    "gmacs": "GMACs per image, whole sampling",
    "seconds": "measured {unit} per image",
}


def has_axis(points: Sequence[Point], x: str) -> bool:
    return any(getattr(p, x) is not None for p in points)


def frontier(points: Sequence[Point], x: str, full: Point | None, chosen: Point | None, floor: float | None) -> Figures:
    """Quality (smaller is better) against `x`, one of AXES, every series with its own line, colour and marker."""
    return render(draw_frontier, (12.5, 6.8), (5.2, 6.4), points, x, full, chosen, floor)


def draw_frontier(figure, theme, narrow, points, x, full, chosen, floor) -> None:
    shown = [p for p in points if getattr(p, x) is not None]
    factor, unit = time_unit(max(p.seconds for p in shown)) if x == "seconds" else (1.0, "")
    order, runs = family_order(points), list(dict.fromkeys(p.run for p in points))
    qualities = [p.quality for p in shown]

    def place(p: Point) -> tuple[float, float]:
        return getattr(p, x) * factor, p.quality

    # a floor far below all points gets a strip of its own, or it would take half the height from them
    broken = floor is not None and 0 < floor < 0.6 * min(qualities)
    if broken:
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(13, 1))
        break_axis(axes, strip, theme, floor)
    else:
        axes = strip = figure.add_subplot()
    values = qualities + ([floor] if floor is not None and not broken else [])
    log = min(values) > 0 and max(values) > 4 * min(values)
    if log:
        tick_plainly(axes, values)
    if full is not None:
        axes.axhspan(full.quality, bar(full), color=theme.muted, alpha=0.13, lw=0)
        axes.axhline(full.quality, color=theme.muted, lw=0.8, alpha=0.7)
    lines, wanted = [], []  # what labels must not cover; (text, possible anchors, colour, weight)
    for group in groups(shown):
        family, run = group[0].family, group[0].run
        style = order.index(family) if family != "full" else 0
        color = theme.series[style % len(theme.series)] if family != "full" else theme.ink
        marker, size = (MARKERS[style % len(MARKERS)], 6.5) if family != "full" else ("*", 13)
        # never leaving, the last layer, and all steps are all the full network: every line ends there
        end = [p for p in shown if p.series == (run, "full") and family != "full"][:1]
        line = np.array([place(p) for p in sorted(group + end, key=place)])  # (n, 2)
        axes.plot(*line.T, color=color, lw=1.6, ls="-" if run == runs[0] else "--", zorder=3, alpha=0.9)
        lines.append(line)
        for p in group:
            error_bars(axes, place(p), p, factor if x == "seconds" else None, color, log)
            face = color if run == runs[0] else theme.card
            axes.plot(*place(p), marker, ms=size, color=color, mfc=face, mec=color, mew=1.2, zorder=5)
        anchors = sorted((place(p) for p in group), key=lambda at: (at[0], -at[1]))
        wanted.append((series_name(group[0], run != runs[0]), anchors, color, "bold"))  # short names fit
    if chosen is not None and getattr(chosen, x) is not None:
        axes.plot(*place(chosen), "o", ms=16, mfc="none", mec=theme.ink, mew=1.3, zorder=6)
        wanted.append(
            ("recommended" if narrow else f"recommended: {chosen.label}", [place(chosen)], theme.ink, "normal")
        )
    left, right = min(place(p)[0] for p in shown), max(place(p)[0] for p in shown)
    margin = 0.06 * (right - left) or 0.1 * abs(right) or 1
    axes.set_xlim(left - margin, right + margin)
    strip.set_xlabel(AXES[x].format(unit={"s": "seconds", "ms": "milliseconds", "µs": "microseconds"}.get(unit)))
    name = quality_name(points[0].quality_key)
    figure.suptitle(f"{name}, smaller is better", x=0.01, ha="left", fontsize=12, color=theme.muted)
    if floor is not None:
        strip.axhline(floor, color=theme.ink, lw=1.1, ls=(0, (1, 2.2)), zorder=2)
        note(strip, floor, f"real-halves floor, {sig(floor)}", theme.ink)
    if full is not None:
        note(axes, full.quality, "full depth to +10 %", theme.muted, above=False)
    put_labels(figure, axes, theme, wanted, lines)


def break_axis(axes, strip, theme, floor: float) -> None:
    """Show that the strip below is not on the scale above: no common spine, two short strokes at the gap."""
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(bottom=False)
    strip.set(ylim=(0.8 * floor, 1.4 * floor), yticks=[])
    stroke = {"marker": [(-1, -0.6), (1, 0.6)], "ms": 9, "color": theme.muted, "clip_on": False}
    for panel, y in ((axes, 0), (strip, 1)):
        panel.plot(0, y, transform=panel.transAxes, **stroke)


def error_bars(axes, at, p: Point, factor: float | None, color, log: bool) -> None:
    """Standard deviation over seeds upright, and the range of the timing runs sideways where x is time."""
    spans = [s * factor for s in p.seconds_runs] if factor is not None else []
    xerr = [[max(0, at[0] - min(spans))], [max(0, max(spans) - at[0])]] if spans else None
    yerr = min(p.spread, 0.9 * at[1]) if p.spread and log else p.spread
    if xerr or yerr:
        axes.errorbar(*at, yerr=yerr, xerr=xerr, fmt="none", ecolor=color, elinewidth=1.1, zorder=3)


def tick_plainly(axes, values: Sequence[float]) -> None:
    """A logarithmic axis over the values, with plain numbers at 1, 2, 3, 5 times powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = min(values), max(values)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-6, 8) for m in (1, 2, 3, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(False, which="minor")
    axes.set_ylim(0.85 * low, 1.25 * high)


def note(axes, y: float, text: str, color: str, above: bool = True) -> None:
    axes.annotate(
        text, (0.005, y), xycoords=axes.get_yaxis_transform(), xytext=(2, 4 if above else -4),
        textcoords="offset points", color=color, fontsize=10.5, va="bottom" if above else "top", zorder=4,
    )  # fmt: skip


NEAR = [(9, 7, 0.0), (9, -16, 0.0), (-9, 7, 1.0), (-9, -16, 1.0)]  # offset in points, share of the width to the left
FAR = [(x, y, 0.5) for y in (16, -27, 34, -44, 54, -64, 76, -88, 100) for x in (0, 50, -50, 100, -100)]

ALIGN = {0.0: "left", 0.5: "center", 1.0: "right"}


def put_labels(figure, axes, theme, wanted, lines) -> None:
    """Write every label beside one of its anchors, at the nearest position that covers no line, marker or text."""
    figure.draw_without_rendering()  # fixes the layout, so that text has a size in pixels
    renderer = figure.canvas.get_renderer()
    point = figure.dpi / 72
    taken = [text.get_window_extent(renderer).padded(2).extents for text in axes.texts]
    dots = np.concatenate([along(axes.transData.transform(line)) for line in lines])  # (n, 2) pixels
    x0, y0, x1, y1 = axes.get_window_extent(renderer).extents
    for text, anchors, color, weight in wanted:
        probe = axes.text(0, 0, text, fontweight=weight)
        size = probe.get_window_extent(renderer).size
        probe.remove()
        best, least = None, np.inf
        for rank, anchor in enumerate(anchors):
            pixel = axes.transData.transform(anchor)
            for i, (dx, dy, share) in enumerate(NEAR + FAR):
                low = pixel + (dx * point - share * size[0] - 2, dy * point - 4)
                high = low + size + 4
                outside = low[0] < x0 or low[1] < y0 or high[0] > x1 + 20 or high[1] > y1
                hits = sum(low[0] < b[2] and high[0] > b[0] and low[1] < b[3] and high[1] > b[1] for b in taken)
                covered = int(((dots > low) & (dots < high)).all(axis=1).sum())
                penalty = i + 12 * rank + 1000 * outside + 300 * hits + 6 * covered
                if penalty < least:
                    best, least = (anchor, dx, dy, share, (*low, *high)), penalty
        anchor, dx, dy, share, box = best
        taken.append(box)
        axes.annotate(
            text, anchor, xytext=(dx, dy), textcoords="offset points", ha=ALIGN[share], color=color,
            fontweight=weight, zorder=7,
            bbox={"boxstyle": "square,pad=0.1", "fc": theme.card, "ec": "none", "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkB": 8} if share == 0.5 else None,
        )  # fmt: skip


def along(line: np.ndarray) -> np.ndarray:
    """Points every few pixels along a line (n, 2), its corners twice, as covering a marker is worse."""
    legs = [
        np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 5)), endpoint=False)
        for a, b in zip(line[:-1], line[1:], strict=True)
    ]
    return np.concatenate([*legs, line, line])
