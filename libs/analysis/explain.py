"""What explains the exits, and what the uncertainty knows: numbers from arrays. analyze.py measures the arrays.

Depths `used` are (calls, rows); a row is an image, or a guidance branch of one.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from libs.losses import LAYER_WEIGHTS

# ---- exits ---------------------------------------------------------------------------------------------------------


def exit_variance(used: np.ndarray) -> dict[str, float]:
    """Shares of the variance of the exit that call (time) and image (sample) explain, and what they leave over.

    Two-way analysis of variance without repetition: the shares sum to 1. All are 0 where the exit never changes.
    """
    used = used.astype(np.float64)
    total, time, sample = used.var(), used.mean(1).var(), used.mean(0).var()
    shares = np.array([time, sample, total - time - sample]) / (total or 1.0)
    return dict(zip(("time", "sample", "residual"), shares.clip(0).tolist(), strict=True)) | {"total": float(total)}


def mode_agreement(used: np.ndarray) -> float:
    """Share of exits that are the most frequent one of their call: what the best static schedule gets right."""
    return float(np.mean([np.bincount(call).max() / len(call) for call in used]))


def sample_spread(used: np.ndarray) -> dict[str, float]:
    """Mean depth per image: standard deviation, and percentiles over images."""
    depth = used.mean(0)
    low, median, high = np.percentile(depth, (5, 50, 95)).tolist()
    return {"mean": float(depth.mean()), "std": float(depth.std()), "p5": low, "median": median, "p95": high}


def exit_histogram(used: np.ndarray, depth: int) -> np.ndarray:
    """(calls, K + 1): share of rows that left at each k."""
    return np.stack([np.bincount(call, minlength=depth + 1) / len(call) for call in used])


def switch_time(t: np.ndarray, used: np.ndarray) -> float | None:
    """Where, coming from the noise, the mean depth first crosses the middle of its range; None if it is flat."""
    order = np.argsort(-t)
    t, depth = t[order], used.mean(1)[order]
    if np.ptp(depth) < 0.5:  # less than half a layer is no switch
        return None
    above = depth - (depth.min() + depth.max()) / 2
    i = int(np.flatnonzero(np.sign(above[1:]) != np.sign(above[:-1]))[0])
    return float(t[i] + (t[i + 1] - t[i]) * above[i] / (above[i] - above[i + 1]))


# ---- estimates -----------------------------------------------------------------------------------------------------


def predictor_scores(u: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """How well `u` (n,) predicts `target` (n,), against the constant that is best on the other half of the rows.

    At one exit and one time that constant is the (layer, t)-constant predictor. Fitted on even rows, scored on odd.
    `r2` takes u as it is (0: as good as the constant, negative: worse), `r2_refit` after a straight line through it
    (what u knows, whatever its scale); `mae` and `mae_constant` in the target's unit. Where the target does not vary
    there is nothing to explain: 0, as are correlations where either side is constant.
    """
    fit, test = slice(0, None, 2), slice(1, None, 2)
    constant = target[fit].mean()
    known, truth = u[test], target[test]
    baseline = np.square(truth - constant).sum()
    flat = np.ptp(u[fit]) == 0 or np.ptp(known) == 0 or np.ptp(truth) == 0
    slope = 0.0 if flat else np.cov(u[fit], target[fit])[0, 1] / u[fit].var(ddof=1)
    line = constant + slope * (known - u[fit].mean())
    return {
        "r2": float(1 - np.square(truth - known).sum() / baseline) if baseline else 0.0,
        "r2_refit": float(1 - np.square(truth - line).sum() / baseline) if baseline else 0.0,
        "pearson": 0.0 if flat else float(np.corrcoef(known, truth)[0, 1]),
        "spearman": 0.0 if flat else float(spearmanr(known, truth).statistic),
        "mae": float(np.abs(truth - known).mean()),
        "mae_constant": float(np.abs(truth - constant).mean()),
    }


def score_tables(u: np.ndarray, target: np.ndarray) -> dict[str, list[list[float]]]:
    """`predictor_scores` of u and target (T, E, n) as tables (T, E), by name."""
    cells = [[predictor_scores(*pair) for pair in zip(*row, strict=True)] for row in zip(u, target, strict=True)]
    return {name: [[cell[name] for cell in row] for row in cells] for name in cells[0][0]}


def calibration_curve(u: np.ndarray, target: np.ndarray, n: int = 10) -> dict[str, list[float]]:
    """Mean u and mean target of `n` groups with equally many rows, in the order of u."""
    order = np.argsort(u, kind="stable")
    groups = [group for group in np.array_split(order, n) if len(group)]
    return {"u": [float(u[g].mean()) for g in groups], "error": [float(target[g].mean()) for g in groups]}


def explained_by_time(values: np.ndarray) -> float:
    """Share of the variance of values (T, n) that lies between the times; 0 where nothing varies."""
    total = values.var()
    return float(values.mean(1).var() / total) if total else 0.0


# ---- training ------------------------------------------------------------------------------------------------------

PARTS = ("backbone", "heads", "estimator")


def expected_reach(weights: str, *, own_heads: bool, frozen: bool, extra: bool = False) -> dict[str, list[str]]:
    """The parts of the network that each term of the loss moves, from the settings alone.

    The last exit always goes through the backbone's own head, which belongs to the backbone.
    """
    network = [] if frozen else ["backbone"]
    early = network + ["heads"] * own_heads
    if weights not in LAYER_WEIGHTS:
        raise ValueError(f"loss.weights is {weights!r}; it must be one of {', '.join(LAYER_WEIGHTS)}")
    reach = {"simple": network, "uem": ["estimator"]}
    reach["layers"] = early + ["estimator"] * (weights == "adadiff")  # the released weights are not stopped
    return reach | ({"extra": early} if extra else {})
