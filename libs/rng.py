"""Randomness as a function of names: equal (seed, purpose, number) means equal draws in any batch, rank or order.

Everything is drawn on the CPU, so that images do not depend on the accelerator.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on the integers and strings of `key` only, in every process and Python version."""
    return torch.Generator().manual_seed(hash32(*key))


def hash32(*key: int | str) -> int:
    """A stable 32-bit hash of `key`: torch's CPU engine reads no more than 32 bits of its seed."""
    words = [part if isinstance(part, str) else operator.index(part) for part in key]
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=4).digest(), "big")


def numbered_streams(*key: int | str, ids: Iterable[int]) -> list[torch.Generator]:
    """One generator per id. Under one key, different ids never share a seed.

    Hashing (key, id) would: among 50,000 images two of 2^32 seeds coincide with probability 1/4, and then two images.
    """
    base = hash32(*key)
    ids = [operator.index(i) for i in ids]
    if ids and not (min(ids) >= 0 and max(ids) < 2**32):
        raise ValueError(f"the ids run from {min(ids)} to {max(ids)}; they must lie in [0, 2^32)")
    # an odd factor is a bijection modulo 2^32
    return [torch.Generator().manual_seed((i * 0x9E3779B1 % 2**32) ^ base) for i in ids]


def draw_rows(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape), float32; row i comes from generators[i]."""
    rows = torch.empty(len(generators), *shape)
    for row, generator in zip(rows.unbind(), generators, strict=True):
        row.normal_(generator=generator)  # in place: no copy, no stack
    return rows


class SeededNoise:
    """The noise of the images `ids`: the k-th draw of image i depends on (seed, i, k) only, not on its batch.

    >>> both = SeededNoise(0, ids=[7, 8], shape=(1, 2, 2)).draw()  # (2, 1, 2, 2)
    >>> alone = SeededNoise(0, ids=[8], shape=(1, 2, 2)).draw()
    >>> torch.equal(both[1:], alone)
    True
    """

    def __init__(self, seed: int, ids: Iterable[int], shape: Sequence[int]):
        """shape (C, H, W) of one image."""
        self.generators, self.shape = numbered_streams("noise", seed, ids=ids), tuple(shape)

    def draw(self) -> Tensor:
        """The next (B, *shape), float32, of every image; the first draw is the initial noise."""
        return draw_rows(self.generators, self.shape)

    def keep(self, index: Tensor) -> SeededNoise:
        """The images at the positions `index` (b,), on the CPU, going on where they are; shares their generators."""
        noise = object.__new__(SeededNoise)
        noise.generators, noise.shape = [self.generators[i] for i in index.tolist()], self.shape
        return noise


def global_batch(
    seed: int, step: int, size: int, shape: Sequence[int], local: slice, *, stratified: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of training step `step` for rows `local` of the global batch of `size`.

    They depend on (seed, step, row of the global batch) only: not on the number of processes, nor on what ran before.

    Returns u (b,) float64, uniform in [0, 1), for the times; noise (b, *shape) float32, standard normal; drop (b,)
    float64, uniform in [0, 1), for label dropping. `stratified` spreads the u evenly, one in each [j / B, (j + 1) / B).
    """
    # float64: the integer time n comes back exactly from n / 1000, and 0 has no weight
    u, drop = torch.rand(2, size, dtype=torch.float64, generator=stream("times", seed, step))  # (B,), (B,)
    if stratified:
        u = (torch.arange(size) + u) / size
    # only the local rows are drawn
    noise = draw_rows(numbered_streams("training noise", seed, step, ids=range(size)[local]), shape)
    return u[local], noise, drop[local]


def latent_noise(seed: int, step: int, size: int, shape: Sequence[int], local: slice) -> Tensor:
    """(b, *shape) standard normal: what draws the latents of a training step from their stored moments.

    Keyed as `global_batch` is, independent of the noise there.
    """
    return draw_rows(numbered_streams("latent noise", seed, step, ids=range(size)[local]), shape)
