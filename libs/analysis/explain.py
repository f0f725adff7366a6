"""What explains the exits, and what the uncertainty knows: numbers from arrays. analyze.py measures the arrays.

Depths `used` are (calls, rows); a row is an image, or a guidance branch of one.
"""

import numpy as np
from scipy.stats import spearmanr

from libs.losses import LAYER_WEIGHTS

# ---- exits ---------------------------------------------------------------------------------------------------------


def exit_variance(used: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
    """Shares of the variance of the exit that call (time) and image (sample) explain, and what they leave over.

    Two-way analysis of variance without repetition: time, sample and residual sum to 1. All are 0 where the exit never
    changes. `class` is the part of sample that lies between the classes `labels` (rows,), less what as many groups of
    images drawn at random would show (epsilon squared, Kelley 1935); absent without labels.
    """
    used = used.astype(np.float64)
    total, time, sample = used.var(), used.mean(1).var(), used.mean(0).var()
    shares = np.array([time, sample, total - time - sample]) / (total or 1.0)
    found = dict(zip(("time", "sample", "residual"), shares.clip(0).tolist(), strict=True)) | {"total": float(total)}
    return found if labels is None else found | {"class": found["sample"] * between_classes(used.mean(0), labels)}


def between_classes(values: np.ndarray, labels: np.ndarray) -> float:
    """Epsilon squared: the share of the variance of values (n,) between the classes, without what chance gives."""
    classes, n = np.unique(labels), len(values)
    total = np.square(values - values.mean()).sum()
    within = sum(np.square(v - v.mean()).sum() for v in (values[labels == c] for c in classes))
    if not total or n <= len(classes):
        return 0.0
    return float(max(0.0, 1 - within / (n - len(classes)) / (total / (n - 1))))


def busyness(pixels: np.ndarray) -> np.ndarray:
    """(n,): mean absolute difference of neighbouring pixels of images (n, C, H, W), in levels of 255."""
    x = pixels.astype(np.float64)
    down, right = np.abs(np.diff(x, axis=2)), np.abs(np.diff(x, axis=3))
    return (down.mean((1, 2, 3)) + right.mean((1, 2, 3))) / 2


def late_images(depth: np.ndarray, labels: np.ndarray | None, busy: np.ndarray) -> dict:
    """Which images leave late: mean depth (n,) by class, and its rank correlation with `busyness` (n,).

    `spearman_busy_within_classes` correlates what is left of both after their class means.
    """
    found: dict = {"spearman_busy": rank_correlation(depth, busy)}
    if labels is not None:
        classes = np.unique(labels).tolist()
        found["depth_per_class"] = {str(c): float(depth[labels == c].mean()) for c in classes}
        means = np.zeros((2, len(depth)))
        for c in classes:
            means[:, labels == c] = [[values[labels == c].mean()] for values in (depth, busy)]
        found["spearman_busy_within_classes"] = rank_correlation(depth - means[0], busy - means[1])
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where either side is constant."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


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

MODEL_PARTS = ("backbone", "heads", "estimator")


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
