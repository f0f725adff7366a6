"""Kernel distances between sets of features: KID (Binkowski et al. 2018) and the Gaussian-kernel MMD of CMMD.

All arithmetic is float64; kernel matrices are summed in blocks of rows, so memory stays linear in the number of images.
"""

import numpy as np

from libs.metrics.extractors import FeatureBank
from libs.run import Run

KERNEL_ROWS = 1024  # rows of a kernel matrix held at once
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID: how many, and images of one on each side


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 with the kernel (x.y / F + 1)^3; may be slightly negative.

    Args:
        x: (n, F), n >= 2.
        y: (m, F), m >= 2.

    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> abs(kid(x[:50], x[50:])) < 0.1 < kid(x[:50], x[50:] + 1)
    True
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"The unbiased estimate needs at least 2 images on each side; there are {n} and {m}.")
    xx = _kernel_sum(x, x, _cubic) - _cubic_diagonal(x)
    yy = _kernel_sum(y, y, _cubic) - _cubic_diagonal(y)
    return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * _kernel_sum(x, y, _cubic) / (n * m))


def rbf_mmd(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> float:
    """1000 times the biased MMD^2 (V-statistic: diagonals included) with exp(-|x - y|^2 / (2 sigma^2)).

    Scale and estimator as in CMMD (Jayasumana et al. 2024). Never negative but for rounding.

    Args:
        x: (n, F).
        y: (m, F).
        sigma: width, in units of the features.
    """
    if not len(x) or not len(y):
        raise ValueError(f"MMD needs images on both sides; there are {len(x)} and {len(y)}.")

    def gaussian(a, b):
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T  # (rows, m)
        return np.exp(-squares.clip(0) / (2 * sigma**2))

    within = _kernel_sum(x, x, gaussian) / len(x) ** 2 + _kernel_sum(y, y, gaussian) / len(y) ** 2
    return float(1000 * (within - 2 * _kernel_sum(x, y, gaussian) / (len(x) * len(y))))


def _cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _cubic_diagonal(x) -> float:
    return float((((x.astype(np.float64) ** 2).sum(1) / x.shape[1] + 1) ** 3).sum())


def _kernel_sum(x, y, kernel) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return sum(float(kernel(x[i : i + KERNEL_ROWS], y).sum()) for i in range(0, len(x), KERNEL_ROWS))


class KID(FeatureBank):
    """Kernel distance averaged over random subsets. Keys: `kid_<extractor>` and its spread `..._std` over subsets.

    A subset has fewer images than `SUBSET_SIZE` where there are not as many, which is said.
    """

    def compute(self, run: Run) -> dict[str, float]:
        generated, key = self.gather(run), f"kid_{self.extractor.name}"
        size = min(SUBSET_SIZE, len(generated), len(self.real))
        if size < SUBSET_SIZE:
            run.say(f"{key}: subsets of {size} images instead of {SUBSET_SIZE}, there are no more.")
        draw = np.random.default_rng(0)
        values = [
            kid(generated[draw.permutation(len(generated))[:size]], self.real[draw.permutation(len(self.real))[:size]])
            for _ in range(SUBSETS)
        ]
        return {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}


class RBFMMD(FeatureBank):
    """Gaussian-kernel distance x 1000 of features scaled to length one. Key: `mmd_<extractor>`. The recipe of CMMD."""

    def compute(self, run: Run) -> dict[str, float]:
        sets = [x.astype(np.float64) for x in (self.gather(run), self.real)]
        sets = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in sets]
        return {f"mmd_{self.extractor.name}": rbf_mmd(*sets)}
