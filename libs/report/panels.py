"""The other figures of the report: where images leave, uncertainty maps, training curves."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from libs.report.plots import Figures, render
from libs.report.read import Exits, Uncertainty
from libs.report.text import sig

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
        axes.yaxis.set_major_locator(ticks(12))
        if branches == 2:
            axes.set_title(("conditional branch", "null branch")[branch])
    at = np.arange(0, calls, -(-calls // (6 if narrow else 12)))
    panels[-1].set_xticks(at + 1, [f"{i + 1}\n{exits.t[i]:.2f}" for i in at])
    panels[-1].set_xlabel("sampling call, t below it")
    for x, text, align in ((0, "← noise end", "left"), (1, "data end →", "right")):
        panels[-1].annotate(
            text, (x, 0), xycoords="axes fraction", xytext=(0, -51 if narrow else -37), textcoords="offset points",
            ha=align, va="top", color=theme.ink,
        )  # fmt: skip
    colours = figure.colorbar(image, ax=panels, pad=0.015, aspect=26, fraction=0.05)
    colours.outline.set_visible(False)
    colours.set_ticks([0, 0.5, 1], labels=["0", "50 %", "100 %"])
    colours.set_label("share of images")
    panels[0].annotate(
        "line: mean depth", (1, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", color=theme.series[1],
    )  # fmt: skip


def ticks(most: int, whole: bool = True):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=whole)


def histogram(exits: Exits) -> Figures:
    """Mean depth of every image over all its calls (and both branches)."""
    return render(draw_histogram, (12.5, 3.2), (5.2, 3.4), exits)


def draw_histogram(figure, theme, narrow, exits) -> None:
    depths = exits.used.mean(axis=(0, 1))  # (n,)
    axes = figure.add_subplot()
    # a mean over c calls is a multiple of 1/c: bins hold whole numbers of multiples, or some would look empty
    parts = exits.used.shape[0] * exits.used.shape[1]
    wide = max(1, round(parts * exits.depth / 90))
    edges = (np.arange(-1, parts * exits.depth + wide, wide) + 0.5) / parts
    axes.hist(depths, bins=edges, color=theme.series[0], alpha=0.85)
    mean = depths.mean()
    axes.axvline(mean, color=theme.ink, lw=1.2)
    axes.annotate(
        f"mean {sig(mean)} of {exits.depth}", (mean, 1), xycoords=axes.get_xaxis_transform(),
        xytext=(0, 4), textcoords="offset points", ha="right" if mean > 0.8 * exits.depth else "center",
    )  # fmt: skip
    axes.set_xlim(0, exits.depth + 0.05)
    axes.xaxis.set_major_locator(ticks(14))
    axes.yaxis.set_major_locator(ticks(5))
    axes.set_xlabel("mean depth of one image, layers")
    axes.set_ylabel("images")


# ---- uncertainty maps ----------------------------------------------------------------------------------------------


def uncertainty_maps(maps: Uncertainty, image: int) -> Figures:
    """u above the true difference for one image; rows are exits, columns are times, one colour scale per kind."""
    rows = 1 + 2 * len(some(maps.k, 3))
    return render(draw_maps, (12.5, 1.5 * rows + 1.6), (5.2, 1.05 * rows + 1.7), maps, image)


def some(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values, evenly spread, ends included."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))


def draw_maps(figure, theme, narrow, maps, image) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    exits, times = some(maps.k, 3), some(maps.t, 4 if narrow else 7)
    times = times[np.argsort(-maps.t[times], kind="stable")]  # noise end first
    # the square root keeps deep layers, where both are small, apart from black; the colour bar says so
    colour = [
        ScalarMappable(PowerNorm(0.5, vmin=0, vmax=float(values[:, :, image].max()) or 1), colormaps[name])
        for values, name in ((maps.u, "cividis"), (maps.error, "magma"))
    ]
    rows, names = [maps.x0[times, image].transpose(0, 2, 3, 1) / 255], ["image"]  # each (times, H, W, 1 or 3 or 4)
    for k in exits:
        rows += [c.cmap(c.norm(v[times, k, image])) for c, v in zip(colour, (maps.u, maps.error), strict=True)]
        names += [f"u, layer {maps.k[k]}", "true diff." if narrow else "true difference"]
    height, width = maps.x0.shape[-2:]  # larger than the maps, by a whole factor, where the network denoises latents
    gap = max(1, round(0.08 * width))
    mosaic = np.zeros((len(rows) * (height + gap) - gap, len(times) * (width + gap) - gap, 4))  # gaps transparent
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            tile = tile.repeat(height // len(tile), 0).repeat(width // tile.shape[1], 1)
            mosaic[y : y + height, x : x + width, :3] = tile[..., :3]
            mosaic[y : y + height, x : x + width, 3] = 1
    axes = figure.add_subplot()
    axes.imshow(mosaic)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    at = np.arange(len(times)) * (width + gap) + width / 2 - 0.5
    ends = {0: "noise end\n", len(times) - 1: "data end\n"} if len(times) > 1 else {}
    axes.set_xticks(at, [f"{ends.get(j, '')}t = {maps.t[t]:.2f}" for j, t in enumerate(times)])
    axes.set_yticks(np.arange(len(rows)) * (height + gap) + height / 2 - 0.5, names)
    axes.tick_params(length=0)
    labels = ("predicted uncertainty u", "true difference |eps_k − eps_K|")
    for mappable, label in list(zip(colour, labels, strict=True))[::-1]:  # the last one made lies nearest to the maps
        strip = figure.colorbar(mappable, ax=axes, location="bottom", pad=0.02, aspect=45, fraction=0.04)
        strip.outline.set_visible(False)
        strip.set_label(label)
        strip.ax.xaxis.set_major_locator(ticks(5, whole=False))


# ---- training ------------------------------------------------------------------------------------------------------


def training(rows: Sequence[dict[str, float]]) -> Figures:
    """Losses, and where logged the error and the uncertainty of every exit, against the training step."""
    panels = training_panels(rows)
    return render(draw_training, (12.5, 4.2), (5.2, 3.4 * len(panels)), rows, panels)


def training_panels(rows: Sequence[dict[str, float]]) -> list[tuple[str, list[str]]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def layers(prefix: str) -> list[str]:
        return sorted(
            (key for key in keys if re.fullmatch(rf"{prefix}_\d+", key)), key=lambda key: int(key[len(prefix) + 1 :])
        )

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

    ramp = LinearSegmentedColormap.from_list("layers", theme.ramp[2:])
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
        if title != "loss" and len(ends) > 2:
            ends = [ends[0], ends[-1]]  # the ramp orders the layers between
        if title == "loss" and all(row[key] > 0 for row in rows for key in columns if key in row):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(ticks(4))
        end_labels(figure, axes, ends)


def end_labels(figure, axes, ends) -> None:
    """Names at the right ends of curves, pushed apart until they do not overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    height = 15.0  # points
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    want = [axes.transData.transform((x, y))[1] * scale for y, _, _, x in ends]
    put = list(want)
    for i in range(1, len(put)):
        put[i] = max(put[i], put[i - 1] + height)
    shift = (sum(want) - sum(put)) / len(put)
    for (y, name, color, x), at, wish in zip(ends, put, want, strict=True):
        axes.annotate(
            name, (x, y), xytext=(6, at + shift - wish), textcoords="offset points", color=color, va="center"
        )  # fmt: skip
