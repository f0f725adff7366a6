"""Run a network so that every row leaves where its policy says: the only place that removes rows from a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from libs.exits.policy import ExitPolicy, Look
from libs.models import AllExits, EarlyExitModel


def run_with_exits(
    model: EarlyExitModel, policy: ExitPolicy, x: Tensor, t: Tensor, time: Tensor, cond: Tensor | None
) -> tuple[Tensor, np.ndarray]:
    """One network call in which rows leave on their own.

    x (B, C, H, W); t (B,) in [0, 1] on the CPU, for the policy; time (B,) on x's device, for the network. Returns the
    raw network outputs (B, C, H, W) in the caller's row order and the layers used (B,). A row that left costs nothing any
    more; every row passes one head. Where the policy decides for the whole batch, the host never waits for the device.
    """
    depth = model.depth
    asked = frozenset(policy.asked(model.points))
    decide = policy.start(len(x), depth, t)
    reads = policy.reads
    used = np.full(len(x), depth)
    left: list[tuple[np.ndarray, Tensor]] = []  # rows that are done, and their outputs
    alive = np.arange(len(x))  # carry.rows, on the host

    carry = model.embed(x, time, cond)
    for k in range(depth + 1):
        if k:
            carry = model.layer(k - 1, carry)  # (b, L, D)
        if k not in asked:
            continue
        stop = decide(
            Look(
                k=k,
                rows=carry.rows,
                u=model.uncertainty(k, carry) if "u" in reads else None,
                patches=model.backbone.patches(carry) if "patches" in reads else None,
            )
        )
        if isinstance(stop, bool):
            stop = np.full(len(alive), stop)
        else:
            stop = stop.cpu().numpy()  # the one wait for the device at this exit
        if not stop.any():
            continue
        used[alive[stop]] = k
        if stop.all():
            left.append((alive, model.head(k, carry)))
            break
        leave, stay = (torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in (stop, ~stop))
        left.append((alive[stop], model.head(k, carry.keep(leave))))
        carry, alive = carry.keep(stay), alive[~stop]
    else:
        left.append((alive, model.head(depth, carry)))

    if len(left) == 1:
        return left[0][1], used
    order = np.argsort(np.concatenate([rows for rows, _ in left]))
    return torch.cat([out for _, out in left])[torch.from_numpy(order).to(x.device)], used


def run_dense(model: EarlyExitModel, x: Tensor, time: Tensor, cond: Tensor | None) -> AllExits:
    """Every exit of one call: the reference for tests, calibration and analysis."""
    return model(x, time, cond)


def dense_decisions(model: EarlyExitModel, policy: ExitPolicy, exits: AllExits, t: Tensor) -> np.ndarray:
    """The layers (B,) that `policy` would use, decided on a dense call without removing any row.

    It sees the uncertainties of the dense call, not tokens, so it serves policies that read "u" or nothing.
    """
    if policy.reads - {"u"}:
        raise ValueError(f"{type(policy).__name__} reads {sorted(policy.reads)}; dense decisions offer only 'u'")
    n = exits.out.shape[1]
    used = np.full(n, model.depth)
    decide = policy.start(n, model.depth, t)
    for k in policy.asked(model.points):
        alive = np.flatnonzero(used == model.depth)
        if not len(alive):
            break
        rows = torch.from_numpy(alive)
        u = exits.mean_u[exits.points.index(k)].cpu()
        stop = decide(Look(k=k, rows=rows, u=u[rows] if "u" in policy.reads else None))
        used[alive[np.asarray(stop) & np.ones(len(alive), bool)]] = k
    return used
