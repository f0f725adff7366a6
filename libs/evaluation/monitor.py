"""Looks at a model during its training: a distance to the real images, and a grid of samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from libs.evaluation.reference import open_reference
from libs.exits import EXIT_POLICIES
from libs.metrics import Frechet, build_extractor
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.denoiser import Guidance
from libs.sampling.sampler import Sampler


def monitor(model, config, regime: Regime, run: Run) -> dict[str, float]:
    """Full-depth quality: fewer images and steps than an evaluation, no guidance. For comparison within a training."""
    extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
    frechet = Frechet(extractor, open_reference(config, regime, extractor, run))
    sampler, options = plain(model, config, regime, run)
    ids, size = np.arange(config.train.monitor_samples), config.sample.mini_batch_size
    for images in sampler.images(ids, batch_size=size, **options):
        frechet.update(images)
    return frechet.compute(run)


def save_samples(model, config, regime: Regime, run: Run, path: Path) -> None:
    """A grid of 64 full-depth samples."""
    if run.is_main:
        path.parent.mkdir(exist_ok=True)
        sampler, options = plain(model, config, regime, run)
        sampler.batch(np.arange(64), **options).save(path)
    run.barrier()


def plain(model, config, regime: Regime, run: Run) -> tuple[Sampler, dict]:
    """Full depth without guidance, and what it samples with."""
    sampler = replace(Sampler.of(config, model, regime, run), guidance=Guidance())
    plan = sampler.plan(config.train.monitor_steps)
    return sampler, dict(seed=config.eval.selection_seed, plan=plan, policy=EXIT_POLICIES["full"]())
