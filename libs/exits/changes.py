"""Rivals that skip most layers of a call where the first ones show that little has changed since an earlier call.

Neither needs training. Where they compute, they run full depth; where they do not, the tokens get what the skipped
layers added last.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from libs.exits.calls import Calls
from libs.exits.execute import run_or_reuse
from libs.exits.policy import ExitPolicy, one_size
from libs.exits.static import Full


class ChangeCalls(Calls):
    """Calls that run the layers behind the first ones only for the rows in which `unchanged` sees a change."""

    last: Tensor | None = None  # (B, L, D) what changes are measured against
    rest: Tensor | None = None  # (B, L, D) what the layers behind the first ones added last

    def call(self, policy, x, t, time, cond):
        first, depth, macs = policy.first, self.model.depth, self.macs
        out, used, self.rest = run_or_reuse(self.model, first, self.unchanged, self.rest, x, time, cond)
        few = macs.embed + sum(macs.layers[:first]) + macs.head[depth]
        return self.to_eps(out, x, t), used, np.where(used == depth, float(macs.at(depth)), few)

    def change(self, new: Tensor) -> Tensor:
        """(B,): mean |new - last| / mean |last| over an image's tokens (B, L, D), or over those of the whole batch."""
        means = torch.stack([(new - self.last).abs().mean((1, 2)), self.last.abs().mean((1, 2))])  # (2, B)
        if not self.policy.per_image:
            means = means.mean(1, keepdim=True).expand_as(means)
        return means[0] / means[1]

    def unchanged(self, before: Tensor, after: Tensor) -> Tensor:
        """(B,) bool: the rows that skip, from the tokens (B, L, D) before and after the first layers."""
        raise NotImplementedError


class FirstBlockCalls(ChangeCalls):
    def unchanged(self, before, after):
        new = after - before
        if self.last is None:
            self.last = new
            return torch.zeros(len(new), dtype=torch.bool)
        skips = self.change(new) < self.policy.threshold
        self.last = torch.where(skips[:, None, None], self.last, new)
        return skips


class TeaCacheCalls(ChangeCalls):
    total: Tensor | float = 0.0  # (B,) changes since the last call that was computed

    def unchanged(self, before, after):
        if self.last is None or self.number + 1 == self.n_calls:
            skips = torch.zeros(len(before), dtype=torch.bool, device=before.device)
        else:
            change, rescaled = self.change(before), torch.zeros(len(before), device=before.device)
            for coefficient in self.policy.polynomial:
                rescaled = rescaled * change + coefficient
            self.total = self.total + rescaled
            skips = self.total < self.policy.threshold
        self.total, self.last = self.total * skips, before
        return skips


@dataclass(frozen=True, kw_only=True)
class ByChange(Full):
    """Base of the two.

    As released, all rows of a batch decide together, by means over the batch, and an image depends on its batch mates;
    `per_image`: every row decides by its own.
    """

    threshold: float
    per_image: bool = False
    first: ClassVar[int]  # layers that run at every call
    paired = ExitPolicy.paired

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"exit.{self.name}.threshold is {self.threshold}; it is a relative change, at least 0")

    def check(self, model):
        one_size(self.name, model)


@dataclass(frozen=True, kw_only=True)
class FirstBlock(ByChange):
    """First-block cache (ParaAttention, and in diffusers): layer 1 runs at every call and decides about the others.

    Where its residual differs by less than `threshold` from that of the last call at full depth, relatively, the other
    layers do not run.
    """

    threshold: float = 0.1
    name: ClassVar = "first_block"
    first: ClassVar = 1
    kind: ClassVar = FirstBlockCalls


@dataclass(frozen=True, kw_only=True)
class TeaCache(ByChange):
    """TeaCache (Liu et al., CVPR 2025): no layer runs until the changes of the input have added up to `threshold`.

    A call's change is that of the first layer's input since the call before, relative, rescaled by `polynomial`
    (highest power first; the published ones are fitted to other networks, and the default is the change itself). The
    first and the last call always run.
    """

    threshold: float = 0.2
    polynomial: tuple[float, ...] = (1.0, 0.0)
    name: ClassVar = "teacache"
    first: ClassVar = 0
    kind: ClassVar = TeaCacheCalls
