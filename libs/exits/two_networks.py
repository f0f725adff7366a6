"""Two networks in turn: a shallow one where the images are still noise, the deep one for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from libs import checkpoints
from libs.exits.caching import at_least_one
from libs.exits.calls import Calls
from libs.exits.execute import run_with_exits
from libs.exits.static import Full
from libs.models import EarlyExitModel, build_model
from sde import PROCESSES, Process

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class DuoCalls(Calls):
    """The shallow network lies where the deep one does, and is compiled where that is."""

    def __init__(self, *args):
        super().__init__(*args)
        shallow = self.policy.shallow.to(next(self.model.parameters()).device)
        if self.model.compiled and not shallow.compiled:
            shallow.compile_blocks(self.model.compiled)
        self.shallow, self.cost = shallow, float(shallow.macs().at(shallow.depth))

    def call(self, policy, x, t, time, cond):
        if self.number >= policy.first:
            return super().call(policy, x, t, time, cond)
        out, used = run_with_exits(self.shallow, policy, x, t, time, cond)
        return self.to_eps(out, x, t), used, np.full(len(x), self.cost)


@dataclass(frozen=True, kw_only=True)
class Duo(Full):
    """DuoDiff (2024): the `first` calls run another, shallower network at its full depth, the others this one at its.

    `path`: the checkpoint of the shallow network, which knows its experiment. It must have been trained on the same
    images, with the same process and prediction.
    """

    path: str = ""
    first: int = 4
    name: ClassVar = "duo"
    kind: ClassVar = DuoCalls

    def __post_init__(self):
        super().__post_init__()
        at_least_one("exit.duo.first", self.first)

    @cached_property
    def config(self) -> ConfigDict:
        """The experiment of the shallow network."""
        if not self.path:
            raise ValueError("exit.duo.path is not set; it must name a checkpoint of the shallow network")
        known = checkpoints.about(self.path).get("config")
        if not known:
            raise ValueError(f"exit.duo.path is {self.path}, which does not say which experiment it is from")
        from ml_collections import ConfigDict

        return ConfigDict(known)

    @cached_property
    def shallow(self) -> EarlyExitModel:
        model = build_model(self.config)
        checkpoints.load_weights(model, self.path, full_depth=True)
        return model.eval().requires_grad_(False)

    def check(self, model):
        deep, shallow = model.backbone, self.shallow.backbone
        for name in ("img_size", "channels", "num_classes", "context_shape"):
            mine, other = getattr(deep, name, None), getattr(shallow, name, None)
            if mine != other:
                raise ValueError(f"exit.duo.path is {self.path}, a network with {name} {other}; this one has {mine}")
        if shallow.depth > deep.depth:
            raise ValueError(f"exit.duo.path is {self.path}: its {shallow.depth} layers are more than {deep.depth}")

    def check_same(self, process: Process, pred: str) -> None:
        """Refuse a shallow network of another process or prediction than those that are sampled with."""
        theirs, t = PROCESSES[self.config.process](), torch.linspace(0.1, 1, 10, dtype=torch.float64)
        names = ("alpha", "sigma", "network_time")
        same = all(torch.equal(getattr(theirs, name)(t), getattr(process, name)(t)) for name in names)
        if self.config.pred != pred or not same:
            raise ValueError(
                f"exit.duo.path is {self.path}, trained with process {self.config.process} to predict "
                f"{self.config.pred}; the deep network predicts {pred}, and both need the same process"
            )
