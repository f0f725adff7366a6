"""From image ids to images: the one generator that grids, metrics, sweeps and timings all iterate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from libs import rng
from libs.build import lookup
from libs.exits import ExitPolicy
from libs.models import EarlyExitModel
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.images import Images
from libs.sampling.inflight import InFlight, suits
from libs.sampling.plans import SAMPLERS, Plan, sample
from sde import Process


def make_plan(process: Process, config_sample, steps: int | None = None, algorithm: str | None = None) -> Plan:
    """The sampler of config.sample as a table; `steps` (network evaluations) and `algorithm` override it."""
    algorithm = algorithm or config_sample.algorithm
    builder = lookup(SAMPLERS, algorithm, "sample.algorithm")
    options = dict(config_sample.get(algorithm) or {})
    return builder(process, steps=steps or config_sample.sample_steps, grid=config_sample.get("grid") or "", **options)


def generate(
    model: EarlyExitModel,
    regime: Regime,
    *,
    pred: str,
    plan: Plan,
    policy: ExitPolicy,
    guidance: Guidance,
    seed: int,
    ids: np.ndarray,
    batch_size: int,
    run: Run,
    inflight: bool = False,
) -> Iterator[Images]:
    """This process's share of the images `ids`, batch by batch.

    Image i depends on (seed, i). Whole batches are dealt to the processes in turn, so a batch holds the same images for
    any number of processes, and the images are the same to the last bit. `inflight`: where the policy allows it, images
    do not wait for their batch (libs/sampling/inflight.py); they are the same up to rounding, in the same batches.
    """
    if batch_size < 1:
        raise ValueError(f"sample.mini_batch_size is {batch_size}; it must be at least 1")
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    batches = batches[run.rank :: run.world]
    options = dict(pred=pred, plan=plan, policy=policy, guidance=guidance, seed=seed, run=run)
    if inflight and batches and suits(model, policy, guidance):
        flight = InFlight(model, regime, ids=np.concatenate(batches), batch_size=batch_size, **options)
        ends = np.cumsum([0, *map(len, batches)]).tolist()
        yield from (flight.images(start, stop) for start, stop in pairwise(ends))
        return
    for batch in batches:
        yield generate_batch(model, regime, ids=batch, **options)


@torch.inference_mode()
def generate_batch(
    model, regime, *, pred, plan, policy, guidance, seed, ids, run, make_denoiser: Callable[..., Denoiser] = Denoiser
) -> Images:
    """The images `ids` (n,) as one batch."""
    noise = rng.SeededNoise(seed, ids, regime.shape)
    cond = regime.conditions.for_ids(seed, ids)
    null = regime.conditions.null(len(ids))
    denoiser = make_denoiser(
        model,
        regime.process,
        pred,
        policy.bind(seed, ids),
        cond=None if cond is None else cond.to(run.device),
        null=None if null is None else null.to(run.device),
        guidance=guidance,
        n_calls=plan.nfe,
    )
    with run.accelerator.autocast():
        x = sample(plan, noise.draw().to(run.device), denoiser, noise if plan.stochastic else None)
        pixels = regime.codec.to(run.device).decode(x).cpu()
    labels = None if cond is None or cond.dim() > 1 else cond.numpy()
    return Images(pixels, ids, labels, denoiser.trace)
