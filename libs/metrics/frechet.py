"""Fréchet distance between Gaussians fitted to features of two sets of images (Heusel et al. 2017)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libs.files import atomic_write, read_npz
from libs.metrics.extractors import Extractor
from libs.run import Run
from libs.sampling.images import Images

REFERENCE_REMEDY = "Make a matching reference with: python -m scripts.reference_stats"


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images, with what is needed to compare only like with like.

    Attributes:
        mu: (F,) float64.
        sigma: (F, F) float64, unbiased (divided by n - 1).
        n: number of images.
        extractor, preprocessing, resolution: identity of the features, for example "pixels", "uint8 / 255, flattened",
            "1x8x8". Published files say neither n nor the last two: None.

    >>> a = Statistics(mu=np.zeros(2), sigma=np.diag([4.0, 9.0]), n=100, extractor="pixels")
    >>> a.save("reference.npz")
    >>> float(np.load("reference.npz")["n"]), a.root
    (100.0, array([[2., 0.],
           [0., 3.]]))
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    extractor: str
    preprocessing: str | None = None
    resolution: str | None = None

    @cached_property
    def root(self) -> np.ndarray:
        """Symmetric square root of sigma (F, F); kept, since a sweep compares many models with one reference."""
        w, q = np.linalg.eigh(self.sigma)
        return (q * np.sqrt(w.clip(0))) @ q.T

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz; the file appears complete or not at all."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Statistics are saved as .npz; the path is {str(path)!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **{name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike, extractor: Extractor) -> Statistics:
        """Read a reference for use with `extractor`.

        Files with `mu` and `sigma` alone (the published `fid_stats_*.npz`) come from the FID Inception network and are
        accepted for that extractor only.

        Raises:
            ValueError: no such file, not statistics, or made with other features than `extractor` gives.
        """
        told = ("extractor", "preprocessing", "resolution")
        try:
            arrays = read_npz(path, "the reference", ("mu", "sigma"), optional=("n", *told))
        except ValueError as error:
            raise ValueError(f"{error}. {REFERENCE_REMEDY}") from error
        n = int(arrays["n"]) if "n" in arrays else None
        known = {name: str(arrays[name]) for name in told if name in arrays}
        mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
        statistics = cls(mu, sigma, n, **{"extractor": "inception", **known})
        statistics.check(extractor, str(path))
        return statistics

    def check(self, extractor: Extractor, source: str = "the reference") -> None:
        """Refuse, naming both sides, to be compared with features of another kind."""
        for what, mine, theirs in (
            ("extractor", self.extractor, extractor.name),
            ("preprocessing", self.preprocessing, extractor.preprocessing),
            ("resolution", self.resolution, extractor.resolution),
        ):
            if mine is not None and mine != theirs:
                raise ValueError(f"{source} has the {what} {mine!r}, the evaluation has {theirs!r}. {REFERENCE_REMEDY}")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError(f"{source} has values that are not finite numbers. {REFERENCE_REMEDY}")
        n_features = extractor.n_features
        if self.mu.shape != (n_features,) or self.sigma.shape != (n_features, n_features):
            raise ValueError(
                f"{source} has mu {self.mu.shape} and sigma {self.sigma.shape}; the extractor {extractor.name!r} gives "
                f"{n_features} features. {REFERENCE_REMEDY}"
            )


class Moments:
    """Streaming sums in float64: n, sum f, sum f f^T; the same for any batch size and number of processes."""

    def __init__(self, n_features: int, device: torch.device | str = "cpu"):
        self.n = torch.zeros(1, dtype=torch.float64, device=device)
        self.sum = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(n_features, n_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """features: (n, F)."""
        features = features.to(self.sum)  # (n, F) float64
        self.n += len(features)
        self.sum += features.sum(0)  # (F,)
        self.outer += features.T @ features  # (F, F)

    def statistics(self, extractor: Extractor, run: Run | None = None) -> Statistics:
        """The Gaussian of the images of all processes of `run`, or of this process alone."""
        sums = [self.n, self.sum, self.outer]
        if run is not None:
            sums = [run.all_sum(x.clone()) for x in sums]  # a reduction may work in place: these sums stay local
        n, total, outer = (x.cpu().numpy() for x in sums)
        n = int(n[0])
        if n < 2:
            raise ValueError(f"A covariance needs at least 2 images; there are {n}.")
        mu = total / n
        sigma = (outer - n * np.outer(mu, mu)) / (n - 1)
        return Statistics(mu, sigma, n, extractor.name, extractor.preprocessing, extractor.resolution)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(Sigma_a + Sigma_b - 2 (Sigma_a Sigma_b)^(1/2))   (Dowson and Landau 1982).

    Sigma_a Sigma_b has the eigenvalues of R Sigma_a R with R^2 = Sigma_b, which is symmetric: nothing can turn complex,
    also when there are fewer images than features.

    >>> a = Statistics(np.zeros(2), np.eye(2), 100, "pixels")
    >>> b = Statistics(np.array([3.0, 0.0]), 4 * np.eye(2), 100, "pixels")
    >>> round(frechet_distance(a, b), 6)  # 3^2, and (2 - 1)^2 for each of two features
    11.0
    """
    cross = np.sqrt(np.linalg.eigvalsh(b.root @ a.sigma @ b.root).clip(0)).sum()
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def real_halves(features: np.ndarray, extractor: Extractor, *, splits: int = 10) -> float:
    """The floor: mean distance between two random halves of real images, over several splits.

    Data of the very same distribution still measure this much with len(features) / 2 images on each side; it falls as
    that number grows.

    Args:
        features: (n, F) of real images, from `features_of`.
        splits: number of random splits averaged.
    """
    order, half, distances = np.random.default_rng(0), len(features) // 2, []
    for _ in range(splits):
        shuffled = torch.from_numpy(features[order.permutation(len(features))])
        a, b = Moments(features.shape[1]), Moments(features.shape[1])
        a.add(shuffled[:half])
        b.add(shuffled[half : 2 * half])
        distances.append(frechet_distance(a.statistics(extractor), b.statistics(extractor)))
    return float(np.mean(distances))


class Frechet:
    """Fréchet distance of generated images to a reference. Key: `fid` for the FID Inception, else `fd_<extractor>`.

    Args:
        extractor: gives the features.
        reference: statistics of real images in the same features.
    """

    def __init__(self, extractor: Extractor, reference: Statistics):
        reference.check(extractor)
        self.extractor, self.reference = extractor, reference
        self.moments = Moments(extractor.n_features, extractor.device)

    @staticmethod
    def key_of(extractor: Extractor) -> str:
        """`fid` for the released FID Inception and nothing else."""
        return "fid" if extractor.name == "inception" else f"fd_{extractor.name}"

    def update(self, batch: Images) -> None:
        self.moments.add(self.extractor(batch.pixels))

    def compute(self, run: Run) -> dict[str, float]:
        key, generated = self.key_of(self.extractor), self.moments.statistics(self.extractor, run)
        for who, n in (("generated", generated.n), ("reference", self.reference.n)):
            if n is not None and n <= self.extractor.n_features:
                run.say(
                    f"{key}: {n} {who} images for {self.extractor.n_features} features: the covariance is singular and "
                    "the distance strongly biased. Compare it only with values from the same number of images.",
                    once=True,
                )
        return {key: frechet_distance(generated, self.reference)}
