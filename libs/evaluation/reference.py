"""What generated images are compared with, and the metrics of `eval.metrics` beside the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch

from libs.build import lookup
from libs.data import DATASETS, Dataset
from libs.metrics import KID, RBFMMD, PrecisionRecall, build_extractor, extract
from libs.metrics.clip_score import ClipModel, ClipScore
from libs.metrics.extractors import Extractor
from libs.regimes import Regime, Texts
from libs.run import Run

METRICS = ("kid", "precision_recall", "cmmd", "clip_score")
MOST = 50_000  # real images whose features are kept: 0.4 GB of 2,048 features, and as many as are mostly generated


def real_images(config, regime: Regime) -> Dataset:
    """The images of config.eval.real, or the training data."""
    if not config.eval.real:
        return regime.dataset()
    channels, size, _ = regime.image_shape
    return DATASETS["images"](path=config.eval.real, resolution=size, channels=channels, labels=False)


def real_features(config, regime: Regime, run: Run, extractor: Extractor) -> np.ndarray:
    """(n, F) of at most `MOST` real images, evenly spread."""
    images = real_images(config, regime)
    run.say(f"{extractor.name}: features of {min(MOST, len(images))} of {len(images)} real images")
    index = np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(int).tolist()
    chunks = (index[i : i + 64] for i in range(0, len(index), 64))
    return extract(extractor, (torch.stack([images.pixels(i) for i in chunk]) for chunk in chunks))


def more_metrics(config, regime: Regime, extractor: Extractor, run: Run) -> Callable[[int], list]:
    """What `config.eval.metrics` names, opened once; seed -> fresh metrics of that seed's images.

    Raises:
        ValueError, FileNotFoundError: an unknown metric, or one without its weights, texts or real images.
    """
    real = cache(partial(real_features, config, regime, run))
    makers: list[Callable] = []
    for name in config.eval.metrics:
        lookup(dict.fromkeys(METRICS), name, "eval.metrics")
        if name == "kid":
            makers.append(lambda seed: KID(extractor, real(extractor)))
        elif name == "precision_recall":
            makers.append(lambda seed: PrecisionRecall(extractor, real(extractor)))
        elif name == "cmmd":
            clip = build_extractor("clip_vit_l14_336", regime.image_shape, run.device)
            makers.append(lambda seed, clip=clip: RBFMMD(clip, real(clip)))
        else:
            if not isinstance(regime.conditions, Texts):
                raise ValueError("eval.metrics has clip_score, which compares images with texts; this model knows none")
            model = ClipModel(config.eval.clip, run.device)
            makers.append(lambda seed, model=model: ClipScore(model, partial(regime.conditions.texts, seed)))
    return lambda seed: [make(seed) for make in makers]
