"""Looks at a model during its training: a distance to the real images, and a grid of samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from libs.evaluation.reference import open_reference
from libs.exits import EXIT_POLICIES
from libs.metrics import Frechet, Statistics, build_extractor
from libs.metrics.extractors import Extractor
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.denoiser import Guidance
from libs.sampling.sampler import Sampler


@dataclass(frozen=True)
class Monitor:
    """Full-depth quality: fewer images and steps than an evaluation, no guidance. For comparison within a training."""

    config: object
    regime: Regime
    run: Run
    extractor: Extractor
    reference: Statistics

    @classmethod
    def open(cls, config, regime: Regime, run: Run) -> Monitor:
        """What every look needs: an extractor or a reference that is missing ends a training before its first step."""
        extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
        return cls(config, regime, run, extractor, open_reference(config, regime, extractor, run))

    def quality(self, model) -> dict[str, float]:
        """The Frechet distance of `model` to the real images; its key names the features."""
        frechet = Frechet(self.extractor, self.reference)
        sampler, options = full_depth_sampler(model, self.config, self.regime, self.run)
        ids, size = np.arange(self.config.train.monitor_samples), self.config.sample.mini_batch_size
        for images in sampler.images(ids, batch_size=size, **options):
            frechet.update(images)
        return frechet.compute(self.run)


def save_samples(model, config, regime: Regime, run: Run, path: Path) -> None:
    """A grid of 64 full-depth samples."""
    if run.is_main:
        path.parent.mkdir(exist_ok=True)
        sampler, options = full_depth_sampler(model, config, regime, run)
        sampler.batch(np.arange(64), **options).save(path)
    run.barrier()


def full_depth_sampler(model, config, regime: Regime, run: Run) -> tuple[Sampler, dict]:
    """Full depth without guidance, and what it samples with."""
    sampler = replace(Sampler.of(config, model, regime, run), guidance=Guidance())
    plan = sampler.plan(config.train.monitor_steps)
    return sampler, dict(seed=config.eval.selection_seed, plan=plan, policy=EXIT_POLICIES["full"]())
