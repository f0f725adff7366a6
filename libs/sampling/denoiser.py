"""A noise predictor eps(x, t) for the samplers: guidance, exits, time unit and output kind are hidden in here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from libs.exits import Answer, Duo, ExitPolicy, Trace, start_calls
from libs.models import EarlyExitModel
from sde import Marginal, Process

PAIRS = ("free", "tied", "cond")


@dataclass(frozen=True)
class Guidance:
    """eps = cond + scale (cond - null), U-ViT's convention: scale 0 is the conditional prediction alone.

    `pair`: the two rows of an image leave the network on their own ("free"), together where both would ("tied"), or
    together where the conditional row would ("cond"). `channels`: guide the first ones only, and take the rest from
    the conditional prediction; 0 guides all. The released samplers of DiT and SiT guide three of four.

    >>> eps = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1)  # one image: its conditional prediction, then the null one
    >>> Guidance(scale=0.5).apply(eps).item()
    2.5
    >>> Guidance(scale=-1)
    Traceback (most recent call last):
        ...
    ValueError: sample.scale is -1; guidance needs a finite scale >= 0 (0 = none)
    """

    scale: float = 0.0
    pair: str = "free"
    channels: int = 0

    @classmethod
    def of(cls, sample, pair: str = "") -> Guidance:
        """From config.sample; `pair` in place of its own."""
        return cls(sample.scale, pair or sample.pair, sample.guided_channels)

    def __post_init__(self):
        if not (isinstance(self.scale, int | float) and 0 <= self.scale < float("inf")):
            raise ValueError(f"sample.scale is {self.scale!r}; guidance needs a finite scale >= 0 (0 = none)")
        if self.pair not in PAIRS:
            raise ValueError(f"sample.pair is {self.pair!r}; it must be one of {', '.join(PAIRS)}")
        if self.channels < 0:
            raise ValueError(f"sample.guided_channels is {self.channels}; it must be at least 0 (0 = all)")

    def apply(self, eps: Tensor) -> Tensor:
        """[conditional; null] predictions (2 B, C, H, W) -> the guided one (B, C, H, W)."""
        cond, null = eps.chunk(2)
        guided = cond + self.scale * (cond - null)
        return torch.cat([guided[:, : self.channels], cond[:, self.channels :]], dim=1) if self.channels else guided


class Denoiser:
    """eps(x (B, C, H, W), t (B,) float64 on the CPU) -> (B, C, H, W) float32; records layers used in `trace`.

    `cond` and `null` are the conditions of all B rows (labels (B,), text (B, n, width), or None). One denoiser serves
    one sampling of `n_calls` calls: methods that look back (libs/exits/caching.py) keep their memory in it.

    >>> from libs import Sampler
    >>> from libs.exits import EXIT_POLICIES
    >>> sampler = Sampler.load("demo/last.ckpt", device="cpu")
    >>> policy, process = EXIT_POLICIES["fixed"](layer=2), sampler.regime.process
    >>> denoiser = Denoiser(sampler.model, process, sampler.pred, policy, cond=torch.tensor([3, 4, 5]))
    >>> with torch.inference_mode():  # in a loop of your own
    ...     eps = denoiser(torch.randn(3, 1, 8, 8), torch.full((3,), 0.5).double())
    >>> eps.shape, denoiser.trace.used  # (calls, branches, images)
    (torch.Size([3, 1, 8, 8]), array([[[2, 2, 2]]], dtype=uint8))
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
        n_calls: int | None = None,
    ):
        if guidance.scale and null is None:
            raise ValueError(
                f"sample.scale is {guidance.scale}; guidance needs a conditional model with a null condition"
            )
        if isinstance(policy, Duo):
            policy.check_same(process, pred)
        self.model, self.process, self.pred, self.guidance = model, process, pred, guidance
        self.guided, policy = guidance.scale > 0, policy.on(model)
        self.policy = policy.paired(guidance.pair) if self.guided and guidance.pair != "free" else policy
        self.cond = torch.cat([cond, null]) if self.guided else cond
        self.trace = Trace(model.depth, model.questions(self.policy.questions(model.points)))
        self.shared: tuple[float | None, Marginal | None] = (None, None)  # the last time that a whole call had
        # a policy that decides for a whole call gets one call per guidance half
        halves = 2 if self.guided and not self.policy.per_image else 1
        self.calls = [start_calls(model, self.policy, self.to_eps, n_calls) for _ in range(halves)]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])  # one batch: [conditional; null]
        time = self.process.network_time(t).to(x.device, torch.float32, non_blocking=True)
        eps, used, costs = self.run(x, t, time)
        self.trace.add(float(t[0]), used.reshape(2 if self.guided else 1, -1), costs)
        if self.guided:
            eps = self.guidance.apply(eps)
        return eps

    def run(self, x: Tensor, t: Tensor, time: Tensor) -> Answer:
        """One network call for all rows, or one per guidance half."""
        if len(self.calls) == 1:
            return self.calls[0](x, t, time, self.cond)
        halves = zip(*(rows.chunk(2) for rows in (x, t, time, self.cond)), strict=True)
        eps, used, costs = zip(*(calls(*half) for calls, half in zip(self.calls, halves, strict=True)), strict=True)
        return torch.cat(eps), np.concatenate(used), None if costs[0] is None else np.concatenate(costs)

    def to_eps(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Raw network outputs at x (b, C, H, W), t (b,) on the CPU as noise predictions."""
        return out.float() if self.pred == "noise" else self.at(t, x).eps(self.pred, out.float(), x)

    def at(self, t: Tensor, x: Tensor) -> Marginal:
        """alpha and sigma at t (b,); one number each, made once per call, where rows share their time."""
        first = float(t[0])
        if not bool((t == first).all()):
            return self.process.at(t.to(x.dtype), x)
        if self.shared[0] != first:
            self.shared = first, self.process.at(t[:1].to(x.dtype), x)
        return self.shared[1]
