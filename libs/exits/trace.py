"""How many layers every image used at every network call: the array that all statistics and costs derive from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Trace:
    """`depth` is K, `asked` the exits where the policy questioned the estimator.

    t (calls,) in [0, 1]; used (calls, branches, n) layers; branches is 1, or 2 under guidance (conditional, null).
    """

    depth: int
    asked: tuple[int, ...] = ()
    calls: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def add(self, t: float, used: np.ndarray) -> None:
        """One call for all images: used (branches, n)."""
        self.calls.append((t, used.astype(np.uint8)))

    @property
    def t(self) -> np.ndarray:
        return np.array([t for t, _ in self.calls])

    @property
    def used(self) -> np.ndarray:
        return np.stack([used for _, used in self.calls])

    @staticmethod
    def concatenate(traces: Iterable[Trace]) -> Trace:
        """Traces of different images through the same plan, as one."""
        traces = list(traces)
        first = traces[0]
        used = np.concatenate([trace.used for trace in traces], axis=2)
        return Trace(first.depth, first.asked, list(zip(first.t.tolist(), used, strict=True)))

    def save(self, path: str | Path, ids: np.ndarray) -> None:
        part = f"{path}.part.npz"
        np.savez_compressed(part, t=self.t, used=self.used, depth=self.depth, asked=np.array(self.asked, int), ids=ids)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        with np.load(path) as data:
            asked = tuple(int(k) for k in data["asked"])
            return cls(int(data["depth"]), asked, list(zip(data["t"].tolist(), data["used"], strict=True)))
