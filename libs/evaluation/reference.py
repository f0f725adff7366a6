"""What generated images are compared with, and the metrics of `eval.metrics` beside the Fréchet distance."""

import hashlib
import json
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch

from libs.build import lookup
from libs.data import DATASETS, Dataset
from libs.files import read_json
from libs.metrics import KID, RBFMMD, Frechet, Moments, PrecisionRecall, Statistics, build_extractor, features_of
from libs.metrics import real_halves as distance_of_halves
from libs.metrics.clip_score import ClipModel, ClipScore
from libs.metrics.extractors import Extractor
from libs.regimes import Regime, Texts
from libs.run import Run, say_progress

METRICS = ("kid", "precision_recall", "cmmd", "clip_score")
MOST_REAL = 50_000  # real images whose features are kept: 0.4 GB of 2,048 features, and as many as are mostly generated
HALVES = 10_000  # real images that are held against one another: 5,000 on each side
CHUNK = 256


def real_images(config, regime: Regime) -> Dataset:
    """The images of config.eval.real, or the training data."""
    if not config.eval.real:
        return regime.dataset()
    channels, size, _ = regime.image_shape
    return DATASETS["images"](path=config.eval.real, resolution=size, channels=channels, labels=False)


def images_fingerprint(images: Dataset, extractor: Extractor, n: int = 64) -> str:
    """Tells images apart, wherever they lie, by their number and the pixels of up to `n` of them, and the features."""
    features = extractor.name, extractor.preprocessing, extractor.resolution
    digest = hashlib.sha256(json.dumps([len(images), *features]).encode())
    for i in np.unique(np.linspace(0, len(images) - 1, n).round().astype(int)).tolist():
        digest.update(images.pixels(i).numpy().tobytes())
    return digest.hexdigest()[:16]


def open_reference(config, regime: Regime, extractor: Extractor, run: Run) -> Statistics:
    """The statistics of config.eval.reference, or of the real images, computed once and kept in the run's directory.

    What is kept counts only for the same images and features (`key` in reference.json). All processes share the work.
    """
    if config.eval.reference:
        if run.is_main:
            (run.dir / "reference.json").unlink(missing_ok=True)  # of images that are not compared with any more
        return Statistics.load(config.eval.reference, extractor)
    images = real_images(config, regime)
    path, note, key = run.dir / "reference.npz", run.dir / "reference.json", images_fingerprint(images, extractor)
    kept = path.exists() and note.exists() and read_json(note, "the kept reference").get("key") == key
    run.barrier()  # nobody may write while others still look
    if not kept:
        make_reference(images, extractor, key, run)
    return Statistics.load(path, extractor)


def make_reference(images: Dataset, extractor: Extractor, key: str, run: Run) -> None:
    """Write reference.npz and, after it, reference.json."""
    quality_key, n = Frechet.key_of(extractor), len(images)
    run.say(f"reference: {extractor.name} features of {n} real images")
    moments, kept = Moments(extractor.n_features), []
    stride = -(-n // HALVES)
    chunks = [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)][run.rank :: run.world]
    for chunk in say_progress(chunks, len(chunks), "reference", run):
        features = features_of(extractor, [images.stack(chunk)])
        moments.add(torch.from_numpy(features))
        kept.append((chunk.start, features[[i % stride == 0 for i in chunk]]))
    statistics = moments.statistics(extractor, run)
    features = np.concatenate([rows for _, rows in sorted(run.gather_list(kept), key=lambda pair: pair[0])])
    if run.is_main:
        # an eigendecomposition of thousands of dimensions takes minutes on a CPU: one split has to do there
        splits = 10 if extractor.n_features <= 512 else 1
        run.say(f"reference: {len(features) // 2} real images against as many others, {splits} times")
        halves = distance_of_halves(features, extractor, splits=splits)
        (run.dir / "reference.json").unlink(missing_ok=True)
        statistics.save(run.dir / "reference.npz")
        found = {f"{quality_key}_real_halves": halves, "n_half": len(features) // 2, "n_real": n, "key": key}
        run.write_json("reference.json", found)
    run.barrier()


def real_features(config, regime: Regime, run: Run, extractor: Extractor) -> np.ndarray:
    """(n, F) of at most `MOST_REAL` real images, evenly spread."""
    images = real_images(config, regime)
    run.say(f"{extractor.name}: features of {min(MOST_REAL, len(images))} of {len(images)} real images")
    index = np.linspace(0, len(images) - 1, min(MOST_REAL, len(images))).round().astype(int).tolist()
    chunks = (index[i : i + 64] for i in range(0, len(index), 64))
    return features_of(extractor, map(images.stack, chunks))


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
