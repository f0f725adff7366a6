"""Training: one loop for every regime. Reading it top to bottom is reading what a run does."""

from __future__ import annotations

import copy
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from libs import rng
from libs.checkpoints import load as load_weights
from libs.checkpoints import training_state as checkpoints
from libs.checkpoints.training_state import State
from libs.data import batches
from libs.evaluation.evaluate import monitor, save_samples
from libs.losses import Objective
from libs.models.build import build_model
from libs.regimes import Regime
from libs.run import Run, describe_machine, say_progress

OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("customized", "cosine")


def fit(config, regime: Regime, run: Run) -> None:
    """Train `config.train.n_steps` optimiser steps, resuming from the run's newest checkpoint."""
    train = config.train
    shares = local_shares(train.batch_size, train.accumulate, run)

    # ---- model and the weights it starts from
    torch.manual_seed(config.seed)
    model = build_model(config)
    if config.pretrained_weight:
        run.say(load_weights(model, config.pretrained_weight, start=True))
    if train.freeze_backbone:
        model.freeze_backbone()
    model.to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)

    # ---- optimiser, schedule, distribution
    optimizer = make_optimizer(config.optimizer, model)
    lr_scheduler = make_lr_scheduler(config.lr_scheduler, optimizer, train.n_steps)
    ddp, optimizer = run.accelerator.prepare(model, optimizer)
    objective = Objective(**config.loss)
    dataset = regime.dataset()
    if train.sample_interval or train.eval_interval:  # what images need is missing now, not after hours
        regime.codec.to(run.device)
        regime.conditions.for_ids(config.seed, np.arange(1))

    # ---- resume: everything below depends on `step` only
    state = State(model, ema, optimizer, lr_scheduler, run.accelerator.scaler)
    run.say(checkpoints.resume(state, run.dir))
    if run.is_main:
        truncate_log(run.dir / "train.jsonl", state.step)
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

    # ---- the loop
    for _ in say_progress(range(state.step, train.n_steps), train.n_steps, "train", run, done=state.step):
        x, stored = next(stream)  # (b, C, H, W), and labels (b,) or contexts (b, tokens, width)
        uniform, noise, drop = rng.global_batch(  # (b,), (b, C, H, W), (b,)
            config.seed, state.step, train.batch_size, regime.shape, shares[0], stratified=train.stratified
        )
        latent_noise = (
            rng.latent_noise(config.seed, state.step, train.batch_size, regime.shape, shares[0]).to(run.device)
            if regime.codec.draws
            else None
        )
        cond = regime.conditions.for_training(stored.to(run.device), drop.to(run.device), config.dataset.p_uncond)
        sums: dict[str, torch.Tensor] = {}
        for micro in shares[1]:
            z = None if latent_noise is None else latent_noise[micro]
            x0 = regime.codec.sample(x[micro].to(run.device), z)  # (m, C, H, W)
            t = regime.process.times(uniform[micro]).to(run.device)  # (m,)
            eps = noise[micro].to(run.device)
            time = regime.process.network_time(t)
            context = nullcontext() if micro.stop == len(x) else run.accelerator.no_sync(ddp)
            with context:
                exits = ddp(regime.process.noised(x0, t, eps), time, None if cond is None else cond[micro])
                loss, parts = objective(exits, regime.process, config.pred, x0, eps, t)  # (m,), named parts
                run.accelerator.backward(loss.sum() / len(x))
            for name, part in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + part.sum()
        grad_norm = run.accelerator.clip_grad_norm_(ddp.parameters(), train.grad_clip or math.inf)
        optimizer.step()
        lr = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        optimizer.zero_grad()
        ema_update(ema, model, train.ema_rate)
        state.step += 1

        # ---- report, look, save
        done = state.step == train.n_steps
        if done or due(state.step, train.log_interval):
            means = run.all_sum(torch.stack(list(sums.values())).double()) / train.batch_size
            if not torch.isfinite(means[0]):
                raise ValueError(
                    f"the loss is {means[0]} at step {state.step}: lower optimizer.lr, or use bf16, not fp16"
                )
            run.log(state.step, **dict(zip(sums, means.tolist(), strict=True)), lr=lr, grad_norm=grad_norm)
        if due(state.step, train.sample_interval):
            save_samples(ema, config, regime, run, run.dir / "samples" / f"{state.step}.png")
        quality = monitor(ema, config, regime, run) if due(state.step, train.eval_interval) else None
        if quality is not None:
            run.log(state.step, **{f"monitor_{key}": value for key, value in quality.items()})
        best = quality is not None and min(quality.values()) < state.best
        if best:
            state.best = min(quality.values())
        if run.is_main and (done or best or due(state.step, train.save_interval)):
            path = checkpoints.save(state, run.dir, describe_machine() | {"config": config.to_dict()}, train.keep)
            if best:
                checkpoints.keep_best(run.dir, path)
        run.barrier()


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
    """ "adamw": every parameter, weight decay included, as released. "muon": see `MuonAdamW`."""
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name is {config.name!r}; it must be one of {', '.join(OPTIMIZERS)}")
    options = dict(lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay, fused=True)
    if config.name == "muon" and any(p.requires_grad for block in model.backbone.blocks for p in block.parameters()):
        return MuonAdamW(model, config.muon_lr, **options)
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **options)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the matrices of the backbone's blocks, AdamW on everything else, as one.

    A convolution is no matrix here: of a U-Net, Muon trains the attention and the maps of the time.
    """

    def __init__(self, model, muon_lr: float, **adamw):
        matrices = {p for block in model.backbone.blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad}
        rest = [p for p in model.parameters() if p.requires_grad and p not in matrices]
        matrices = [p for p in model.parameters() if p in matrices]
        self.parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=adamw["weight_decay"], adjust_lr_fn="original"),
            torch.optim.AdamW(rest, **adamw),
        ]
        super().__init__([*matrices, *rest], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # shared with the parts

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, loaded in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(loaded)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_lr_scheduler(config, optimizer, n_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then constant ("customized", as released) or a cosine to 0 ("cosine")."""
    if config.name not in LR_SCHEDULES:
        raise ValueError(f"lr_scheduler.name is {config.name!r}; it must be one of {', '.join(LR_SCHEDULES)}")
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


def truncate_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, so that no step stands in the log twice."""
    if path.exists():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        part = path.with_name(f"{path.name}.part")
        part.write_text("".join(f"{line}\n" for line in lines))
        os.replace(part, path)
