"""Samplings in which every exit of every network call is looked at: for calibration, analysis, maps and the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from libs.exits import EXIT_POLICIES
from libs.sampling.denoiser import Denoiser
from libs.sampling.images import Images
from libs.sampling.plans import Plan
from libs.sampling.sampler import Sampler


@dataclass(frozen=True)
class DenseCall:
    """All exits of one network call. Under guidance the rows are [conditional; null] of all images."""

    number: int  # 0 is the first call, at the noise end
    t: float
    x: Tensor  # (B, C, H, W) where it is evaluated
    eps: Tensor  # (E, B, C, H, W) noise predictions
    u: Tensor  # (E, B) mean uncertainty
    u_map: Tensor  # (E, B, C, H, W), or (E, B) of estimators that give one number per image

    @property
    def gap(self) -> Tensor:
        """(E, B, C, H, W): eps_k - eps_K, what leaving at k changes."""
        return self.eps - self.eps[-1]


# Sees a call; returns the layers (B,) that the sampling goes on with, or None for full depth.
Pick = Callable[[DenseCall], Tensor | None]


class DenseDenoiser(Denoiser):
    """Runs every layer and every head; `look` picks the exit that is taken."""

    def __init__(self, *args, look: Pick, **options):
        super().__init__(*args, **options)
        self.look, self.number = look, 0

    def run(self, x: Tensor, t: Tensor, time: Tensor):
        exits = self.model(x, time, self.cond)
        eps = torch.stack([self.to_eps(out, x, t) for out in exits.out])  # (E, B, C, H, W)
        used = self.look(DenseCall(self.number, float(t[0]), x, eps, exits.mean_u, exits.u))
        self.number += 1
        if used is None:
            return eps[-1], np.full(len(x), self.model.depth), None
        index = torch.searchsorted(torch.tensor(exits.points), used.cpu()).to(x.device)
        return eps[index, torch.arange(len(x), device=x.device)], used.cpu().numpy(), None


def sample_dense(sampler: Sampler, ids: np.ndarray, look: Pick, *, seed: int, plan: Plan) -> Images:
    """The images `ids` (n,) as one batch, along the trajectory that `look` picks (None: full depth)."""
    options = dict(policy=EXIT_POLICIES["full"](), make_denoiser=partial(DenseDenoiser, look=look))
    return sampler.batch(ids, seed=seed, plan=plan, **options)
