"""The endless sequence of training batches: the same for any number of processes, exact after a resume."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from libs import rng
from libs.data.dataset import Dataset
from libs.data.workers import read_in_workers


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    flip: bool = False,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one process, from step `start_step` on, without end.

    The sequence is a function of (seed, position), where sample j of the global batch of step s has position
    s * batch_size + j; epoch after epoch of len(dataset) positions, an epoch ends anywhere in a batch. Process r of
    `world` reads the r-th slice of every global batch.

    Args:
        batch_size: images per step over all processes; a multiple of `world`.
        flip: mirror each image with probability 1/2.
        workers: processes that decode ahead, or threads where the data set says that there is nothing to decode; 0
            decodes in this one.

    Yields:
        x (batch_size / world, C, H, W) float32 in [-1, 1] and labels (batch_size / world,) int64, -1 for none;
        for other kinds of data sets whatever their `gather` returns.

    Raises:
        ValueError: at the call, for an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError(f"The data set {dataset.name!r} is empty; batches need at least one image.")
    rows = _rows(Order(len(dataset), seed, flip=flip, draws=dataset.draws), batch_size, start_step, rank, world)
    if dataset.threads and workers:
        return _read_ahead(dataset, rows, workers)
    item_bytes = batch_size // world * math.prod(dataset.shape) * 4
    return read_in_workers(partial(_gather, dataset), rows, workers, item_bytes=item_bytes, seed=seed)


class Order:
    """What stands at each position of training: the image, whether it is mirrored, and a random number if asked for.

    Every epoch is a permutation. `at` returns the columns that `Dataset.gather` takes.
    """

    def __init__(self, n: int, seed: int, *, flip: bool, draws: bool = False):
        self.n, self.seed, self.flip, self.draws = n, seed, flip, draws
        self._epoch = None  # (number, columns) of the last epoch asked for

    def at(self, first: int, count: int) -> tuple[Tensor, ...]:
        """Positions first, first + 1, ...: indices (count,) int64, flips (count,) bool, and with `draws` uniforms."""
        parts = []
        while count:
            epoch, offset = divmod(first, self.n)
            taken = min(count, self.n - offset)
            parts.append([column[offset : offset + taken] for column in self._columns(epoch)])
            first, count = first + taken, count - taken
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _columns(self, epoch: int) -> list[Tensor]:
        if self._epoch is None or self._epoch[0] != epoch:
            columns = [torch.randperm(self.n, generator=rng.stream(self.seed, "order", epoch))]
            columns.append(torch.zeros(self.n, dtype=torch.bool))
            if self.flip:
                columns[1].random_(generator=rng.stream(self.seed, "flip", epoch))
            if self.draws:
                columns.append(torch.rand(self.n, generator=rng.stream(self.seed, "draw", epoch)))
            self._epoch = epoch, columns
        return self._epoch[1]


def _rows(order: Order, batch_size: int, step: int, rank: int, world: int) -> Iterator[tuple[Tensor, ...]]:
    local = batch_size // world
    while True:
        yield order.at(step * batch_size + rank * local, local)
        step += 1


def _read_ahead(dataset: Dataset, rows: Iterator[tuple[Tensor, ...]], workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches in their order, read by threads: no batch has to be handed over from another process."""

    def read(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch = dataset.gather(*row)
        return tuple(x.pin_memory() for x in batch) if torch.cuda.is_available() else batch

    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(read, row) for row in islice(rows, 2 * workers))
        for row in rows:
            yield ahead.popleft().result()
            ahead.append(pool.submit(read, row))


def _gather(dataset: Dataset, row: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The batch made of the given columns of `Order`."""
    return tuple(dataset.gather(*row))
