"""Methods that look back at earlier network calls of the same sampling: what they are set to (the work: calls.py).

`Refresh` and `Residual` wrap a policy that leaves early; `Reuse` and `Cache` are the training-free competitors, which
never ask anything. All of them are policies, so whatever takes a policy takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from libs.exits.fixed import Fixed, Full
from libs.exits.policy import ExitPolicy


@dataclass(frozen=True, kw_only=True)
class Around(ExitPolicy):
    """Base of the policies that decide as `inner` does."""

    inner: ExitPolicy

    def __post_init__(self):
        if self.at or isinstance(self.inner, Full | Around):
            raise ValueError(
                f"sample.residual and sample.refresh go around a policy that leaves early, in this order, each once; "
                f"{type(self).__name__} was put around {type(self.inner).__name__}"
            )

    @property
    def reads(self) -> frozenset[str]:
        return self.inner.reads

    @property
    def per_image(self) -> bool:
        return self.inner.per_image

    def asked(self, points):
        return self.inner.asked(points)

    def bind(self, seed, ids):
        return replace(self, inner=self.inner.bind(seed, ids))

    def start(self, n_rows, depth, t):
        return self.inner.start(n_rows, depth, t)

    def at_call(self, number):
        return self.inner.at_call(number)

    def paired(self, pair):
        return replace(self, inner=self.inner.paired(pair))


@dataclass(frozen=True, kw_only=True)
class Refresh(Around):
    """Every `every`-th network call of a sampling, the first included, runs full depth; `inner` decides the others.

    Which calls these are is known on the host: they ask nothing and wait for nothing.
    """

    every: int

    def __post_init__(self):
        super().__post_init__()
        at_least_one("sample.refresh", self.every)

    def at_call(self, number):
        return self.inner if number % self.every else Full()


@dataclass(frozen=True, kw_only=True)
class Residual(Around):
    """An image that leaves at k gets eps_k + (eps_K - eps_k of its last full-depth call), per guidance branch.

    Plain reuse, however long ago that call was. An image without a full-depth call so far is not corrected. Measuring
    costs one more head per exit that `inner` may take, at full-depth calls only.
    """

    def __post_init__(self):
        if not isinstance(self.inner, Refresh):
            super().__post_init__()

    def asked(self, points):
        if isinstance(self.inner, Fixed):
            raise ValueError(
                "sample.residual is on, but a fixed layer never runs full depth, so there is nothing to correct with; "
                "set sample.refresh"
            )
        return self.inner.asked(points)


@dataclass(frozen=True, kw_only=True)
class Reuse(Full):
    """Full depth at every `every`-th network call; the calls between answer with the last eps and run nothing."""

    every: int = 2

    def __post_init__(self):
        at_least_one("exit.reuse.every", self.every)
        nothing_asked("reuse", self.at)

    def paired(self, pair):
        return self


@dataclass(frozen=True, kw_only=True)
class Cache(Full):
    """Full depth at every `every`-th network call; the calls between take its deep features from there.

    They run the first `layers` layers and the last `layers`, which read the long skips of the first and, in place of
    the layers in between, the tokens that these gave last (the idea of DeepCache, Ma et al., CVPR 2024, on a U-ViT).
    """

    every: int = 2
    layers: int = 1

    def __post_init__(self):
        at_least_one("exit.cache.every", self.every)
        nothing_asked("cache", self.at)

    def asked(self, points):
        if not 1 <= self.layers <= points[-1] // 2:
            raise ValueError(
                f"exit.cache.layers is {self.layers}; each half of this network has {points[-1] // 2} layers"
            )
        return ()

    def paired(self, pair):
        return self


def at_least_one(setting: str, value: int) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{setting} is {value!r}; it must be a whole number of network calls, at least 1")


def nothing_asked(name: str, at: tuple[int, ...]) -> None:
    if at:
        raise ValueError(f"exit.{name}.at is {at}; this method asks at no exit")


def looking_back(policy: ExitPolicy, *, residual: bool = False, refresh: int = 0) -> ExitPolicy:
    """`policy` with a full-depth call every `refresh` calls (0: no forced ones) and with the residual correction."""
    if refresh:
        policy = Refresh(inner=policy, every=refresh)
    return Residual(inner=policy) if residual else policy
