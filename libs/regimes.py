"""What differs between pixels, latents and text-to-image. Nothing else may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libs import rng
from libs.build import build, lookup
from libs.codecs.identity import Identity
from libs.data import DATASETS
from sde import PROCESSES, Process


@dataclass(frozen=True)
class Labels:
    """Class conditions; `n_classes` 0 means none. With `has_null`, class `n_classes` is the null class of guidance."""

    n_classes: int
    has_null: bool

    def for_ids(self, seed: int, ids: np.ndarray) -> Tensor | None:
        """(n,) labels: image i's class depends on (seed, i) only."""
        if not self.n_classes:
            return None
        draws = [torch.randint(self.n_classes, (), generator=rng.stream(seed, "label", int(i))) for i in ids]
        return torch.stack(draws)

    def null(self, n: int) -> Tensor | None:
        return torch.full((n,), self.n_classes) if self.has_null else None

    def for_training(self, labels: Tensor, drop: Tensor, p_uncond: float) -> Tensor | None:
        """labels (b,), drop uniform (b,): the null class replaces a label with probability `p_uncond`."""
        if not self.n_classes:
            return None
        return torch.where(drop < p_uncond, self.n_classes, labels) if self.has_null else labels


@dataclass(frozen=True)
class Regime:
    """`shape` (C, H, W) is what the network denoises, `image_shape` what people see.

    `dataset()` opens the training data, which sampling never needs.
    """

    shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    process: Process
    codec: Any  # encode(x) -> (B, C, H, W); decode(x0) -> (B, 3 or 1, H', W') uint8
    conditions: Labels
    dataset: Callable[[], Any]


def pixels(config) -> Regime:
    """Images as they are, with class labels where the network has classes."""
    shape = (config.nnet.in_chans, config.nnet.img_size, config.nnet.img_size)
    return Regime(
        shape=shape,
        image_shape=shape,
        process=process(config),
        codec=Identity(),
        conditions=labels(config),
        dataset=lambda: open_dataset(config),
    )


def process(config) -> Process:
    return lookup(PROCESSES, config.process, "process")()


def labels(config) -> Labels:
    has_null = config.dataset.p_uncond > 0
    if not 0 <= config.dataset.p_uncond < 1:
        raise ValueError(f"dataset.p_uncond is {config.dataset.p_uncond}; it must lie in [0, 1)")
    if has_null and config.nnet.num_classes < 2:
        raise ValueError(
            f"dataset.p_uncond is {config.dataset.p_uncond} but nnet.num_classes is {config.nnet.num_classes}; dropping "
            "labels needs a network with the dataset's classes and one null class on top"
        )
    return Labels(n_classes=max(config.nnet.num_classes, 0) - has_null, has_null=has_null)


def open_dataset(config):
    """The training data named in the config, checked against the network."""
    group = config.dataset
    path = {"path": group.path} if group.path else {}
    dataset = build(DATASETS, group, setting="dataset", **path)
    nnet = config.nnet
    wanted = (nnet.in_chans, nnet.img_size, nnet.img_size)
    if tuple(dataset.shape) != wanted:
        raise ValueError(
            f"dataset {config.dataset.name!r} has images of shape {tuple(dataset.shape)}, but nnet.in_chans and "
            f"nnet.img_size ask for {wanted}"
        )
    n_classes = labels(config).n_classes
    if n_classes and dataset.n_classes != n_classes:
        raise ValueError(
            f"dataset {config.dataset.name!r} has {dataset.n_classes} classes; with dataset.p_uncond="
            f"{config.dataset.p_uncond} nnet.num_classes={nnet.num_classes} stands for {n_classes}"
        )
    return dataset
