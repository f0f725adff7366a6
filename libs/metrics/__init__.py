"""Metrics of generated images. Each has `update(batch)`, once per `Images`, and `compute(run) -> {key: float}`, which
reduces over processes. Positional arguments are what a run provides, keyword-only ones are settings:

    Frechet(extractor, reference)           fid (Inception) | fd_<extractor>
    KID(extractor, real)                    kid_<extractor>, kid_<extractor>_std
    RBFMMD(extractor, real)                 mmd_<extractor>
    PrecisionRecall(extractor, real)        precision_<extractor>, recall_<extractor>
    Paired(baseline)                        psnr, ssim
"""

from libs.metrics.extractors import EXTRACTORS, build_extractor, features_of
from libs.metrics.frechet import Frechet, Moments, Statistics, frechet_distance, real_halves
from libs.metrics.kernel import KID, RBFMMD
from libs.metrics.paired import Paired
from libs.metrics.prc import PrecisionRecall
