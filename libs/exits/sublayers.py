"""Rivals that skip single attentions and MLPs and take what these gave last: by a fixed table, or by a gate per image.

Both are fitted by scripts.fit_rivals to a frozen network (libs/analysis/rivals.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from libs.exits.calls import Calls
from libs.exits.execute import run_with_sublayers
from libs.exits.policy import ExitPolicy
from libs.exits.static import Full
from libs.files import read_json


class SublayerCalls(Calls):
    """Calls that remember what every sublayer gave last, a row at a time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.last: dict[tuple[int, int], Tensor] = {}  # (layer, sublayer) -> (B, L, D)

    def call(self, policy, x, t, time, cond):
        if self.number == 0:
            self.gates = policy.gates(x.device)
        skips = policy.skips(self.gates, self.number, t, self.n_calls) if self.number else None
        out, ran = run_with_sublayers(self.model, skips, self.last, x, time, cond)  # ran (B, K, 2)
        costs = self.macs.at(self.model.depth) - (~ran).sum(1) @ np.array(self.macs.sublayers, dtype=np.float64)
        if skips is not None:
            costs += policy.gate_macs(self.model)
        used = ran.any(2).sum(1)  # a layer counts where any part of it ran
        return self.to_eps(out, x, t), used, costs


@dataclass(frozen=True, kw_only=True)
class Sublayers(Full):
    """Base of the two. `path`: a file of scripts.fit_rivals for this network."""

    path: str = ""
    parts: ClassVar[tuple[str, ...]]
    kind: ClassVar = SublayerCalls
    paired = ExitPolicy.paired

    @cached_property
    def stored(self) -> dict[str, np.ndarray]:
        if not self.path:
            raise ValueError(f"exit.{self.name}.path is not set; it must name a file of scripts.fit_rivals")
        found = read_json(self.path, f"exit.{self.name}.path")
        try:
            if found["kind"] != self.name:
                raise ValueError(f"it holds a {found['kind']}")
            arrays = {part: np.asarray(found[part], dtype=np.float64) for part in self.parts}
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError("a number in it is not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"exit.{self.name}.path is {self.path}, which is no such file of scripts.fit_rivals ({error})"
            ) from None
        return arrays

    def check(self, model):
        if not model.backbone.sublayers:
            raise ValueError(f"exit.name is {self.name!r}, which needs the sublayers of a U-ViT; this is no U-ViT")
        if model.compiled:
            raise ValueError(f"compile is on and exit.name is {self.name!r}: whole blocks are compiled, not sublayers")
        for part, wanted in self.shapes(model).items():
            if self.stored[part].shape != wanted:
                raise ValueError(f"{self.path} is for another network: its {part} have shape {self.stored[part].shape}")

    def gates(self, device: torch.device) -> tuple:
        """What decides, made once per sampling; what looks at the images lies on their device."""
        return tuple(self.stored[part] for part in self.parts)

    def gate_macs(self, model) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class LearnedCache(Sublayers):
    """Learning-to-Cache (Ma et al., NeurIPS 2024): a fixed table says what runs in every second call.

    The first call of each pair runs full depth; in the second one, the sublayers that the table turns off give what
    they gave in the first. The table belongs to the calls that it was fitted for, their number and their times.
    """

    name: ClassVar = "learned_cache"
    parts: ClassVar = ("t", "run")

    def shapes(self, model):
        return {"run": (self.stored["t"].size, model.depth, 2)}

    def skips(self, gates, number, t, n_calls):
        times, run = gates
        if n_calls not in (None, len(times)) or abs(float(t[0]) - times[number]) > 1e-6:
            raise ValueError(
                f"{self.path} was fitted for {len(times)} calls at {', '.join(f'{time:.4g}' for time in times)}; "
                f"call {number + 1} of {n_calls} is at {float(t[0]):.4g}: fit it for these calls"
            )
        return lambda i, j, h: not run[number, i, j]


@dataclass(frozen=True, kw_only=True)
class LazyGate(Sublayers):
    """LazyDiT (Shen et al., AAAI 2025): a linear gate on a sublayer's input decides for every image whether it runs.

    An image whose gate is positive takes what the sublayer last gave for it. The first call runs full depth.
    """

    name: ClassVar = "lazy_gate"
    parts: ClassVar = ("weight", "bias")

    def shapes(self, model):
        return {"weight": (model.depth, 2, model.backbone.embed_dim), "bias": (model.depth, 2)}

    def gates(self, device):
        parts = (torch.from_numpy(part).float() for part in super().gates(device))
        return tuple(part.to(device, non_blocking=True) for part in parts)

    def skips(self, gates, number, t, n_calls):
        weight, bias = gates
        return lambda i, j, h: gate(h, weight[i, j], bias[i, j]) > 0

    def gate_macs(self, model):
        return 2 * model.depth * model.backbone.embed_dim


def gate(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(b,): the linear map of the mean of the normalised tokens h (b, L, D); positive where the sublayer may rest.

    In float32 under autocast too, which would round a product of matrices.
    """
    with torch.autocast(h.device.type, enabled=False):
        return (F.layer_norm(h.float(), h.shape[-1:]).mean(1) @ weight[:, None])[:, 0] + bias
