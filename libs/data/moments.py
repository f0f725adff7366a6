"""Means and covariances of what a network denoises, for its exit 0 (libs/models/gaussian.py)."""

from typing import Any

import torch
from torch import Tensor

from libs import rng
from libs.data.dataset import Dataset

MOST, BATCH = 100_000, 500  # images that are read, spread over the data; at a time


def moments(
    dataset: Dataset, codec: Any, n_classes: int, *, flip: bool = False, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (G,), means (G, D) and covariances (G, D, D) of the images' D numbers, by class; float64.

    Args:
        codec: of libs/codecs.
        n_classes: G; 0 takes all images as one class.
        flip: count every image mirrored too.
        shared: one covariance (1, D, D), within the classes, for all.

    >>> from libs.codecs import Identity
    >>> from libs.data import DATASETS
    >>> counts, means, covariances = moments(DATASETS["digits"](), Identity(), 10)
    >>> int(counts.sum()), means.shape, covariances.shape
    (1797, torch.Size([10, 64]), torch.Size([10, 64, 64]))
    """
    groups = max(1, n_classes)
    indices = torch.linspace(0, len(dataset) - 1, min(len(dataset), MOST), dtype=torch.float64).round().long()
    counts, sums, squares = torch.zeros(groups, dtype=torch.long), 0.0, 0.0
    for number, chosen in enumerate(indices.split(BATCH)):
        extra = [torch.zeros(len(chosen))] if dataset.draws else []
        for mirror in (False, True)[: 1 + flip]:
            stored, labels = dataset.gather(chosen, torch.full((len(chosen),), mirror), *extra)
            shape = stored.shape[1] // 2, *stored.shape[2:]  # of latents, whose mean and log variance are stored
            noise = rng.latent_noise(0, number, len(chosen), shape, slice(None)) if codec.draws else None
            x = codec.sample(stored, noise).flatten(1).double()  # (b, D)
            group = labels.long() if n_classes else torch.zeros(len(x), dtype=torch.long)
            counts += torch.bincount(group, minlength=groups)
            sums = sums + torch.zeros(groups, x.shape[1], dtype=torch.float64).index_add_(0, group, x)
            rows = [x] if shared else [x[group == g] for g in range(groups)]
            squares = squares + torch.stack([of.T @ of for of in rows])
    n = counts.clamp_min(1)[:, None].double()
    means = sums / n
    if shared:
        return counts, means, (squares - ((n * means).T @ means)) / counts.sum()
    return counts, means, squares / n[..., None] - means[:, :, None] * means[:, None]
