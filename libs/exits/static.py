"""Depths that are known before a call from its time alone: full, one layer for all, schedules.

Nothing is estimated, nothing waits for the device, and no row is removed as long as a batch shares its time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from libs.exits.policy import Decide, ExitPolicy, Look
from libs.files import read_json

STATIC = ("fixed", "schedule", "power", "levels")  # the policies here that say how deep a time goes, by exit.name
ASE_DEMO = (1.0, 1.0, 24 / 28, 24 / 28, 20 / 28, 20 / 28, 16 / 28, 16 / 28, 12 / 28, 12 / 28)
FILE_KEYS = {
    "schedule": ("t", "layers"),
    "thresholds": ("edges", "max_u"),
    "plan": ("layers", "max_u", "nodes", "computed", "order", "lower_order_final"),
}


@dataclass(frozen=True, kw_only=True)
class Full(ExitPolicy):
    """Never leave early."""

    name: ClassVar = "full"
    asks: ClassVar = False

    def asked(self, points):
        return ()

    def start(self, n_rows, depth, t):
        return lambda look: False

    def paired(self, pair):
        return self  # no row leaves on its own


@dataclass(frozen=True, kw_only=True)
class Fixed(ExitPolicy):
    """Every image, at every step, leaves after `layer` layers.

    >>> from libs.exits import Look
    >>> decide = Fixed(layer=3).start(n_rows=2, depth=7, t=torch.ones(2))
    >>> decide(Look(k=2, rows=torch.arange(2))), decide(Look(k=3, rows=torch.arange(2)))
    (False, True)
    """

    layer: int = 1
    name: ClassVar = "fixed"
    asks: ClassVar = False

    def check(self, model):
        if self.layer not in model.points:
            raise ValueError(f"exit.fixed.layer is {self.layer}; this model can be left at {model.points}")

    def asked(self, points):
        return (self.layer,) if self.layer != points[-1] else ()

    def start(self, n_rows, depth, t):
        return lambda look: look.k == self.layer


def leave_at(due: Tensor) -> Decide:
    """Row i leaves at the first exit at least due[i] (B,) layers deep; where all agree, one answer serves them all."""
    first = int(due[0])
    if bool((due == first).all()):
        return lambda look: look.k >= first

    def decide(look):
        return look.k >= due.to(look.rows.device, non_blocking=True)[look.rows]

    return decide


def layers_at(policy: ExitPolicy, points: tuple[int, ...], t: Tensor) -> Tensor:
    """(n,) int64: the layers that a call at each of the times t (n,) runs under one of the policies of STATIC."""
    used, rows = torch.full((len(t),), points[-1]), torch.arange(len(t))
    decide = policy.start(len(t), points[-1], t)
    for k in reversed(policy.asked(points)):
        stop = torch.as_tensor(decide(Look(k=k, rows=rows)))
        used = torch.where(stop, k, used)
    return used


def layers_of(share: float, depth: int) -> int:
    return math.ceil(share * depth - 1e-9)


@dataclass(frozen=True, kw_only=True)
class Schedule(ExitPolicy):
    """A static depth for every time: the share of layers to run in equal bins of t, from t = 0 (data) to 1 (noise).

    A time on the border of two bins belongs to the lower one: of 1,000 noise levels t = n / 1000, the ten bins of the
    default are the levels 1 to 100, 101 to 200 and so on, which DDPM counts 0 to 99, 100 to 199. The default is the
    only released schedule of ASE (Moon et al., ICML 2024: 28, 28, 24, 24, 20, 20, 16, 16, 12, 12 of 28 blocks). A layer
    count that is no exit of the model is rounded up to the next exit. `path` is a file of
    scripts.calibrate instead, with a layer count for every network call; a time between two calls takes the nearest.

    >>> from libs.exits import Look
    >>> t = torch.tensor([0.05, 0.95], dtype=torch.float64)  # near the data, near the noise
    >>> decide = Schedule().start(n_rows=2, depth=7, t=t)
    >>> decide(Look(k=3, rows=torch.arange(2)))  # 12 of 28 layers are 3 of 7
    tensor([False,  True])
    """

    shares: tuple[float, ...] = ASE_DEMO
    path: str = ""

    def __post_init__(self):
        if not self.shares or any(not isinstance(s, int | float) or not 0 < s <= 1 for s in self.shares):
            raise ValueError(f"exit.schedule.shares is {self.shares}; it must be a non-empty tuple of shares in (0, 1]")
        if self.path and tuple(self.shares) != ASE_DEMO:
            raise ValueError("exit.schedule.shares and exit.schedule.path are both set; a schedule has one source")

    @cached_property
    def stored(self) -> dict:
        return read_calibration(self.path, "schedule", "exit.schedule.path")

    def check(self, model):
        super().check(model)
        if self.path:
            same_exits(self.path, self.stored, model.points)

    def asked(self, points):
        asked = super().asked(points)
        taken = {next((k for k in asked if k >= layers), None) for layers in self.table(points[-1])[1]}
        return tuple(k for k in asked if k in taken)  # nobody leaves at the others

    def table(self, depth: int) -> tuple[Sequence[float], Sequence[int]]:
        """The times between bins, ascending, and the layers due in every bin."""
        if self.path:
            nodes, layers = zip(*sorted(zip(self.stored["t"], self.stored["layers"], strict=True)), strict=True)
            return between(nodes), layers
        n = len(self.shares)
        return [i / n for i in range(1, n)], [layers_of(share, depth) for share in self.shares]

    def start(self, n_rows, depth, t):
        edges, layers = self.table(depth)
        bins = torch.bucketize(t - 1e-9, t.new_tensor(edges))  # 1e-9: a border is one, whatever the rounding
        return leave_at(torch.tensor(layers)[bins])


@dataclass(frozen=True, kw_only=True)
class Power(ExitPolicy):
    """The share of layers falls from `at_data` (t = 0) to `at_noise` (t = 1) as t ** exponent; exponent 1 is linear.

    >>> from libs.exits import Look
    >>> t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    >>> decide = Power(at_noise=0.4).start(n_rows=2, depth=7, t=t)
    >>> [decide(Look(k=k, rows=torch.arange(2))).tolist() for k in (3, 4, 7)]
    [[False, False], [False, True], [True, True]]
    """

    at_data: float = 1.0
    at_noise: float = 0.4
    exponent: float = 1.0

    def __post_init__(self):
        for name in ("at_data", "at_noise"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"exit.power.{name} is {getattr(self, name)}; it is a share of layers in (0, 1]")
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"exit.power.exponent is {self.exponent}; it must be a positive number")

    def start(self, n_rows, depth, t):
        shares = self.at_data + (self.at_noise - self.at_data) * t**self.exponent
        return leave_at(torch.tensor([layers_of(share, depth) for share in shares.tolist()]))


@dataclass(frozen=True, kw_only=True)
class Levels(ExitPolicy):
    """The level skipping of Giladi, Meir, Kawar and Elad: k(t) = min(N - 1, floor(N - N (1 - t)^c)) of N levels are
    bypassed, the deepest ones, so that N - k run.

    t = 1 is noise, as in their text: nothing is bypassed near the data, all but one level near the noise, and a larger
    c bypasses more; 1, 2, 3 and 5 were published. In the formula as we have it, bars stand around the second argument
    of min. They are read as a floor: it is never negative, so as an absolute value they would do nothing, and k would
    be no whole number. c = 0 is the ordinary network in their tables, so 0^0 = 1 at t = 1. A number of layers that is
    no exit of the model is rounded up to the next exit. Of any other network, layers take the place of levels.
    """

    c: float = 2.0

    def __post_init__(self):
        if not 0 <= self.c < math.inf:
            raise ValueError(f"exit.levels.c is {self.c}; it must be a number of at least 0 (0 = full depth)")

    def start(self, n_rows, depth, t):
        bypassed = torch.floor(depth - depth * (1 - t) ** self.c + 1e-9).clamp_max(depth - 1)  # 1e-9: of rounding
        return leave_at(depth - bypassed.long())


# ---- files of scripts.calibrate ----


def read_calibration(path: str, part: str, setting: str) -> dict:
    """The `part` (a key of FILE_KEYS) of a calibration file, with the model's exits as "points".

    ValueError, naming `setting`, where there is no such file or it lacks what is needed.
    """
    if not path:
        raise ValueError(f"{setting} is not set; it must name a JSON file of scripts.calibrate")
    stored = read_json(path, setting)
    try:
        found = {"points": stored["points"], **{name: stored[part][name] for name in FILE_KEYS[part]}}
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{setting} is {path}, which is no file of scripts.calibrate ({str(error)[:100]!r})") from None
    if not fit_together(part, arrays):
        raise ValueError(f"{setting} is {path}, whose points and {part} do not fit together: the file is damaged")
    return found


def fit_together(part: str, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the arrays of a calibration file's `part` have the shapes and values that its policy reads."""
    points = arrays["points"]
    if not all(np.isfinite(array).all() for array in arrays.values()) or points.ndim != 1 or not len(points):
        return False
    if (points != points.astype(int)).any():
        return False
    if part == "plan":
        nodes, computed = arrays["nodes"], arrays["computed"]
        calls = (int(computed.sum()),)
        descending = nodes.shape == (len(np.atleast_1d(computed)) + 1,) and bool((np.diff(nodes) < 0).all())
        return descending and arrays["layers"].shape == calls and arrays["max_u"].shape[:1] == calls
    rows, columns = (arrays[name] for name in FILE_KEYS[part])
    width = (len(points) - 1,) if part == "thresholds" else ()
    shapes = rows.ndim == 1 and columns.shape == (len(rows) + (part == "thresholds"), *width)
    return shapes and (part == "schedule" or bool((np.diff(rows) > 0).all()))


def same_exits(path: str, stored: dict, points: tuple[int, ...]) -> None:
    """Refuse a calibration file of a model with other exits."""
    if tuple(stored["points"]) != tuple(points):
        raise ValueError(f"{path} is for exits {tuple(stored['points'])}; this model can be left at {tuple(points)}")


def between(nodes: Sequence[float]) -> list[float]:
    """The middles between ascending nodes: what lies between two of them belongs to the nearer one."""
    return [(a + b) / 2 for a, b in zip(nodes[:-1], nodes[1:], strict=True)]
