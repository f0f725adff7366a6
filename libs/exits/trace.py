"""How many layers every image used at every network call: the array that all statistics and costs derive from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from libs.files import atomic_write, read_npz


@dataclass
class Trace:
    """`depth` is K, `asked` the exits where the policy questioned the estimator.

    t (calls,) in [0, 1]; used (calls, branches, n) layers; branches is 1, or 2 under guidance (conditional, null).
    `costs` holds the calls in which something else was run than `used` and `asked` tell (libs/exits/calls.py): the MACs
    of every row (branches, n). `forecasts` are the steps among `calls` that called nothing.

    >>> trace = Trace(depth=7)
    >>> trace.add(1.0, np.array([[3, 5]]))  # the first call: image 0 used 3 layers, image 1 used 5
    >>> trace.add(0.5, np.array([[7, 7]]))
    >>> trace.t, trace.used[:, 0]
    (array([1. , 0.5]), array([[3, 5],
           [7, 7]], dtype=uint8))
    """

    depth: int
    asked: tuple[int, ...] = ()
    calls: list[tuple[float, np.ndarray]] = field(default_factory=list)
    costs: dict[int, np.ndarray] = field(default_factory=dict)
    forecasts: frozenset[int] = frozenset()

    def add(self, t: float, used: np.ndarray, costs: np.ndarray | None = None) -> None:
        """One call for all images: used (branches, n), and the MACs of all rows where they are special."""
        if costs is not None:
            self.costs[len(self.calls)] = costs.reshape(used.shape)
        self.calls.append((t, used.astype(np.uint8)))

    def with_forecasts(self, t: Sequence[float], computed: Sequence[bool]) -> Trace:
        """This trace, of the steps that were `computed`, among all steps t: a forecast runs no layers and costs 0."""
        steps, used = np.flatnonzero(computed), np.zeros((len(t), *self.used.shape[1:]), np.uint8)
        used[steps] = self.used
        forecasts = frozenset(step for step in range(len(t)) if not computed[step])
        costs = {step: np.zeros(used.shape[1:]) for step in forecasts}
        costs |= {int(steps[number]): special for number, special in self.costs.items()}
        return Trace(self.depth, self.asked, list(zip(t, used, strict=True)), costs, forecasts)

    @property
    def computed(self) -> np.ndarray:
        """(calls,) bool: network calls, not forecasts."""
        return np.array([call not in self.forecasts for call in range(len(self.calls))])

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
        costs = {call: np.concatenate([trace.costs[call] for trace in traces], axis=1) for call in first.costs}
        return replace(first, calls=list(zip(first.t.tolist(), used, strict=True)), costs=costs)

    def first(self, n: int) -> Trace:
        """The first `n` images."""
        calls = [(t, used[:, :n]) for t, used in self.calls]
        return replace(self, calls=calls, costs={call: costs[:, :n] for call, costs in self.costs.items()})

    def save(self, path: str | Path, ids: np.ndarray) -> None:
        costs = np.full(self.used.shape, np.nan)  # NaN: nothing special
        for call, special in self.costs.items():
            costs[call] = special
        arrays = dict(t=self.t, used=self.used, depth=self.depth, asked=np.array(self.asked, int), costs=costs, ids=ids)
        with atomic_write(path) as file:
            np.savez_compressed(file, **arrays, computed=self.computed)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        data = read_npz(path, "the trace", ("t", "used", "depth", "asked", "costs"), optional=("computed",))
        t, used, costs = data["t"], data["used"], data["costs"]
        kinds = [array.dtype.kind for array in (t, used, data["depth"], data["asked"], costs)]
        depth = int(data["depth"]) if data["depth"].size == 1 and data["depth"].dtype.kind in "iu" else 0
        whole = kinds[0] in "fiu" and kinds[1] in "iu" and kinds[3] in "iuf" and kinds[4] == "f"
        shapes = (
            used.ndim == 3
            and t.shape == used.shape[:1]
            and costs.shape in (used.shape, (len(t), depth + 1))
            and used.size
        )
        if not (whole and shapes and 0 <= used.min() <= used.max() <= depth and np.isfinite(t).all()):
            raise ValueError(f"the trace is {str(path)!r}, whose arrays do not fit together: the file is damaged")
        asked = tuple(int(k) for k in data["asked"].ravel())
        if costs.ndim == 2:  # as written before: by the layers used
            costs = np.take_along_axis(costs[:, None], used, axis=2)
        special = {call: rows for call, rows in enumerate(costs) if not np.isnan(rows).any()}
        computed = data.get("computed", np.ones(len(t), bool))  # traces of earlier versions do not say it
        forecasts = frozenset(np.flatnonzero(~computed.astype(bool)).tolist())
        return cls(depth, asked, list(zip(t.tolist(), used, strict=True)), special, forecasts)
