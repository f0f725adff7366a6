"""The layer-wise training objective: simple loss, uncertainty fit, and weighted losses of the earlier exits.

    L = L_simple + lambda_u L_u + lambda_layers sum_k w_k err_k + lambda_extra mean_k err_k        (paper Eq. 13)

err_k is the mean squared error of exit k in what the network regresses (config `pred`); L_u fits the estimate u_k to
tanh|eps_k - eps| per pixel (Eq. 10, 11). The uncertainty is about eps, whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from libs.models import AllExits
from sde import Process


def ual(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """Paper Eq. 12: w_k = 1 - u_k, per image, stopped, summed over exits."""
    return 1 - u.detach()


def adadiff(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """The released code: the batch's mean certainty, normalised over exits to sum to one, and not stopped."""
    certainty = (1 - u).mean(1, keepdim=True)
    return (certainty / certainty.sum(0)).expand_as(u)


def berxit(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """Plain average over exits (BERxiT as adapted in the DeeDiff rebuttal)."""
    return torch.full_like(u, 1 / len(k))


def calm(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """CALM's decay: deeper exits weigh more, w_k = k / sum k."""
    return (k / k.sum())[:, None].expand_as(u)


def unweighted(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """Plain sum over exits."""
    return torch.ones_like(u)


def measured(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """The replication: 1 - the target of u_k itself, in place of its estimate; stopped where the target is."""
    return 1 - gap


# (u (E, B) mean uncertainty, k (E,) layers, gap (E, B) what u is fitted to) -> w (E, B)
LAYER_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ual": ual,
    "adadiff": adadiff,
    "berxit": berxit,
    "calm": calm,
    "unweighted": unweighted,
    "measured": measured,
}
TARGETS = ("error", "excess")


class Objective:
    """The loss of one batch, per image.

    `target` is what the estimator is fitted to: "error" is tanh|eps_k - eps| (paper); "excess" is tanh|eps_k - eps_K|,
    what leaving at k costs against full depth, without the error that no depth can remove. It is stopped, so that
    fitting u moves the estimator only; with `stop_target=False` it moves the network too, as in the replication.
    `lambda_u = 0` and `lambda_layers = 0` give plain diffusion training.
    """

    def __init__(
        self,
        *,
        weights: str = "ual",
        target: str = "error",
        stop_target: bool = True,
        lambda_u: float = 1.0,
        lambda_layers: float = 1.0,
        lambda_extra: float = 0.0,
    ):
        for name, value, allowed in (("weights", weights, LAYER_WEIGHTS), ("target", target, TARGETS)):
            if value not in allowed:
                raise ValueError(f"loss.{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for name, value in (("lambda_u", lambda_u), ("lambda_layers", lambda_layers), ("lambda_extra", lambda_extra)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"loss.{name} is {value}; it must be a finite number >= 0")
        self.weights, self.target, self.stop_target = LAYER_WEIGHTS[weights], target, stop_target
        self.lambda_u, self.lambda_layers, self.lambda_extra = lambda_u, lambda_layers, lambda_extra

    def __call__(
        self, exits: AllExits, process: Process, pred: str, x0: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x0, noise (B, C, H, W), t (B,) -> loss (B,) and its named parts, each (B,), detached, for the log.

        With t on the CPU, nothing here waits for the device.
        """
        at = process.at(t, x0)
        x, wanted = at.noised(x0, noise), at.target(pred, x0, noise)
        err = (exits.out - wanted).square().flatten(2).mean(2)  # (E, B)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_target):
            eps = at.eps(pred, exits.out, x)  # (E, B, C, H, W)
            gap = (eps - (noise if self.target == "error" else eps[-1])).abs().tanh()
            if exits.u.dim() == 2:
                gap = gap.flatten(2).mean(2)  # a scalar estimator is fitted to the image's mean
        fit = (exits.u - gap).square()
        fit = fit.flatten(2).mean(2) if fit.dim() > 2 else fit  # (E, B)
        k = torch.tensor(exits.points, dtype=err.dtype).to(err.device, non_blocking=True)
        mean_gap = gap.flatten(2).mean(2) if gap.dim() > 2 else gap  # (E, B)
        layers = (self.weights(exits.mean_u, k, mean_gap) * err).sum(0)
        simple = err[-1]
        loss = simple + self.lambda_u * fit.mean(0) + self.lambda_layers * layers + self.lambda_extra * err.mean(0)
        asked = fit[:-1] if len(fit) > 1 else fit  # nobody asks at the last exit
        parts = {"simple": simple, "uem": asked.mean(0), "layers": layers}
        parts |= {f"err_{point}": e for point, e in zip(exits.points, err, strict=True)}
        parts |= {f"u_{point}": u for point, u in zip(exits.points, exits.mean_u, strict=True)}
        return loss, {name: part.detach() for name, part in parts.items()}


def depth_at(exits: AllExits, certainty: float) -> Tensor:
    """(B,): the layers that a row uses when it leaves at the first exit whose certainty 1 - u exceeds `certainty`."""
    leaves = exits.mean_u.detach() < 1 - certainty  # (E, B)
    leaves[-1] = True
    points = torch.tensor(exits.points).to(leaves.device, non_blocking=True)
    return points[leaves.int().argmax(0)].float()
