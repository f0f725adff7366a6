"""What the estimator says and what it should say, where in the image and at which exit: umaps.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from libs import rng
from libs.files import atomic_write
from libs.models import NoEstimator
from libs.sampling.plans import sample
from libs.sampling.sampler import Sampler


@torch.inference_mode()
def save_uncertainty_maps(sampler: Sampler, path: Path, seed: int, n: int = 4, times: int = 6) -> None:
    """u and the true |eps_k - eps_K| of every exit along full-depth trajectories of `n` images; nothing without u."""
    model, regime, device = sampler.model, sampler.regime, sampler.run.device
    if isinstance(model.uem, NoEstimator):
        return
    plan = sampler.plan()
    wanted = set(np.linspace(0, plan.nfe - 1, times).round().astype(int).tolist())
    rows: dict[str, list] = {"t": [], "u": [], "error": [], "x0": []}
    ids = np.arange(n)
    cond = sampler.run.put(regime.conditions.for_ids(seed, ids))
    calls = 0

    def eps_fn(x, t):
        nonlocal calls
        moved = t.to(x.device, x.dtype)
        exits = model(x, regime.process.network_time(t).to(x.device, torch.float32), cond)
        eps = torch.stack([regime.process.eps(sampler.pred, out, x, moved) for out in exits.out])  # (E, n, C, H, W)
        if calls in wanted:
            u = exits.u if exits.u.dim() > 2 else exits.u[..., None, None, None].expand_as(eps)
            rows["t"].append(float(t[0]))
            rows["u"].append(u.mean(2).cpu().numpy())
            rows["error"].append((eps - eps[-1]).abs().mean(2).cpu().numpy())
            rows["x0"].append(regime.codec.decode(regime.process.x0(eps[-1], x, moved)).cpu().numpy())
        calls += 1
        return eps[-1]

    noise = rng.SeededNoise(seed, ids, regime.shape)
    sample(plan, noise.draw().to(device), eps_fn, noise if plan.stochastic else None)
    with atomic_write(path) as file:
        arrays = {name: np.stack(value) for name, value in rows.items()}
        np.savez_compressed(file, k=np.array(model.points), ids=ids, **arrays)
