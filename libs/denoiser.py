"""A noise predictor eps(x, t) for the samplers: guidance, exits, time unit and output kind are hidden in here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from libs.exits import ExitPolicy, Tied, Trace, run_with_exits
from libs.models import EarlyExitModel
from sde import Process

PAIRS = ("free", "tied")


@dataclass(frozen=True)
class Guidance:
    """eps = cond + scale (cond - null), U-ViT's convention: scale 0 is the conditional prediction alone.

    `pair`: the two rows of an image leave the network on their own ("free") or together ("tied").
    """

    scale: float = 0.0
    pair: str = "free"

    def __post_init__(self):
        if not (isinstance(self.scale, int | float) and 0 <= self.scale < float("inf")):
            raise ValueError(f"sample.scale is {self.scale!r}; guidance needs a finite scale >= 0 (0 = none)")
        if self.pair not in PAIRS:
            raise ValueError(f"sample.pair is {self.pair!r}; it must be one of {', '.join(PAIRS)}")


class Denoiser:
    """eps(x (B, C, H, W), t (B,) float64 on the CPU) -> (B, C, H, W) float32; records layers used in `trace`.

    `cond` and `null` are the conditions of all B rows (labels (B,), text (B, n, width), or None).
    """

    def __init__(
        self,
        model: EarlyExitModel,
        process: Process,
        pred: str,
        policy: ExitPolicy,
        *,
        cond: Tensor | None = None,
        null: Tensor | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 frozen
    ):
        if guidance.scale and null is None:
            raise ValueError(
                f"sample.scale is {guidance.scale}; guidance needs a conditional model with a null condition"
            )
        self.model, self.process, self.pred, self.guidance = model, process, pred, guidance
        self.guided = guidance.scale > 0
        self.policy = Tied(inner=policy) if self.guided and guidance.pair == "tied" else policy
        self.cond = torch.cat([cond, null]) if self.guided else cond
        asked = self.policy.asked(model.points) if "u" in self.policy.reads else ()
        self.trace = Trace(model.depth, asked)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])  # one batch: [conditional; null]
        time = self.process.network_time(t).to(x.device, torch.float32)
        out, used = run_with_exits(self.model, self.policy, x, t, time, self.cond)
        eps = self.process.eps(self.pred, out.float(), x, t.to(x.device, x.dtype))
        self.trace.add(float(t[0]), used.reshape(2 if self.guided else 1, -1))
        if self.guided:
            cond, null = eps.chunk(2)
            eps = cond + self.guidance.scale * (cond - null)
        return eps
