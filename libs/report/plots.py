"""Figures of the report: each is drawn for light and dark pages and for wide and narrow screens, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from libs.report.read import Exits, Point, Uncertainty
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
    from matplotlib.figure import Figure

    def svg(theme: Theme, size: tuple[float, float], is_narrow: bool) -> str:
        style = {
            "font.family": ["DejaVu Sans"],  # measured with this, shown in the reader's own font
            "font.size": 11.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "report",
            "text.color": theme.ink,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.muted,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11.5,
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
            draw(figure, theme, is_narrow, *args)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", buffer.getvalue())
        return re.sub(r"(font: (?:[\w.]+ )*[\d.]+px) [^;\"]*", rf"\1 {FONT}", text)

    return Figures(
        svg(LIGHT, wide, False), svg(DARK, wide, False), svg(LIGHT, narrow, True), svg(DARK, narrow, True)
    )


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
    return render(draw_frontier, (12.5, 6.2), (5.2, 5.6), points, x, full, chosen, floor)


def draw_frontier(figure, theme, narrow, points, x, full, chosen, floor) -> None:
    axes = figure.add_subplot()
    shown = [p for p in points if getattr(p, x) is not None]
    several = len({p.run for p in points}) > 1
    factor, unit = time_unit(min(p.seconds for p in shown)) if x == "seconds" else (1.0, "")
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
    obstacles, wanted = [], []  # what labels must not cover; (text, anchor, colour, weight)
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
        obstacles += list(zip(xs, ys, strict=True))
        if family != "full":
            first = min(group, key=place) if len({place(p)[0] for p in group}) > 1 else max(group, key=lambda p: p.quality)
            wanted.append((series_name(group[0], several), place(first), color, "bold"))
        else:
            wanted.append((series_name(group[0], several), place(group[0]), color, "bold"))
    if chosen is not None and getattr(chosen, x) is not None:
        axes.plot(*place(chosen), "o", ms=16, mfc="none", mec=theme.ink, mew=1.3, zorder=6)
        wanted.append((f"recommended: {chosen.label}", place(chosen), theme.ink, "normal"))
    axes.set_xlabel(label)
    name = quality_name(points[0].quality_key)
    figure.suptitle(f"{name}, smaller is better", x=0.01, ha="left", fontsize=11.5, color=theme.muted)
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
    put_labels(figure, axes, wanted, obstacles)


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
        color=color, fontsize=10, va="bottom" if above else "top", zorder=4,
    )  # fmt: skip


def put_labels(figure, axes, wanted, obstacles) -> None:
    """Write every label beside its anchor, at the first of some positions that covers nothing drawn before."""
    figure.canvas.draw()  # fixes the layout, so that text has a size in pixels
    renderer = figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer).padded(2) for text in axes.texts]
    dots = axes.transData.transform(np.array(obstacles))
    frame = axes.get_window_extent(renderer)
    around = [(9, 7, "left"), (9, -15, "left"), (-9, 7, "right"), (-9, -15, "right")]
    around += [(dx, dy, "center") for dy in (16, -26, 34, -44, 54, -64, 76, -86) for dx in (0, 45, -45, 90, -90)]
    for text, anchor, color, weight in wanted:
        best, fewest = None, np.inf
        for dx, dy, align in around:
            label = axes.annotate(
                text, anchor, xytext=(dx, dy), textcoords="offset points", ha=align, color=color,
                fontweight=weight, fontsize=11, zorder=7,
            )  # fmt: skip
            box = label.get_window_extent(renderer).padded(2)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            hits = 8 * (not inside) + 3 * sum(box.overlaps(other) for other in taken)
            hits += int(((dots > box.min - 3) & (dots < box.max + 3)).all(axis=1).sum())
            label.remove()
            if hits < fewest:
                best, fewest = (dx, dy, align, box), hits
            if hits == 0:
                break
        dx, dy, align, box = best
        taken.append(box)
        far = abs(dy) > 20
        axes.annotate(
            text, anchor, xytext=(dx, dy), textcoords="offset points", ha=align, color=color, fontweight=weight,
            fontsize=11, zorder=7, arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkB": 8} if far else None,
        )  # fmt: skip


# ---- exits ---------------------------------------------------------------------------------------------------------


def heat_map(exits: Exits) -> Figures:
    """Share of images that leave at each layer (y) at each sampling call (x, noise end left), per guidance branch."""
    branches = exits.used.shape[1]
    height = 1.2 + 0.26 * min(max(exits.depth, 9), 20)
    return render(draw_heat_map, (12.5, branches * height), (5.2, branches * height), exits)


def exit_shares(exits: Exits, branch: int) -> np.ndarray:
    """(depth + 1, calls): share of the images that used k layers at each call; columns add up to 1."""
    used = exits.used[:, branch]  # (calls, n)
    return np.stack([np.bincount(row, minlength=exits.depth + 1) for row in used], axis=1) / used.shape[1]


def draw_heat_map(figure, theme, narrow, exits) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    calls, branches, _ = exits.used.shape
    ramp = LinearSegmentedColormap.from_list("share", theme.ramp)
    lowest = 0 if (exits.used == 0).any() else 1  # exit 0 leaves before the first layer
    panels = np.atleast_1d(figure.subplots(branches, 1, sharex=True))
    for branch, axes in enumerate(panels):
        shares = exit_shares(exits, branch)[lowest:]
        image = axes.imshow(
            shares, cmap=ramp, vmin=0, vmax=1, aspect="auto", origin="lower",
            extent=(0.5, calls + 0.5, lowest - 0.5, exits.depth + 0.5),
        )  # fmt: skip
        axes.plot(
            np.arange(1, calls + 1), exits.used[:, branch].mean(axis=1), color=theme.series[1], lw=2, marker="o",
            ms=3.5 if calls <= 60 else 0,
        )  # fmt: skip
        axes.grid(False)
        axes.set_ylabel("layer left after")
        axes.yaxis.set_major_locator(whole_ticks(12))
        if branches == 2:
            axes.set_title(("conditional branch", "null branch")[branch])
    at = np.unique(np.linspace(0, calls - 1, min(calls, 6 if narrow else 11)).round().astype(int))
    panels[-1].set_xticks(at + 1, [f"{i + 1}\n{exits.t[i]:.2f}" for i in at])
    panels[-1].set_xlabel("← noise end      sampling call, t below      data end →")
    colours = figure.colorbar(image, ax=panels, pad=0.015, aspect=26, fraction=0.05)
    colours.outline.set_visible(False)
    colours.set_ticks([0, 0.5, 1], labels=["0", "50 %", "100 %"])
    colours.set_label("share of images")
    panels[0].annotate(
        "line: mean depth", (1, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", color=theme.series[1],
    )  # fmt: skip


def whole_ticks(most: int):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True)


def histogram(exits: Exits) -> Figures:
    """Mean depth of every image over all its calls (and both branches)."""
    return render(draw_histogram, (12.5, 3.2), (5.2, 3.4), exits)


def draw_histogram(figure, theme, narrow, exits) -> None:
    depths = exits.used.mean(axis=(0, 1))  # (n,)
    axes = figure.add_subplot()
    axes.hist(depths, bins=np.linspace(0, exits.depth, 12 * exits.depth + 1 if exits.depth < 12 else 141),
              color=theme.series[0], alpha=0.85)  # fmt: skip
    mean = depths.mean()
    axes.axvline(mean, color=theme.ink, lw=1.2)
    left = mean > 0.6 * exits.depth
    axes.annotate(
        f"mean {sig(mean)} of {exits.depth}", (mean, 0.97), xycoords=axes.get_xaxis_transform(),
        xytext=(-7 if left else 7, 0), textcoords="offset points", ha="right" if left else "left", va="top",
    )  # fmt: skip
    axes.set_xlim(0, exits.depth + 0.05)
    axes.xaxis.set_major_locator(whole_ticks(14))
    axes.yaxis.set_major_locator(whole_ticks(5))
    axes.set_xlabel("mean depth of one image, layers")
    axes.set_ylabel("images")


# ---- uncertainty maps ----------------------------------------------------------------------------------------------


def uncertainty_maps(maps: Uncertainty, image: int) -> Figures:
    """u above the true difference, for one image: rows are exits, columns are times, one colour scale per kind."""
    return render(draw_maps, (12.5, 0.9 + 2 * 1.65 * len(some(maps.k, 3)) + 1.6), (5.2, 0.9 + 1.9 * len(some(maps.k, 3)) + 1), maps, image)


def some(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values, evenly spread, ends included."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))


def draw_maps(figure, theme, narrow, maps, image) -> None:
    exits = some(maps.k, 3)
    times = some(maps.t, 4 if narrow else 6)[np.argsort(-maps.t[some(maps.t, 4 if narrow else 6)], kind="stable")]
    panels = figure.subplots(1 + 2 * len(exits), len(times), squeeze=False)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    shown = {}
    for column, t in enumerate(times):
        pixels = maps.x0[t, image].transpose(1, 2, 0)  # (H, W, C)
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        panels[0, column].imshow(pixels)
        panels[0, column].set_title(f"t = {maps.t[t]:.2f}", loc="center", color=theme.muted)
        for row, k in enumerate(exits):
            for offset, (name, values, colours) in enumerate(
                (("u", maps.u, "cividis"), ("error", maps.error, "magma"))
            ):
                picked = values[times][:, exits, image]
                low, high = float(picked.min()), float(picked.max())
                axes = panels[1 + 2 * row + offset, column]
                shown[name] = axes.imshow(values[t, k, image], cmap=colours, vmin=min(0, low), vmax=high or 1)
    panels[0, 0].set_ylabel("image")
    for row, k in enumerate(exits):
        panels[1 + 2 * row, 0].set_ylabel(f"u, layer {maps.k[k]}")
        panels[2 + 2 * row, 0].set_ylabel("difference")
    panels[0, 0].annotate("noise end", (0, 1), xycoords="axes fraction", xytext=(0, 22), textcoords="offset points", color=theme.muted)
    panels[0, -1].annotate("data end", (1, 1), xycoords="axes fraction", xytext=(0, 22), textcoords="offset points", color=theme.muted, ha="right")
    for name, label in (("u", "predicted uncertainty u"), ("error", "true difference |eps_k − eps_K|")):
        colours = figure.colorbar(shown[name], ax=panels, location="bottom", pad=0.012, aspect=40, fraction=0.03)
        colours.outline.set_visible(False)
        colours.set_label(label)


# ---- training ------------------------------------------------------------------------------------------------------


def training(rows: Sequence[dict[str, float]]) -> Figures:
    """Losses, and where logged the error and the uncertainty of every exit, against the training step."""
    panels = training_panels(rows)
    return render(draw_training, (12.5, 4.2), (5.2, 3.4 * len(panels)), rows, panels)


def training_panels(rows: Sequence[dict[str, float]]) -> list[tuple[str, list[str]]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def layers(prefix: str) -> list[str]:
        return sorted((key for key in keys if re.fullmatch(rf"{prefix}_\d+", key)), key=lambda key: int(key[len(prefix) + 1 :]))

    panels = [("loss", [key for key in ("loss", "simple", "uem", "layers") if key in keys])]
    panels += [("squared error of the exits", layers("err")), ("mean uncertainty u of the exits", layers("u"))]
    return [(title, columns) for title, columns in panels if columns]


def curve(rows: Sequence[dict[str, float]], key: str, most: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), averaged over consecutive lines where there are more than `most`."""
    pairs = np.array([(row["step"], row[key]) for row in rows if key in row])  # (n, 2)
    chunks = np.array_split(pairs, min(most, len(pairs)))
    return tuple(np.array([chunk.mean(axis=0) for chunk in chunks]).T)


def draw_training(figure, theme, narrow, rows, panels) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("layers", theme.ramp[2:] if theme is LIGHT else theme.ramp[2:])
    grid = figure.subplots(len(panels), 1) if narrow else figure.subplots(1, len(panels))
    for axes, (title, columns) in zip(np.atleast_1d(grid), panels, strict=True):
        ends = []
        for i, key in enumerate(columns):
            color = theme.series[i] if title == "loss" else ramp(i / max(1, len(columns) - 1))
            steps, values = curve(rows, key)
            axes.plot(steps, values, color=color, lw=1.6)
            finite = values[np.isfinite(values)]
            if len(finite):
                name = key if title == "loss" else f"layer {key.split('_')[1]}"
                ends.append((finite[-1], name, color, steps[-1]))
            if title == "loss" and len(finite) and finite.min() > 0:
                axes.set_yscale("log")
        if title != "loss" and len(ends) > 2:
            ends = [ends[0], ends[-1]]  # the ramp orders the layers between
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(whole_ticks(4))
        end_labels(figure, axes, ends)


def end_labels(figure, axes, ends) -> None:
    """Names at the right ends of curves, pushed apart until they do not overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    height = 15.0  # points
    figure.canvas.draw()
    scale = 72 / figure.dpi
    want = [axes.transData.transform((x, y))[1] * scale for y, _, _, x in ends]
    put = list(want)
    for i in range(1, len(put)):
        put[i] = max(put[i], put[i - 1] + height)
    shift = (sum(want) - sum(put)) / len(put)
    for (y, name, color, x), at, wish in zip(ends, put, want, strict=True):
        axes.annotate(
            name, (x, y), xytext=(6, at + shift - wish), textcoords="offset points", color=color, va="center", fontsize=11,
        )  # fmt: skip
