"""Randomness is a function of names, never of batches, ranks or history."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from libs.rng import SeededNoise, global_batch, hash32, numbered_streams, stream

SHAPE = (2, 4, 4)


def test_streams_are_stable_and_distinct():
    """Catches a hash that changes between processes (Python's own), versions, or keys that run into each other."""
    assert hash32("order", 7) == 0xC0CCB130  # recorded: a change would change every image and every training run
    keys = [(1,), ("1",), (1, 2), (12,), ("a", "b"), ("ab",), ("a", 1), (1, "a"), (-1,), ()]
    assert len({stream(*key).initial_seed() for key in keys}) == len(keys)
    assert hash32(np.int64(3)) == hash32(3)
    code = "from libs.rng import hash32; print(hash32('x', 5))"
    root = Path(__file__).resolve().parents[1]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert int(other) == hash32("x", 5)


def test_a_fraction_is_no_key():
    """Catches ids that were averaged or scaled, silently cut to integers."""
    with pytest.raises(TypeError):
        stream(0.5)
    with pytest.raises(ValueError, match="-1"):
        SeededNoise(0, [3, -1], SHAPE)


def test_no_two_images_share_a_generator():
    """Catches hashed image seeds: torch's CPU engine has 2^32 of them, so 300,000 images would collide 10 times."""
    seeds = [g.initial_seed() for g in numbered_streams("noise", 0, ids=range(0, 3_000_000, 1000))]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    assert len(set((np.arange(300_000, dtype=np.uint64) * 0x9E3779B1 % 2**32).tolist())) == 300_000


def test_noise_of_an_image_ignores_its_batch():
    """Catches one generator per batch: the image would change with the batch size, the rank count and its mates."""
    together = SeededNoise(3, np.array([5, 9, 2]), SHAPE)
    alone = SeededNoise(3, [9], SHAPE)
    for _ in range(3):
        assert torch.equal(together.draw()[1], alone.draw()[0])


def test_noise_differs_between_images_draws_and_seeds():
    """Catches a seed that is ignored, and a stream that repeats."""
    noise = SeededNoise(0, [0, 1], SHAPE)
    first, second, other = noise.draw(), noise.draw(), SeededNoise(1, [0, 1], SHAPE).draw()
    rows = [first[0], first[1], second[0], second[1], other[0], other[1]]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 6
    assert first.dtype == torch.float32 and first.shape == (2, *SHAPE)


def test_noise_is_standard_normal():
    """Catches uniform or scaled noise, and rows that are correlated. Bounds of 5 standard errors: 2e-6 false alarms."""
    n = 400
    rows = SeededNoise(0, range(n), (1, 16, 16)).draw().flatten(1)  # (n, 256)
    total = rows.numel()
    assert abs(rows.mean()) < 5 / total**0.5
    assert abs(rows.var() - 1) < 5 * (2 / total) ** 0.5
    neighbours = (rows[1:] * rows[:-1]).mean()  # numbered seeds must not give related streams
    assert abs(neighbours) < 5 / ((n - 1) * 256) ** 0.5


def test_keep_goes_on_where_the_images_are():
    """Catches a subset that starts its images' noise again, or keeps the wrong images."""
    whole, part = SeededNoise(0, [4, 5, 6], SHAPE), SeededNoise(0, [4, 5, 6], SHAPE)
    whole.draw()
    part.draw()
    index = torch.tensor([2, 0])
    kept = part.keep(index)
    assert len(kept.generators) == 2 and torch.equal(kept.draw(), whole.draw()[index])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_training_draws_do_not_depend_on_ranks(world, stratified):
    """Catches per-rank seeds: the run would change with the number of processes."""
    whole = global_batch(1, 7, 8, SHAPE, slice(0, 8), stratified=stratified)
    size = 8 // world
    parts = [global_batch(1, 7, 8, SHAPE, slice(r * size, (r + 1) * size), stratified=stratified) for r in range(world)]
    for i, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), tensor)


def test_training_draws_differ_between_steps_seeds_and_kinds():
    """Catches a step or a seed that is ignored, and label dropping tied to the time."""
    base = global_batch(1, 7, 4, SHAPE, slice(0, 4))
    for other in (global_batch(1, 8, 4, SHAPE, slice(0, 4)), global_batch(2, 7, 4, SHAPE, slice(0, 4))):
        assert all(not torch.equal(a, b) for a, b in zip(base, other, strict=True))
    u, noise, drop = base
    assert not torch.equal(u, drop) and len({tuple(row.flatten().tolist()) for row in noise}) == 4
    assert u.shape == drop.shape == (4,) and noise.shape == (4, *SHAPE) and noise.dtype == torch.float32
    assert u.dtype == torch.float64  # level n / 1000 in float32 does not always come back as n


def test_uniforms_are_uniform():
    """Catches times that cover part of [0, 1). Bound of 5 standard errors: 6e-7 false alarms per check."""
    draws = [global_batch(0, step, 512, (1,), slice(0, 512)) for step in range(8)]
    for i in (0, 2):
        values = torch.cat([d[i] for d in draws])
        counts = torch.histc(values, 8, 0, 1)
        assert values.min() >= 0 and values.max() < 1
        assert ((counts - 512).abs() < 5 * (4096 * 1 / 8 * 7 / 8) ** 0.5).all()


def test_stratified_times_fill_every_stratum():
    """Catches an option that does nothing."""
    u, _, _ = global_batch(0, 3, 64, (1,), slice(0, 64), stratified=True)
    assert torch.equal((u * 64).floor(), torch.arange(64, dtype=torch.float64))
