"""What the estimator says and what it should say, where in the image and at which exit: umaps.npz."""

from pathlib import Path

import numpy as np
import torch

from libs.files import atomic_write
from libs.models import NoEstimator
from libs.sampling.dense import DenseCall, sample_dense
from libs.sampling.sampler import Sampler


@torch.inference_mode()
def save_uncertainty_maps(sampler: Sampler, path: Path, seed: int, n: int = 4, times: int = 6) -> None:
    """u and the true |eps_k - eps_K| of every exit along full-depth trajectories of `n` images; nothing without u.

    Under guidance they are those of the conditional rows; the trajectory and the x0 that is shown are guided.
    """
    model, regime, guidance = sampler.model, sampler.regime, sampler.guidance
    if isinstance(model.uem, NoEstimator):
        path.unlink(missing_ok=True)  # of other weights
        return
    plan = sampler.plan()
    wanted = set(np.linspace(0, plan.nfe - 1, times).round().astype(int).tolist())
    rows: dict[str, list] = {"t": [], "u": [], "error": [], "x0": []}

    def look(call: DenseCall) -> None:
        if call.number in wanted:
            x, u = call.x[:n], call.u_map if call.u_map.dim() > 2 else call.u_map[..., None, None, None]
            eps = guidance.apply(call.eps[-1]) if guidance.scale else call.eps[-1]
            t = torch.full((n,), call.t, device=x.device, dtype=x.dtype)
            rows["t"].append(call.t)
            rows["u"].append(u.expand_as(call.eps)[:, :n].mean(2).float().cpu().numpy())
            rows["error"].append(call.gap[:, :n].abs().mean(2).cpu().numpy())
            rows["x0"].append(regime.codec.decode(regime.process.x0(eps, x, t)).cpu().numpy())

    ids = np.arange(n)
    sample_dense(sampler, ids, look, seed=seed, plan=plan)
    with atomic_write(path) as file:
        arrays = {name: np.stack(value) for name, value in rows.items()}
        np.savez_compressed(file, k=np.array(model.points), ids=ids, **arrays)
