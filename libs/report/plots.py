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
    return render(draw_frontier, (12.5, 7.2), (5.2, 6.4), points, x, full, chosen, floor)


def draw_frontier(figure, theme, narrow, points, x, full, chosen, floor) -> None:
    axes = figure.add_subplot()
    shown = [p for p in points if getattr(p, x) is not None]
    several = len({p.run for p in points}) > 1
    factor, unit = time_unit(max(p.seconds for p in shown)) if x == "seconds" else (1.0, "")
    label = AXES[x].format(unit={"s": "seconds", "ms": "milliseconds", "µs": "microseconds"}.get(unit, ""))
    order = family_order(points)
    runs = list(dict.fromkeys(p.run for p in points))

    def place(p: Point) -> tuple[float, float]:
        return getattr(p, x) * factor, p.quality

    values = [p.quality for p in shown] + ([floor] if floor else [])
    log = min(values) > 0 and max(values) > 4 * min(values)
    if log:
        axes.set_yscale("log")
    if full is not None:
        axes.axhspan(full.quality, bar(full), color=theme.muted, alpha=0.13, lw=0)
        axes.axhline(full.quality, color=theme.muted, lw=0.8, alpha=0.7)
    obstacles, wanted = [], []  # lines that labels must not cover; (text, anchor, colour, weight)
    for group in groups(shown):
        family, run = group[0].family, group[0].run
        if family == "full":
            color, marker = theme.ink, "*"
        else:
            color = theme.series[order.index(family) % len(theme.series)]
            marker = MARKERS[order.index(family) % len(MARKERS)]
        # never leaving, the last layer, and all steps are all the full network: every line ends there
        own = next((p for p in shown if p.series == (run, "full")), None)
        line = sorted(group + ([own] if own and family != "full" else []), key=place)
        xs, ys = np.array([place(p) for p in line]).T
        axes.plot(xs, ys, color=color, lw=1.6, ls="-" if runs.index(run) == 0 else "--", zorder=3, alpha=0.9)
        for p in group:
            px, py = place(p)
            runs_of = [s * factor for s in p.seconds_runs] if x == "seconds" else []
            xerr = [[max(0, px - min(runs_of))], [max(0, max(runs_of) - px)]] if runs_of else None
            yerr = min(p.spread, 0.9 * py) if p.spread and log else p.spread
            if xerr or yerr:
                axes.errorbar(px, py, yerr=yerr, xerr=xerr, fmt="none", ecolor=color, elinewidth=1.1, zorder=3)
            face = color if runs.index(run) == 0 else theme.card
            size = 13 if family == "full" else 6.5
            axes.plot(px, py, marker, ms=size, color=color, mfc=face, mec=color, mew=1.2, zorder=5)
        obstacles.append(np.stack([xs, ys], axis=1))
        if family != "full":
            first = (
                min(group, key=place) if len({place(p)[0] for p in group}) > 1 else max(group, key=lambda p: p.quality)
            )
            wanted.append((series_name(group[0], several), place(first), color, "bold"))
        else:
            wanted.append((series_name(group[0], several), place(group[0]), color, "bold"))
    if chosen is not None and getattr(chosen, x) is not None:
        axes.plot(*place(chosen), "o", ms=16, mfc="none", mec=theme.ink, mew=1.3, zorder=6)
        wanted.append((f"recommended: {chosen.label}", place(chosen), theme.ink, "normal"))
    axes.set_xlabel(label)
    name = quality_name(points[0].quality_key)
    figure.suptitle(f"{name}, smaller is better", x=0.01, ha="left", fontsize=12, color=theme.muted)
    left = min(place(p)[0] for p in shown)
    right = max(place(p)[0] for p in shown)
    margin = 0.06 * (right - left) or 0.1 * abs(right) or 1
    axes.set_xlim(left - margin, right + margin * (1.6 if narrow else 1.2))
    if floor:
        axes.axhline(floor, color=theme.ink, lw=1.1, ls=(0, (1, 2.2)), zorder=2)
    if log:
        tick_plainly(axes, values)
    fixed = axes.get_yaxis_transform()
    if floor:
        note(axes, (0.005, floor), f"real-halves floor, {sig(floor)}", theme.ink, fixed)
    if full is not None:
        note(axes, (0.005, full.quality), "full depth to +10 %", theme.muted, fixed, above=False)
    put_labels(figure, axes, theme, wanted, obstacles)


def tick_plainly(axes, values: Sequence[float]) -> None:
    """Plain numbers at 1, 2, 5 times powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = min(values), max(values)
    ticks = [m * 10.0**e for e in range(-6, 8) for m in (1, 2, 5) if 0.7 * low <= m * 10.0**e <= 1.4 * high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(False, which="minor")
    axes.set_ylim(0.8 * low, 1.25 * high)


def note(axes, at, text, color, transform, above=True) -> None:
    axes.annotate(
        text, at, xycoords=transform, xytext=(2, 4 if above else -4), textcoords="offset points",
        color=color, fontsize=10.5, va="bottom" if above else "top", zorder=4,
    )  # fmt: skip


def put_labels(figure, axes, theme, wanted, lines) -> None:
    """Write every label beside its anchor, at the nearest of some positions that covers no line, marker or text."""
    figure.canvas.draw()  # fixes the layout, so that text has a size in pixels
    renderer = figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer).padded(2) for text in axes.texts]
    dots = np.concatenate([along(axes.transData.transform(line)) for line in lines])  # (n, 2) pixels
    frame = axes.get_window_extent(renderer)
    around = [(9, 7, "left"), (9, -16, "left"), (-9, 7, "right"), (-9, -16, "right")]
    around += [(dx, dy, "center") for dy in (16, -27, 34, -44, 54, -64, 76, -88, 100) for dx in (0, 50, -50, 100, -100)]
    for text, anchor, color, weight in wanted:
        best, least = None, np.inf
        for i, (dx, dy, align) in enumerate(around):
            label = axes.annotate(
                text, anchor, xytext=(dx, dy), textcoords="offset points", ha=align, color=color, fontweight=weight
            )
            box = label.get_window_extent(renderer).padded(2)
            label.remove()
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            penalty = i + 1000 * (not inside) + 300 * sum(box.overlaps(other) for other in taken)
            penalty += 6 * int(((dots > box.min) & (dots < box.max)).all(axis=1).sum())
            if penalty < least:
                best, least = (dx, dy, align, box), penalty
        dx, dy, align, box = best
        taken.append(box)
        axes.annotate(
            text, anchor, xytext=(dx, dy), textcoords="offset points", ha=align, color=color, fontweight=weight,
            zorder=7, bbox={"boxstyle": "square,pad=0.1", "fc": theme.card, "ec": "none", "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkB": 8} if align == "center" else None,
        )  # fmt: skip


def along(line: np.ndarray) -> np.ndarray:
    """Points every few pixels along a line (n, 2), its corners twice, as covering a marker is worse."""
    legs = [
        np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 5)), endpoint=False)
        for a, b in zip(line[:-1], line[1:], strict=True)
    ]
    return np.concatenate([*legs, line, line])
