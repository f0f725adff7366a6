"""The pictures of analyze.py, drawn from its numbers."""

from pathlib import Path

import numpy as np

from libs.files import atomic_write
from libs.sampling.images import Images

ENDS = "t (0 = data, 1 = noise)"


def draw_analysis(found: dict, images: dict[str, tuple[str, Images]], folder: Path) -> list[str]:
    """Write the PNG files; returns their names. `images`: slug -> (label, images) of the points in found["exits"]."""
    estimates = found["estimates"]
    pictures = {"exits.png": exits, "variance.png": variance} if found["exits"] else {}
    names = []
    for name, picture in pictures.items():
        names.append(save_figure(picture(found["exits"], found["depth"]), folder / name))
    if images:
        names.append(save_figure(early_and_late(images), folder / "late.png"))
    for name, picture in {"layers.png": layers, "estimates.png": scores, "calibration.png": calibration}.items():
        names.append(save_figure(picture(estimates), folder / name))
    return [*names, save_figure(weights(estimates), folder / "weights.png")]


def figure(rows: int, columns: int, width: float = 4.6, height: float = 3.4):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def save_figure(fig, path: Path) -> str:
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=110)
    return path.name


def heat(fig, ax, t, exits, table, title: str, **options) -> None:
    """A table (T, E) as a map, time to the right."""
    order = np.argsort(t)
    image = ax.imshow(np.asarray(table)[order].T, aspect="auto", origin="lower", interpolation="nearest", **options)
    shown = np.unique(np.linspace(0, len(t) - 1, 6).round().astype(int))
    ax.set_xticks(shown, [f"{np.asarray(t)[order][i]:.2f}" for i in shown])
    ax.set_yticks(range(len(exits)), exits)
    ax.set(title=title, xlabel=ENDS, ylabel="layers run")
    fig.colorbar(image, ax=ax)


def exits(points: dict, depth: int):
    """Where images leave, over time; the line at the switch is labelled with its logSNR."""
    fig, axes = figure(len(points), 1, width=6.4)
    for ax, point in zip(axes[:, 0], points.values(), strict=True):
        heat(fig, ax, point["t"], range(depth + 1), point["histogram"], point["label"], vmin=0, vmax=1)
        if point["switch_t"] is not None:
            at = np.interp(point["switch_t"], sorted(point["t"]), range(len(point["t"])))
            ax.axvline(at, color="white", linestyle="--")
            ax.text(at, depth, f" logSNR {point['switch_log_snr']:.1f}", color="white", va="top")
    return fig


def variance(points: dict, depth: int):
    """What explains the exit, and how far images differ in mean depth."""
    fig, axes = figure(1, 2)
    labels = [point["label"] for point in points.values()]
    left = np.zeros(len(points))
    for name in ("time", "sample", "residual"):
        shares = np.array([point["variance"][name] for point in points.values()])
        axes[0, 0].barh(labels, shares, left=left, label=name)
        left += shares
    axes[0, 0].set(title="variance of the exit explained by", xlim=(0, 1))
    axes[0, 0].legend()
    spread = [point["depth_per_image"] for point in points.values()]
    means = np.array([s["mean"] for s in spread])
    bars = np.array([[m - s["p5"], s["p95"] - m] for s, m in zip(spread, means, strict=True)]).T.clip(0)
    axes[0, 1].errorbar(means, labels, xerr=bars, fmt="o")
    axes[0, 1].set(title="mean depth per image (5 % to 95 %)", xlim=(0, depth))
    return fig


def early_and_late(images: dict[str, tuple[str, Images]], n: int = 16):
    """Of every point, the images that left earliest and those that left latest, in the order of their mean depth."""
    fig, axes = figure(2 * len(images), 1, width=9.6, height=1.1)
    for i, (label, found) in enumerate(images.values()):
        depth = found.mean_depth  # (n,)
        order = np.argsort(depth, kind="stable")
        for ax, what, rows in zip(axes[2 * i :, 0], ("earliest", "latest"), (order[:n], order[-n:]), strict=False):
            tiles = found.pixels[rows].permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, n W, C)
            ax.imshow(tiles, cmap="gray", vmin=0, vmax=255)
            ax.set_title(f"{label}, {what}: {depth[rows].min():.2f} to {depth[rows].max():.2f} layers", fontsize=9)
            ax.set_axis_off()
    return fig


def layers(estimates: dict):
    """How far every layer is from the last one and from the noise, per time (log scale)."""
    fig, axes = figure(1, 2)
    for ax, key, title in zip(axes[0], ("mse_to_final", "mse_to_noise"), ("last layer", "true noise"), strict=True):
        table = np.log10(np.maximum(estimates[key], 1e-8))
        heat(fig, ax, estimates["t"], estimates["exits"], table, f"log10 MSE of eps to the {title}")
    return fig


def scores(estimates: dict):
    """What u knows beyond a constant per (time, exit)."""
    fig, axes = figure(2, 2)
    for row, target in zip(axes, ("error", "excess"), strict=True):
        for ax, score in zip(row, ("r2_refit", "spearman"), strict=True):
            table = np.array(estimates["scores"][target][score])
            heat(fig, ax, estimates["t"], estimates["exits"], table, f"{score} of u, true {target}", vmin=0, vmax=1)
    return fig


def calibration(estimates: dict):
    """Predicted against true, in groups of equal size."""
    fig, axes = figure(1, 2)
    for ax, (target, curves) in zip(axes[0], estimates["calibration"].items(), strict=True):
        for k, curve in zip(estimates["exits"], curves, strict=True):
            ax.plot(curve["u"], curve["error"], marker="o", markersize=3, label=f"k = {k}")
        ax.axline((0, 0), slope=1, color="grey", linestyle=":")
        ax.set(title=f"u against the true {target}", xlabel="predicted", ylabel="true", xlim=(0, None), ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    return fig


def weights(estimates: dict):
    """The weight of every exit's loss, and what it contributes, per time."""
    fig, axes = figure(1, 2)
    for ax, key, title in zip(axes[0], ("loss_weights", "weighted_loss"), ("weight", "weight x loss"), strict=True):
        for k, values in zip(estimates["exits"], np.array(estimates[key]).T, strict=True):
            ax.plot(estimates["t"], values, label=f"k = {k}")
        ax.set(title=f"{title} of each exit", xlabel=ENDS, ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    return fig


def draw_depths(depth: np.ndarray, t: np.ndarray, most: int):
    """The layers that each image (columns, its mean below) used at each call (rows, noise first).

    Args:
        depth: (calls, n) layers, `Images.depth`.
        t: (calls,) times of the calls.
        most: K, the layers of the network.
    """
    calls, n = depth.shape
    fig, ((ax,),) = figure(1, 1, width=1.2 + 0.5 * n, height=0.9 + 0.2 * calls)
    ax.imshow(depth, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    for (call, image), layers in np.ndenumerate(depth):
        color = "white" if layers < 0.7 * most else "black"
        ax.text(image, call, f"{layers:g}", ha="center", va="center", color=color, fontsize=8)
    ax.set_xticks(range(n), [f"{i}\n{mean:.1f}" for i, mean in enumerate(depth.mean(0))])
    ax.set_yticks(range(calls), [f"{time:.2f}" for time in t], fontsize=8)
    ax.set(title="layers", xlabel="image; mean over its calls", ylabel="t (1 = noise)")
    return fig
