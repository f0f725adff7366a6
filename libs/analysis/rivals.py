"""Fits what two rivals of early exit learn: which sublayers of a frozen U-ViT may give their last output again.

Learning-to-Cache (a table by call) and LazyDiT (a linear gate by image) are fitted alike, with nothing but the gates
free. Every residual is mixed from its fresh value and what the full network gave at the call before, open by s:

    residual = s f(h) + (1 - s) last,    loss = |out - full|^2 / |closed - full|^2 + penalty * mean(s),

at the states of full-depth samplings; `closed` is the output with no sublayer open. Then one threshold closes as many
as the budget asks for. The released Learning-to-Cache closes sublayers in every second call only; so does this.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from libs.analysis.calibrate import check_images
from libs.exits import EXIT_POLICIES
from libs.exits.sublayers import gate
from libs.models.backbone import Macs
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.denoiser import Denoiser
from libs.sampling.sampler import Sampler

GATES = ("learned_cache", "lazy_gate")
GRADIENT_ROWS = 32  # rows of one gradient


@dataclass(frozen=True)
class Call:
    """What one network call of a full-depth sampling was given: x (B, C, H, W), time (B,), cond (B, ...) or None."""

    x: Tensor
    time: Tensor
    cond: Tensor | None

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x[index], self.time[index], None if self.cond is None else self.cond[index]


class Recording(Denoiser):
    """Full depth; `calls` gets what every call was given."""

    def __init__(self, *args, calls: list[Call], **options):
        super().__init__(*args, **options)
        self.record = calls

    def run(self, x, t, time):
        self.record.append(Call(x, time, self.cond))
        return super().run(x, t, time)


class Table(torch.nn.Module):
    """Learning-to-Cache: log(s / (1 - s)) of every (call, layer, sublayer), the same for all images."""

    def __init__(self, model, calls: int):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.full((calls, model.depth, 2), 2.0))

    def logit(self, call: int, i: int, j: int, h: Tensor) -> Tensor:
        return self.logits[call, i, j].expand(len(h))


class Gates(torch.nn.Module):
    """LazyDiT: log(s / (1 - s)) of an image from a sublayer's input, by a linear gate for every (layer, sublayer)."""

    def __init__(self, model, calls: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(model.depth, 2, model.backbone.embed_dim))
        self.bias = torch.nn.Parameter(torch.full((model.depth, 2), -2.0))

    def logit(self, call: int, i: int, j: int, h: Tensor) -> Tensor:
        return -gate(h, self.weight[i, j], self.bias[i, j])


def fit_gates(
    config: ConfigDict,
    regime: Regime,
    run: Run,
    kind: str,
    *,
    budget: float,
    n_images: int = 64,
    epochs: int = 30,
    penalty: float = 0.5,
    seed: int = 7001,
) -> dict:
    """Fit `kind` (GATES) to the configured sampling, and return what its policy reads.

    `budget`: the share of the MACs of these calls at full depth that may be spent, gates included.

    Raises:
        ValueError: no U-ViT, several processes, noise that an evaluation uses, or a budget that is not in reach.
    """
    if run.world > 1:
        raise ValueError(f"rivals are fitted in one process; {run.world} were started")
    check_images(config, run, n_images, seed)
    if epochs < 1:
        raise ValueError(f"--epochs={epochs}: it must be at least 1")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"--penalty={penalty:g}: it must be a number of at least 0")
    sampler = Sampler.open(config, regime, run)
    model, plan = sampler.model, sampler.plan()
    if not model.backbone.sublayers:
        raise ValueError(f"--kind={kind} gates the sublayers of a U-ViT; nnet.name is {config.nnet.name!r}")
    calls: list[Call] = []
    full = partial(sampler.batch, policy=EXIT_POLICIES["full"](), make_denoiser=partial(Recording, calls=calls))
    full(np.arange(n_images), seed=seed, plan=plan)
    table = kind == "learned_cache"
    late = range(1, len(calls), 2 if table else 1)  # the calls in which sublayers may rest
    torch.manual_seed(seed)
    gates = (Table if table else Gates)(model, len(calls)).to(run.device)
    with run.autocast():
        losses = learn_gates(model, gates, calls, late, epochs, penalty, run)
        logits = logits_of(model, gates, calls, late)  # (late, K, 2, B)
    found = {"kind": kind, "seeds": {"learned": seed}, "t": plan.t[plan.computed].tolist()}
    if table:
        logits = logits[..., 0]  # the same for all images
        ran = np.ones((len(calls), model.depth, 2), int)
        ran[list(late)] = logits > cut(logits, model.macs(), len(calls), budget)
        found["run"] = ran.tolist()
    else:
        gate_macs = 2 * model.depth * model.backbone.embed_dim * len(late)
        shift = cut(logits, model.macs(), len(calls), budget, gate_macs)  # closed: the gate is at least -shift
        found |= {"weight": gates.weight.tolist(), "bias": (gates.bias + shift).tolist()}
    return found | {"loss": losses}


def run_layers(model, run: Callable[..., Tensor], x, time, cond) -> Tensor:
    """The raw output of all layers; `run(i, j, f, h)` gives the residual of layer i's sublayer j."""
    carry = model.embed(x, time, cond)
    for i in range(model.depth):
        carry = model.backbone.layer(i, carry, partial(run, i))
    return model.head(model.depth, carry)


def residuals_of(model, x, time, cond) -> dict[tuple[int, int], Tensor]:
    """What every sublayer gives at full depth, (layer, sublayer) -> (b, L, D)."""
    given = {}

    def residual(i, j, f, h):
        given[i, j] = f(h)
        return given[i, j]

    run_layers(model, residual, x, time, cond)
    return given


def mixed(model, gates: Table | Gates, call: int, last: dict, x, time, cond) -> tuple[Tensor, Tensor]:
    """The raw output with every residual mixed by its gate, and the mean of the gates."""
    opened = []

    def residual(i, j, f, h):
        s = torch.sigmoid(gates.logit(call, i, j, h))  # (b,)
        opened.append(s)
        s = s[:, None, None]
        return s * f(h) + (1 - s) * last[i, j]

    out = run_layers(model, residual, x, time, cond).float()
    return out, torch.stack(opened).mean()


def learn_gates(
    model, gates: Table | Gates, calls: list[Call], late: range, epochs: int, penalty: float, run: Run
) -> dict:
    """Adam on the gates alone; an epoch is one step on the summed gradients of all late calls. First and last loss."""
    optimizer, losses = torch.optim.Adam(gates.parameters(), lr=0.1 if isinstance(gates, Table) else 0.02), []
    for epoch in range(epochs):
        optimizer.zero_grad()
        total = 0.0
        for call in late:
            index = torch.randperm(len(calls[call].x))[:GRADIENT_ROWS].to(calls[call].x.device)
            now = calls[call].rows(index)
            with torch.no_grad():
                last = residuals_of(model, *calls[call - 1].rows(index))
                full = model.backbone(*now).float()
                closed = run_layers(model, lambda i, j, f, h, last=last: last[i, j], *now).float()
                scale = (closed - full).square().mean()
            out, share = mixed(model, gates, call, last, *now)
            loss = ((out - full).square().mean() / scale + penalty * share) / len(late)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        if epoch % 10 == 9:
            run.say(f"epoch {epoch + 1} of {epochs}: loss {total:.4f}")
    return {"first": losses[0], "last": losses[-1]}


@torch.no_grad()
def logits_of(model, gates: Table | Gates, calls: list[Call], late: range) -> np.ndarray:
    """(late calls, K, 2, B): the gates along the full-depth samplings; s would round to 1 where a gate is sure."""
    found = []
    for call in late:
        seen = []

        def residual(i, j, f, h, call=call, seen=seen):
            seen.append(gates.logit(call, i, j, h))
            return f(h)

        run_layers(model, residual, calls[call].x, calls[call].time, calls[call].cond)
        found.append(torch.stack(seen).view(model.depth, 2, -1).cpu().double().numpy())
    return np.stack(found)


def cut(logits: np.ndarray, macs: Macs, calls: int, budget: float, extra: int = 0) -> float:
    """Gates (late calls, K, 2[, B]) above the answer stay open: they meet the budget, a share of `calls` full calls.

    `extra` MACs are spent on the gates.
    """
    n = logits[0, 0, 0].size  # images
    full = calls * macs.at(len(macs.layers))
    cost = np.broadcast_to(np.reshape(macs.sublayers, (2, 1)), (*logits.shape[:2], 2, n)).reshape(-1) / n
    least = full + extra - cost.sum()
    if not least <= budget * full <= full + extra:
        raise ValueError(f"--budget={budget:g}: with these calls it must lie in [{least / full:.3f}, 1]")
    order = np.argsort(logits.reshape(-1))
    spent = full + extra - np.cumsum(cost[order])  # after closing the first ones
    last = int(np.argmax(spent <= budget * full))
    return float(logits.reshape(-1)[order[last]])
