"""Improved precision and recall by nearest neighbours (Kynkäänniemi et al. 2019)."""

import numpy as np

from libs.metrics.extractors import FeatureBank
from libs.run import Run

DISTANCE_ROWS = 1024  # rows of a distance matrix held at once


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Generated first, real second: exchanging them exchanges the two results.

    Every point owns a ball that reaches its k-th nearest neighbour in its own set. Precision is the share of generated
    points inside some real ball (are the samples realistic?), recall the share of real points inside some generated
    ball (is the data covered?).

    Args:
        generated: (n, F), n > k.
        real: (m, F), m > k.
        k: neighbour, not counting the point itself.

    >>> real = np.random.default_rng(0).normal(size=(200, 4))
    >>> precision_recall(0.1 * real, real)  # realistic, but of no variety
    (1.0, 0.0)
    """
    if k < 1 or min(len(generated), len(real)) <= k:
        raise ValueError(
            f"Precision and recall need k >= 1 and more than k images on each side; k is {k}, "
            f"there are {len(generated)} generated and {len(real)} real images."
        )
    center = real.mean(0, dtype=np.float64)  # distances by |a|^2 + |b|^2 - 2ab lose digits far from the origin
    generated, real = generated - center, real - center
    return _inside(generated, real, k), _inside(real, generated, k)


def _inside(points, owners, k) -> float:
    """Share of points inside at least one owner's ball."""
    blocks = [np.partition(_squares(block, owners), k, axis=1)[:, k] for block in _blocks(owners)]  # 0 is itself
    radii = np.concatenate(blocks)  # (owners,) squared
    return float(np.mean(np.concatenate([(_squares(b, owners) <= radii).any(1) for b in _blocks(points)])))


def _blocks(x):
    return (x[i : i + DISTANCE_ROWS] for i in range(0, len(x), DISTANCE_ROWS))


def _squares(a, b):
    return ((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T).clip(0)  # (a, b)


class PrecisionRecall(FeatureBank):
    """Keys: `precision_<extractor>`, `recall_<extractor>`."""

    def compute(self, run: Run) -> dict[str, float]:
        precision, recall = precision_recall(self.gather(run), self.real)
        return {f"precision_{self.extractor.name}": precision, f"recall_{self.extractor.name}": recall}
