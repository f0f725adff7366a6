"""The depth of every call of one plan of sampling: what a budget chose together with the calls' times."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from libs.exits.policy import ExitPolicy
from libs.exits.static import Fixed, Full, read_calibration, same_exits


@dataclass(frozen=True, kw_only=True)
class Split(ExitPolicy):
    """Leave after `layer` layers where the mean u is below `max_u`, and at the next exit otherwise."""

    layer: int
    max_u: float
    reads: ClassVar = frozenset({"u"})

    def asked(self, points):
        return tuple(k for k in points[:-1] if k >= self.layer)[:2]

    def questions(self, points):
        return self.asked(points)[:1]

    def start(self, n_rows, depth, t):
        return lambda look: True if look.k > self.layer else look.u < self.max_u


@dataclass(frozen=True, kw_only=True)
class Planned(ExitPolicy):
    """Call i of a plan leaves after layers[i] layers; where max_u[i] > 0, images with a mean u above it go on one exit.

    `path` is a file of scripts.calibrate --budget. It also holds the solver and the times of the calls, which sampling
    takes from there (libs/sampling/stored.py).
    """

    path: str = ""
    name: ClassVar = "planned"
    asks: ClassVar = False

    @cached_property
    def stored(self) -> dict:
        return read_calibration(self.path, "plan", "exit.planned.path")

    def check(self, model):
        super().check(model)
        same_exits(self.path, self.stored, model.points)
        if foreign := sorted(set(self.stored["layers"]) - set(model.points)):
            raise ValueError(f"{self.path} plans layers {foreign}; this model can be left at {model.points}")

    def call(self, number: int) -> ExitPolicy:
        layer, max_u = self.stored["layers"][number], self.stored["max_u"][number]
        if layer == self.stored["points"][-1]:
            return Full()
        return Split(layer=layer, max_u=max_u) if max_u else Fixed(layer=layer)

    def reaches(self, points: tuple[int, ...]) -> bool:
        """Whether any image runs full depth at any call."""
        last = points[-2:]  # from the last exit but one, a split sends images on
        calls = zip(self.stored["layers"], self.stored["max_u"], strict=True)
        return any(layer == last[-1] or layer == last[0] and max_u > 0 for layer, max_u in calls)

    def asked(self, points):
        asked = [self.call(number).asked(points) for number in range(len(self.stored["layers"]))]
        return tuple(sorted(set().union(*asked)))

    def at_call(self, number):
        if number >= len(self.stored["layers"]):
            raise ValueError(f"{self.path} plans {len(self.stored['layers'])} calls; this sampling makes more")
        return self.call(number)
