"""The layer-wise training objective: simple loss, uncertainty fit, and weighted losses of all exits.

    L = L_simple + lambda_u L_u + lambda_layers sum_k w_k err_k + lambda_extra mean_k err_k        (paper Eq. 13)

err_k is the mean squared error of exit k in what the network regresses (config `pred`); L_u fits the estimate u_k to
tanh|eps_k - eps| per pixel (Eq. 10, 11). The uncertainty is about eps, whatever the network predicts. Where a batch
stops before full depth (`Depths`), its deepest exit has the simple loss, and the sums are over the exits that it ran.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from libs import rng
from libs.build import build, lookup
from libs.exits import EXIT_POLICIES
from libs.exits.static import STATIC, layers_at
from libs.models import AllExits, EarlyExitModel
from sde import Process


def ual(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """Paper Eq. 12: w_k = 1 - u_k, per image, stopped, summed over exits."""
    return 1 - u.detach()


def adadiff(u: Tensor, k: Tensor, gap: Tensor) -> Tensor:
    """The released code: the mean certainty of the rows at once, normalised over exits to sum to one, and not stopped.

    At once are those of one process and micro-batch: train.accumulate and the number of processes change it.
    """
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
LAYER_WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
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
    what leaving at k costs against full depth, without the error that no depth can remove; a batch without full depth
    does not fit it. The target is stopped, so that fitting u moves the estimator only; with `stop_target=False` it
    moves the network too, as in the replication. `lambda_u = 0` and `lambda_layers = 0` give plain diffusion training.
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
        for name, value in (("lambda_u", lambda_u), ("lambda_layers", lambda_layers), ("lambda_extra", lambda_extra)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"loss.{name} is {value}; it must be a finite number >= 0")
        self.weights, self.stop_target = lookup(LAYER_WEIGHTS, weights, "loss.weights"), stop_target
        self.target = lookup(TARGETS, target, "loss.target")
        self.lambda_u, self.lambda_layers, self.lambda_extra = lambda_u, lambda_layers, lambda_extra

    @property
    def plain(self) -> bool:
        """Whether the deepest exit's error is all there is."""
        return not (self.lambda_u or self.lambda_layers or self.lambda_extra)

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
        own = exits.learned
        layers = (self.weights(exits.mean_u[own], k[own], mean_gap[own]) * err[own]).sum(0)
        simple = err[-1]
        fitted = exits.full or self.target == "error"
        lambda_u = self.lambda_u if fitted else 0.0  # not left out: DDP waits for the estimators that ran
        loss = simple + lambda_u * fit.mean(0) + self.lambda_layers * layers + self.lambda_extra * err[own].mean(0)
        parts = {"simple": simple, "layers": layers}
        if fitted:
            parts["uem"] = (fit[:-1] if exits.full and len(fit) > 1 else fit).mean(0)  # nobody asks at full depth
        parts |= {f"err_{point}": e for point, e in zip(exits.points, err, strict=True)}
        parts |= {f"u_{point}": u for point, u in zip(exits.points, exits.mean_u, strict=True)}
        return loss, {name: part.detach() for name, part in parts.items()}


def depth_at(exits: AllExits, certainty: float) -> Tensor:
    """(B,): the layers that a row uses when it leaves at the first exit whose certainty 1 - u exceeds `certainty`."""
    leaves = exits.mean_u[exits.learned].detach() < 1 - certainty  # (E, B)
    leaves[-1] = True
    points = torch.tensor(exits.points[exits.learned]).to(leaves.device, non_blocking=True)
    return points[leaves.int().argmax(0)].float()


# ---- which exits a batch trains ------------------------------------------------------------------------------------

TRAINED_DEPTHS = ("all", "random", "schedule")
CELLS = 1_000  # equal parts of [0, 1) in which the times of one depth are told apart: DDPM's levels


class Depths:
    """The setting `train.depths`: which exits a batch trains. Layers beyond the deepest of them do not run.

    "all": every exit. "random": those up to a depth that is drawn for each batch, uniformly from the model's exits.
    "schedule": those up to the depth that the policy config.exit gives to a time; a batch holds times of one depth, and
    a depth is drawn as often as it has times, so that times stay uniform. The two are the schemes of Giladi, Meir,
    Kawar and Elad; ASE (Moon et al., ICML 2024) fine-tunes under its schedule too. Where the loss has no term for
    earlier exits, the deepest is the only one.
    """

    def __init__(self, config, model: EarlyExitModel, process: Process, objective: Objective):
        self.kind = lookup(TRAINED_DEPTHS, config.train.depths, "train.depths")
        self.points, self.seed, self.alone = model.points, config.seed, objective.plain
        self.learn = self.points if model.gaussian is None else self.points[1:]  # nothing is learned at a Gaussian
        if self.kind != "all" and config.train.freeze_backbone:
            raise ValueError(
                f"train.depths is {self.kind!r} and train.freeze_backbone is on: the layers that would not run are not "
                "trained either way; leave one of them out"
            )
        self.layers = None  # of the cells, (CELLS,)
        if self.kind == "schedule":
            if config.exit.name not in STATIC:
                raise ValueError(
                    f"train.depths is 'schedule' and exit.name is {config.exit.name!r}; the depth of a time is told by "
                    f"{', '.join(STATIC)}"
                )
            policy = build(EXIT_POLICIES, config.exit, setting="exit")
            policy.check(model)
            middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
            self.layers = layers_at(policy, model.points, process.times(middles)).clamp_min(self.learn[0])

    def draw(self, step: int, uniform: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """The exits of training step `step`, and the numbers in [0, 1), (b,), that its times are made of.

        Every process draws the same exits: they depend on the seed and the step only. `uniform` (b,) float64.
        """
        if self.kind == "all":
            return self.points, uniform
        generator = rng.stream("depth", self.seed, step)
        if self.layers is None:
            deepest = self.learn[int(torch.randint(len(self.learn), (), generator=generator))]
        else:
            deepest = int(self.layers[torch.randint(CELLS, (), generator=generator)])
            cells = (self.layers == deepest).nonzero().flatten()
            place = uniform * len(cells)
            uniform = (cells[place.long()] + place % 1) / CELLS
        return (deepest,) if self.alone else tuple(k for k in self.points if k <= deepest), uniform

    @property
    def fingerprint(self) -> str | None:
        """Identifies the depths of a schedule, which a resumed run may not change; None where there is none."""
        return None if self.layers is None else hashlib.sha256(self.layers.numpy().tobytes()).hexdigest()[:16]
