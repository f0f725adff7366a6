"""Training: one loop for every regime. Reading it top to bottom is reading what a run does."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor

from libs import rng
from libs.build import check_ranges, lookup
from libs.checkpoints import check_config, load_weights
from libs.checkpoints import training_state as checkpoints
from libs.checkpoints.training_state import TrainState
from libs.data import batches
from libs.data.moments import moments
from libs.evaluation.monitor import Monitor, save_samples
from libs.losses import Depths, Objective, depth_at
from libs.models import build_model
from libs.regimes import SCRIPTS, Regime
from libs.run import Run, Stopped, describe_machine, precision_on, say_progress
from libs.sampling.stored import make_plan

OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("customized", "cosine")


def fit(config, regime: Regime, run: Run) -> None:
    """Train `config.train.n_steps` optimiser steps, resuming from the run's newest checkpoint.

    SIGTERM, SIGINT and SIGUSR1 end it after the step in flight (`Stopping.agreed`: with several processes after the
    next one), saved. A signal during the samples or the monitoring ends these; they are made again after the resume.

    Raises:
        ValueError: a setting is out of range; the directory holds another experiment; the training diverged.
        Stopped: a signal came and the state is saved.
    """
    check_ranges(config)
    train = config.train
    shares = local_shares(train.batch_size, train.accumulate, run)
    objective = Objective(**config.loss)
    torch.manual_seed(config.seed)
    model = build_model(config)
    depths = Depths(config, model, regime.process, objective)

    # ---- is this the experiment that the directory holds?
    dataset = regime.dataset()
    newest = checkpoints.found(run.dir)[-1:]
    settings = config.to_dict() | {"mixed_precision": run.accelerator.mixed_precision}
    meta = describe_machine() | {"config": settings, "data": dataset_fingerprint(dataset), "depths": depths.fingerprint}
    if dataset.class_names:
        meta["class_names"] = list(dataset.class_names)
    resumed_at = int(newest[0].stem) if newest else 0
    meta["changes"] = checkpoints.changes_since(checkpoints.read_meta(run.dir), meta, run.dir, resumed_at)

    # ---- the weights it starts from
    if config.pretrained_weight and not newest:
        run.say(load_weights(model, config.pretrained_weight, start=True))
        check_config(config.pretrained_weight, config, start=True)
    if train.freeze_backbone:
        model.freeze_backbone()
    if model.gaussian is not None and not newest:
        options = dict(flip=config.dataset.random_flip, shared=model.gaussian.shared)
        classes = getattr(regime.conditions, "n_classes", 0)
        model.gaussian.fit(*moments(dataset, regime.codec, classes, **options))
    model.to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if config.compile:
        model.compile_blocks()

    # ---- optimiser, schedule, distribution
    optimizer = make_optimizer(config.optimizer, model)
    lr_scheduler = make_lr_scheduler(config.lr_scheduler, optimizer, train.n_steps)
    run.accelerator.ddp_handler = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # exit 0's are the same in all processes
        gradient_as_bucket_view=True,  # of the buckets that processes exchange: one copy of all gradients less
        find_unused_parameters=train.depths != "all",  # layers that a batch does not run have no gradients
    )
    ddp, optimizer = run.accelerator.prepare(model, optimizer)
    if train.sample_interval or train.eval_interval:  # what images need is missing now, not after hours
        make_plan(regime.process, config.sample, train.monitor_steps)
        regime.codec.to(run.device)
        regime.conditions.for_ids(config.seed, np.arange(1))
    monitor = Monitor.open(config, regime, run) if train.eval_interval else None

    # ---- resume: everything below depends on `step` only
    state = TrainState(model, ema, optimizer, lr_scheduler, run.accelerator.scaler)
    run.say(checkpoints.resume(state, run.dir))
    run.say(startup_line(run, model, dataset))
    if run.is_main:
        checkpoints.tidy(run.dir, train.keep)
        checkpoints.truncate_log(run.dir / "train.jsonl", state)
    run.barrier()
    stream = batches(
        dataset,
        batch_size=train.batch_size,
        start_step=state.step,
        rank=run.rank,
        world=run.world,
        seed=config.seed,
        flip=config.dataset.random_flip,
        workers=config.dataset.workers,
    )

    # ---- the loop: each round makes one step, then looks at it and saves it where that is due
    meter = Meter(run, train.batch_size)
    certainty = (config.exit.get(config.exit.name) or {}).get("certainty") or config.exit.threshold.certainty
    first = state.step - (not state.looked)  # a run that was stopped in a look goes on with that look
    with run.stopping.deferred():
        for step in say_progress(range(first, train.n_steps), train.n_steps, "train", run, done=first, lines=True):
            if state.step == step:
                batch = draw_batch(stream, config, regime, run, step, shares[0], depths)
                sums: dict[str, Tensor] = {}
                for micro in shares[1]:
                    context = nullcontext() if micro.stop == len(batch.x) else run.accelerator.no_sync(ddp)
                    with context:
                        loss, parts = losses(ddp, batch.rows(micro), objective, regime, config.pred, certainty)
                        run.accelerator.backward(loss.sum() / len(batch.x))
                    for name, part in parts.items():
                        sums[name] = sums.get(name, 0) + part.sum()
                grad_norm = run.accelerator.clip_grad_norm_(ddp.parameters(), train.grad_clip or math.inf)
                optimizer.step()
                lr = optimizer.param_groups[0]["lr"]
                lr_scheduler.step()
                optimizer.zero_grad()
                ema_update(ema, model, train.ema_rate)
                state.step += 1
                looks = due(state.step, train.sample_interval) or due(state.step, train.eval_interval)
                state.looked = not looks

                # ---- report
                meter.steps += 1
                done, stop = state.step == train.n_steps, run.stopping.agreed()
                saves = done or stop or looks or due(state.step, train.save_interval)
                if saves or due(state.step, train.log_interval):
                    means = run.all_sum(torch.stack(list(sums.values())).double()) / train.batch_size
                    values = dict(zip(sums, means.tolist(), strict=True)) | {"lr": lr, "grad_norm": float(grad_norm)}
                    check_finite(values, state, run)
                if saves:  # what is saved has gone through the network once
                    parts = [losses(ddp, batch.rows(m), objective, regime, config.pred, learn=False) for m in shares[1]]
                    after = sum(float(loss.double().sum()) for loss, _ in parts) / train.batch_size
                    after = float(run.all_sum(torch.tensor(after, dtype=torch.float64)))
                    check_finite({"loss after the step": after}, state, run)
                if done or due(state.step, train.log_interval):
                    values |= meter.rates()
                    run.log(state.step, **values)
                    run.say(log_line(state.step, train.n_steps, values, model.depth, certainty))
            else:  # only the look is missing
                done, stop, saves = state.step == train.n_steps, run.stopping.agreed(), True

            # ---- look, save
            best = False
            if not (state.looked or stop):
                try:
                    with run.stopping.at_once():
                        quality = look(state, monitor, config, regime, run)
                except Stopped:
                    stop = True
                else:
                    best = keep_in_mind(quality, state, run)
            path = None
            if run.is_main and (done or best or stop or due(state.step, train.save_interval)):
                if best:
                    checkpoints.keep_best(run.dir, ema, meta)
                path = checkpoints.save_state(state, run.dir, meta, train.keep)
            if stop:
                note = f"step {state.step} of {train.n_steps} is saved as {path}; the same command goes on from there"
                raise Stopped(run.stopping.signal, note)
            if saves:
                meter.restart()
    run.barrier()
    script = SCRIPTS[config.regime].replace("train", "eval")
    run.say(
        f"step {state.step} of {train.n_steps} is done: {run.dir / 'last.ckpt'}\n"
        f"next: python {script} --nnet_path={run.dir / 'last.ckpt'}"
    )


# ---- one step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One process's rows of a step and all its randomness; the uniform numbers stay on the CPU, in float64."""

    x: Tensor  # (b, C, H, W) as the data set has it
    uniform: Tensor  # (b,) in [0, 1), for the times
    noise: Tensor  # (b, C, H, W)
    latent_noise: Tensor | None  # (b, C, H, W) where the codec draws
    cond: Tensor | None  # (b, ...)
    points: tuple[int, ...]  # the exits that it trains

    def rows(self, part: slice) -> Batch:
        return replace(self, **{name: of[part] for name, of in vars(self).items() if isinstance(of, Tensor)})


def draw_batch(stream, config, regime: Regime, run: Run, step: int, rows: slice, depths: Depths) -> Batch:
    """The batch of `step`: rows `rows` of the global batch."""
    x, stored = next(stream)  # (b, C, H, W), and labels (b,) or contexts (b, tokens, width)
    key = (config.seed, step, config.train.batch_size, regime.shape, rows)
    uniform, noise, drop = rng.global_batch(*key, stratified=config.train.stratified)
    points, uniform = depths.draw(step, uniform)
    torch.manual_seed(rng.hash32("dropout", config.seed, step, run.rank))  # what the network itself draws
    latent_noise = run.put(rng.latent_noise(*key)) if regime.codec.draws else None
    cond = regime.conditions.for_training(run.put(stored), run.put(drop), config.dataset.p_uncond)
    return Batch(run.put(x), uniform, run.put(noise), latent_noise, cond, points)


def losses(
    network, batch: Batch, objective: Objective, regime: Regime, pred: str, certainty=0.0, learn=True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (m,) of every row, and its parts for the log, each (m,); `depth` is the layers used at `certainty`."""
    with torch.set_grad_enabled(learn):
        x0 = regime.codec.sample(batch.x, batch.latent_noise)  # (m, C, H, W)
        t = regime.process.times(batch.uniform)  # (m,) on the CPU
        time = regime.process.network_time(t).to(x0.device, non_blocking=True)
        exits = network(regime.process.noised(x0, t, batch.noise), time, batch.cond, batch.points)
        loss, parts = objective(exits, regime.process, pred, x0, batch.noise, t)
    parts = {"loss": loss.detach(), **parts}
    if objective.lambda_u and certainty and exits.full:
        parts["depth"] = depth_at(exits, certainty)
    return loss, parts


def look(state: TrainState, monitor: Monitor | None, config, regime: Regime, run: Run) -> dict[str, float]:
    """Make the samples and measure the quality due at this step; {} where no quality is."""
    if due(state.step, config.train.sample_interval):
        save_samples(state.ema, config, regime, run, run.dir / "samples" / f"{state.step}.png")
    return monitor.quality(state.ema) if due(state.step, config.train.eval_interval) else {}


def keep_in_mind(quality: dict[str, float], state: TrainState, run: Run) -> bool:
    """Log what a look found; returns whether it is the best so far."""
    state.looked = True
    if not quality:
        return False
    run.log(state.step, **{f"monitor_{key}": value for key, value in quality.items()})
    run.say(f"step {state.step}  " + "  ".join(f"{key} {value:.4g}" for key, value in quality.items()))
    best = min(quality.values()) < state.best
    state.best = min(state.best, *quality.values())
    return best


def check_finite(values: dict[str, float], state: TrainState, run: Run) -> None:
    """Refuse to go on, and to save, once a run has diverged. Under fp16 a gradient may: its step is left out."""
    if state.scaler is not None:
        values = {name: value for name, value in values.items() if name != "grad_norm"}
    parameters = [*state.model.parameters(), *state.ema.parameters()]
    values = values | {"norm of the weights": float(torch.stack(torch._foreach_norm(parameters)).detach().sum())}
    wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if wrong is None:
        return
    saved = checkpoints.found(run.dir)
    where = f"goes on from {saved[-1]}" if saved else "starts again at step 0, as nothing was saved"
    raise ValueError(
        f"the training diverged: the {wrong} is {values[wrong]} at step {state.step}. Start the same command again "
        f"with a lower --config.optimizer.lr (or muon_lr), with --config.train.grad_clip, or in another --workdir with "
        f"bf16 instead of fp16; it {where}"
    )


# ---- what a run says -----------------------------------------------------------------------------------------------


class Meter:
    """Images per second since the last report, without the time of samples, monitoring and saving; and memory."""

    def __init__(self, run: Run, batch_size: int):
        self.run, self.batch_size = run, batch_size
        self.restart()

    def restart(self) -> None:
        self.steps, self.start = 0, time.perf_counter()

    def rates(self) -> dict[str, float]:
        """`images_per_s` of all processes together; `memory_gb`, the most this process held: of the GPU, else RAM."""
        rate = self.steps * self.batch_size / (time.perf_counter() - self.start)
        self.restart()
        if self.run.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.run.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes, and kilobytes elsewhere
            memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"images_per_s": rate, "memory_gb": memory / 1e9}


def log_line(step: int, n_steps: int, values: dict[str, float], depth: int, certainty: float) -> str:
    parts = [f"step {step}/{n_steps}", f"loss {values['loss']:.4g}", f"lr {values['lr']:.3g}"]
    parts.append(f"{values['images_per_s']:.0f} images/s")
    if "depth" in values:
        parts.append(f"depth {values['depth']:.2f} of {depth} at certainty {certainty:g}")
    return "  ".join([*parts, f"{values['memory_gb']:.2f} GB"])


def startup_line(run: Run, model, dataset) -> str:
    """Where and what is trained, in one line."""
    gpu = run.device.type == "cuda"
    device = torch.cuda.get_device_name(run.device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    parameters = list(model.parameters())
    total, learned = (sum(p.numel() for p in parameters if p.requires_grad or frozen) for frozen in (True, False))
    return (
        f"{run.world} process(es) on {device}, precision {run.accelerator.mixed_precision}; {total / 1e6:.2f} M "
        f"parameters{'' if learned == total else f', {learned / 1e6:.2f} M of them trained'}; {len(dataset):,} images"
    )


def dataset_fingerprint(dataset, n: int = 16) -> str:
    """Identifies the data, wherever they lie: their number, shape and labels and `n` images spread over them."""
    indices = torch.linspace(0, len(dataset) - 1, n, dtype=torch.float64).round().long()
    columns = [indices, torch.zeros(n, dtype=torch.bool), *([torch.zeros(n)] if dataset.draws else [])]
    digest = hashlib.sha256(repr((len(dataset), tuple(dataset.shape))).encode())
    labels = getattr(dataset, "labels", None)
    for part in (*dataset.gather(*columns), *([] if labels is None else [torch.as_tensor(labels)])):
        digest.update(part.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- parts ---------------------------------------------------------------------------------------------------------


def due(step: int, interval: int) -> bool:
    """Every `interval` steps; 0 means never."""
    return interval > 0 and step % interval == 0


def local_shares(batch_size: int, accumulate: int, run: Run) -> tuple[slice, list[slice]]:
    """This process's rows of the global batch, and the micro-batches within them."""
    if batch_size % (run.world * accumulate):
        raise ValueError(
            f"train.batch_size {batch_size} is the batch of all processes together: it must be a multiple of the "
            f"{run.world} process(es) times train.accumulate {accumulate}"
        )
    local = batch_size // run.world
    micro = local // accumulate
    rows = slice(run.rank * local, (run.rank + 1) * local)
    return rows, [slice(start, start + micro) for start in range(0, local, micro)]


def make_optimizer(config, model) -> torch.optim.Optimizer:
    """ "adamw": every parameter, weight decay included, as released.

    "muon": Muon (Jordan et al. 2024) on the matrices of the backbone's blocks, AdamW on everything else. A convolution
    is no matrix here: of a U-Net, Muon trains the attention and the maps of the time.
    """
    lookup(OPTIMIZERS, config.name, "optimizer.name")
    options = dict(lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {p for block in model.backbone.blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad}
    if config.name == "adamw" or not matrices:
        return torch.optim.AdamW(trained, **options, fused=True)
    from timm.optim import Muon
    from timm.optim import muon as timm_muon

    if precision_on(trained[0].device, "auto") == "no":  # timm orthogonalises in bf16 and has no setting for it
        exact = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
        timm_muon.zeropower_via_newtonschulz = exact
    muon = dict(params=[p for p in trained if p in matrices], lr=config.muon_lr, use_muon=True)
    muon |= dict(nesterov=True, ns_coefficients="original", adjust_lr_fn="original")
    rest = dict(params=[p for p in trained if p not in matrices], lr=config.lr, use_muon=False, eps=1e-8)
    return Muon([muon, rest], betas=options["betas"], weight_decay=config.weight_decay)


def make_lr_scheduler(config, optimizer, n_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then constant ("customized", as released) or a cosine to 0 ("cosine")."""
    lookup(LR_SCHEDULES, config.name, "lr_scheduler.name")
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.name == "customized":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, n_steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def ema_update(ema, model, rate: float) -> None:
    """ema <- rate ema + (1 - rate) model, parameters only, from the first step (as released)."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
