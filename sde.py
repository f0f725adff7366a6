"""Diffusion processes: how signal fades into noise, and how noise, x0, v and velocity predictions become one another.

x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], noise at 1. The stochastic differential equation with these marginals is
dx = -beta(t) x / 2 dt + sqrt(g2(t)) dw, beta = -2 d log(alpha) / dt and g2 = d sigma^2 / dt + beta sigma^2 (Kingma et
al. 2021, section 3). All processes but `Flow` preserve the variance, alpha^2 + sigma^2 = 1, and have g2 = beta (Song et
al. 2021, eq. 11). Solvers step in lam = log(alpha / sigma), half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("noise", "x0", "v", "velocity")
SIGMA_FLOOR = 1e-4  # smallest sigma that an x0 prediction is divided by


class Process:
    """A schedule. Subclasses give log alpha, its slope and its inverse, all in float64; the rest follows.

    The functions of time map a floating tensor of any shape elementwise and keep its dtype and device. They compute in
    float64, because 1 - alpha^2 loses all its digits in float32 near t = 0.

    >>> process, t = PROCESSES["sd"](), torch.tensor([0.001, 0.5, 1.0])  # by the name that config.process gives it
    >>> process.alpha(t), process.sigma(t)
    (tensor([0.9996, 0.5269, 0.0683]), tensor([0.0292, 0.8499, 0.9977]))
    >>> x0, eps = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    >>> x = process.noised(x0, t, eps)
    >>> v = process.target("v", x0, eps, t)  # what a network of this kind should say; its noise is eps again
    >>> torch.allclose(process.eps("v", v, x, t), eps, atol=1e-6)
    True
    """

    t_min: float  # the smallest time at which a sampler may call the network, and where samplers stop by default
    time_scale: float  # network time at t = 1
    predictions: tuple[str, ...] = ("noise", "x0", "v")  # what a network of this process may regress

    def _log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def _lam(self, t: Tensor) -> Tensor:
        return self._log_alpha(t) - self._sigma(t).log()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_log_alpha(-torch.logaddexp(-2 * lam, torch.zeros_like(lam)) / 2)

    def log_alpha(self, t: Tensor) -> Tensor:
        return in_double(self._log_alpha, t)

    def alpha(self, t: Tensor) -> Tensor:
        return in_double(lambda t: self._log_alpha(t).exp(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return in_double(self._sigma, t)

    def beta(self, t: Tensor) -> Tensor:
        """-2 d log(alpha) / dt, per unit of t."""
        return in_double(self._beta, t)

    def g2(self, t: Tensor) -> Tensor:
        """g(t)^2, the variance that a unit of t adds."""
        return in_double(self._g2, t)

    def lam(self, t: Tensor) -> Tensor:
        """log(alpha / sigma); decreases in t, infinite at t = 0."""
        return in_double(self._lam, t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of `lam`; where the variance is preserved, log(alpha) = -log(1 + exp(-2 lam)) / 2."""
        return in_double(self._t_of_lam, lam)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network reads for t: 999 t (continuous), or the level N t in 1..N (discrete; DDPM counts from 0)."""
        return in_double(lambda t: self.time_scale * t, t)

    def of_network_time(self, time: Tensor) -> Tensor:
        """The inverse of `network_time`, in float64."""
        return time.double() / self.time_scale

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers u (B,) in [0, 1) -> training times t (B,)."""
        return u

    def at(self, t: Tensor, like: Tensor) -> Marginal:
        """The distribution of x_t at the times t (B,), in the dtype and on the device of `like` (B, C, H, W).

        Its two numbers per time are computed where t is: for a t on the CPU nothing waits for the device.
        """
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = (f(floating(t).double()) for f in (self.alpha, self.sigma))
        return Marginal(self, *(x.to(like, non_blocking=True).view(shape) for x in (alpha, sigma)))

    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """`Marginal.noised` at t (B,)."""
        return self.at(t, x0).noised(x0, eps)

    def target(self, pred: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`Marginal.target` at t (B,)."""
        return self.at(t, x0).target(pred, x0, eps)

    def eps(self, pred: str, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """`Marginal.eps` at t (B,)."""
        return self.at(t, x).eps(pred, out, x)

    def x0(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """`Marginal.x0` at t (B,)."""
        return self.at(t, x).x0(eps, x)

    def check_prediction(self, pred: str) -> None:
        if pred not in PREDICTIONS:
            raise ValueError(f"pred is {pred!r}; it must be one of {', '.join(PREDICTIONS)}")
        if pred not in self.predictions:
            raise ValueError(f"pred is {pred!r}; this process knows {', '.join(self.predictions)}")


@dataclass(frozen=True)
class Marginal:
    """x_t = alpha x0 + sigma eps at one time per row; made once per batch, by `Process.at`."""

    process: Process
    alpha: Tensor  # (B, 1, 1, 1), or (1, 1, 1, 1) where all rows share their time
    sigma: Tensor

    def noised(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x_t for x0, eps (B, C, H, W)."""
        return self.alpha * x0 + self.sigma * eps

    def target(self, pred: str, x0: Tensor, eps: Tensor) -> Tensor:
        """What a network of kind `pred` regresses, (B, C, H, W).

        v = alpha eps - sigma x0 (Salimans & Ho 2022); velocity = eps - x0, along which `Flow` moves towards the noise.
        """
        self.process.check_prediction(pred)
        if pred == "noise":
            return eps
        if pred == "x0":
            return x0
        if pred == "velocity":
            return eps - x0
        return self.alpha * eps - self.sigma * x0

    def eps(self, pred: str, out: Tensor, x: Tensor) -> Tensor:
        """The noise that the network's output `out` stands for, (B, C, H, W).

        noise: out. v: sigma x + alpha out, velocity: x + alpha out, both safe at every t. x0: (x - alpha out) / sigma;
        as sigma -> 0, x holds nothing about the noise, so sigma is kept above 1e-4 (t = 1e-7 in VPLinear): the result
        stays finite and fades to 0.
        """
        self.process.check_prediction(pred)
        if pred == "noise":
            return out
        if pred == "v":
            return self.sigma * x + self.alpha * out
        if pred == "velocity":
            return x + self.alpha * out
        return (x - self.alpha * out) / self.sigma.clamp_min(SIGMA_FLOOR)

    def x0(self, eps: Tensor, x: Tensor) -> Tensor:
        """The image that a noise prediction stands for, (x - sigma eps) / alpha, (B, C, H, W).

        Finite at every t, because alpha never reaches 0; at t = 1 it multiplies errors of eps by sigma / alpha: 152 in
        VPLinear, 323 in VPCosine, 15 in the Stable Diffusion schedule, 999 in Flow.
        """
        return (x - self.sigma * eps) / self.alpha


class VPLinear(Process):
    """beta(t) = beta_min + t (beta_max - beta_min) in continuous time (Song et al. 2021, eq. 32).

    >>> process = VPLinear()
    >>> t = process.t_of_lam(torch.tensor([5.0, 0.0, -5.0], dtype=torch.float64))
    >>> t  # where log(alpha / sigma) has these values
    tensor([4.3515e-04, 2.5896e-01, 9.9750e-01], dtype=torch.float64)
    >>> process.network_time(t).round()
    tensor([  0., 259., 997.], dtype=torch.float64)
    """

    t_min, time_scale = 1e-4, 999.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min, beta_max are {beta_min}, {beta_max}; they must be positive and increase")
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def _log_alpha(self, t):
        return -self.beta_min * t / 2 - self.slope * t**2 / 4

    def _beta(self, t):
        return self.beta_min + self.slope * t

    def _t_of_log_alpha(self, log_alpha):
        area = -2 * log_alpha  # integral of beta over [0, t]
        # the root of the quadratic without cancellation at t -> 0 (as in DPM-Solver's public code)
        return 2 * area / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.slope * area))


class VPCosine(Process):
    """alpha = cos(angle(t)) / cos(angle(0)), angle(t) = pi/2 (t + s) / (1 + s) (Nichol & Dhariwal 2021, eq. 17).

    Pure cosine reaches alpha = 0 and beta = infinity at t = 1, where no solver could start. So beta is held constant
    from t = 0.9946 on, the time at which DPM-Solver's public code starts on this schedule; this plays the part of the
    cap beta_n <= 0.999 in the discrete form. Then alpha(1) = 0.0031, lam(1) = -5.78, and lam is invertible on (0, 1].

    >>> process = VPCosine()
    >>> process.lam(torch.tensor([1e-4, 0.5, 1.0]))
    tensor([ 6.2260, -0.0123, -5.7776])
    """

    t_min, time_scale = 1e-4, 999.0
    t_cap = 0.9946

    def __init__(self, s: float = 0.008):
        if not s > 0:
            raise ValueError(f"s is {s}; the offset of the cosine schedule must be positive")
        self.s = s
        self.cos_0, self.sin_0 = math.cos(self._angle(0.0)), math.sin(self._angle(0.0))
        self.log_alpha_cap = math.log(math.cos(self._angle(self.t_cap)) / self.cos_0)
        self.beta_cap = math.pi / (1 + s) * math.tan(self._angle(self.t_cap))

    def _angle(self, t):
        return math.pi / 2 * (t + self.s) / (1 + self.s)

    def _log_alpha(self, t):
        cosine = torch.log(torch.cos(self._angle(t.clamp_max(self.t_cap))) / self.cos_0)
        return cosine - self.beta_cap * (t - self.t_cap).clamp_min(0) / 2

    def _beta(self, t):
        return math.pi / (1 + self.s) * torch.tan(self._angle(t.clamp_max(self.t_cap)))

    def _t_of_log_alpha(self, log_alpha):
        inner = log_alpha.clamp_min(self.log_alpha_cap)
        sin = torch.sqrt(self.sin_0**2 - self.cos_0**2 * torch.expm1(2 * inner))
        angle = torch.atan2(sin, self.cos_0 * inner.exp())  # well conditioned at both ends, unlike acos
        return angle * (1 + self.s) * 2 / math.pi - self.s + 2 * (inner - log_alpha) / self.beta_cap


class DiscreteVP(Process):
    """N noise levels at t = n / N, n = 1..N, with alpha_n^2 = prod_{m <= n} (1 - beta_m) (Ho et al. 2020, eq. 4).

    Between levels log alpha is linear in t, as in DPM-Solver's discrete schedule; below the first level it runs to
    log alpha(0) = 0, where released code extrapolates to an alpha just above 1. No sampler calls the network there.
    `first` is what the network reads at level 1: 1 in latent diffusion and U-ViT, 0 in DDPM.

    >>> process = DiscreteVP.ddpm()
    >>> process.network_time(torch.tensor([0.001, 1.0]))  # DDPM counts its levels from 0
    tensor([  0., 999.])
    >>> DiscreteVP.stable_diffusion().network_time(torch.tensor([0.001, 1.0]))
    tensor([   1., 1000.])
    """

    def __init__(self, betas: Tensor, first: int = 1):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a list of at least two numbers strictly between 0 and 1")
        self.n, self.first = len(betas), first
        self.t_min, self.time_scale = 1 / self.n, float(self.n)
        log_alphas = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0) / 2])  # (N + 1,), knots n = 0..N
        self._tables = {betas.device: log_alphas}

    @classmethod
    def stable_diffusion(cls) -> DiscreteVP:
        """1000 betas, linear in their square roots from 0.00085 to 0.0120 (Rombach et al. 2022)."""
        return cls(torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2)

    @classmethod
    def ddpm(cls) -> DiscreteVP:
        """1000 betas, linear from 1e-4 to 0.02 (Ho et al. 2020)."""
        return cls(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), first=0)

    def network_time(self, t):
        return super().network_time(t) + (self.first - 1)

    def of_network_time(self, time):
        return super().of_network_time(time - (self.first - 1))

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # copied to a device once, not at every call
            self._tables[device] = next(iter(self._tables.values())).to(device, non_blocking=True)
        return self._tables[device]

    def _log_alpha(self, t):
        table = self._table(t.device)
        below = (t * self.n).floor().clamp(0, self.n - 1).long()
        return torch.lerp(table[below], table[below + 1], t * self.n - below)

    def _beta(self, t):
        table = self._table(t.device)
        level = (t * self.n - 1e-6).ceil().clamp(1, self.n).long()  # 1e-6: a level is its own, whatever the rounding
        return -2 * self.n * (table[level] - table[level - 1])

    def _t_of_log_alpha(self, log_alpha):
        table = self._table(log_alpha.device)
        level = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, self.n)
        upper, lower = table[level - 1], table[level]
        return (level - (log_alpha - lower) / (upper - lower)) / self.n

    def times(self, u):
        """n / N with n uniform on 1..N."""
        return ((u * self.n).floor() + 1).clamp_max(self.n) / self.n


class Flow(Process):
    """Flow matching on a straight path: alpha = 1 - s, sigma = s, s = 0.999 t (Lipman et al. 2023; SiT, section 2).

    At s = 1 there is no signal, and a noise prediction says nothing about the image: no solver that works with eps
    could start. So t = 1 stands for s = 0.999, where SiT's own code starts whenever it divides by alpha (its
    sample_eps is 1e-3), and samplers take noise for x there. The network reads 1000 s.

    >>> process, t = Flow(), torch.tensor([0.0, 0.5, 1.0])
    >>> process.alpha(t), process.sigma(t)
    (tensor([1.0000, 0.5005, 0.0010]), tensor([0.0000, 0.4995, 0.9990]))
    """

    t_min, time_scale = 1e-3, 999.0
    end = 0.999  # s at t = 1
    predictions = ("noise", "x0", "velocity")

    def _log_alpha(self, t):
        return torch.log1p(-self.end * t)

    def _sigma(self, t):
        return self.end * t

    def _beta(self, t):
        return 2 * self.end / (1 - self.end * t)

    def _g2(self, t):
        return self._beta(t) * self._sigma(t)

    def _t_of_lam(self, lam):
        return torch.sigmoid(-lam) / self.end


PROCESSES = {
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "sd": DiscreteVP.stable_diffusion,
    "ddpm": DiscreteVP.ddpm,
    "flow": Flow,
}


def floating(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        raise ValueError(f"the time has dtype {t.dtype}; it must be a floating tensor in [0, 1], not a step number")
    return t


def in_double(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """function(t), computed in float64 and returned in the dtype of t."""
    return function(floating(t).double()).to(t.dtype)
