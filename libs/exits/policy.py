"""What an exit policy sees and answers.

A policy is asked once per exit point, for the rows that are still running, and says which of them leave now. It never
touches the batch: `libs/exits/execute.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from libs.models import EarlyExitModel

if TYPE_CHECKING:
    from libs.exits.calls import Calls


@dataclass(frozen=True)
class Look:
    """All a policy may see when it is asked at exit k."""

    k: int
    rows: Tensor  # (b,) which rows of the call are asked, ascending: index per-row memory with it
    u: Tensor | None = None  # (b,) mean uncertainty, if the policy reads "u"
    patches: Tensor | None = None  # (b, N, D) patch tokens, if it reads "patches"


# A decision: True or False for all rows at once (no device work, no synchronisation), or a (b,) bool tensor.
Decision = bool | Tensor
Decide = Callable[[Look], Decision]


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """Base of the policies. `at` are the exits where the question is asked; () asks at every exit of the model.

    >>> import torch
    >>> from libs.exits import EXIT_POLICIES
    >>> policy = EXIT_POLICIES["threshold"](certainty=0.9, at=(2, 4))
    >>> policy.asked(points=(1, 2, 3, 4, 5))
    (2, 4)
    >>> decide = policy.start(n_rows=3, depth=5, t=torch.full((3,), 0.5))
    >>> decide(Look(k=2, rows=torch.arange(3), u=torch.tensor([0.05, 0.30, 0.20])))
    tensor([ True, False, False])
    >>> decide(Look(k=4, rows=torch.tensor([1, 2]), u=torch.tensor([0.25, 0.05])))  # row 0 has left
    tensor([False,  True])
    """

    at: tuple[int, ...] = ()
    name: ClassVar[str] = ""  # its exit.name, for errors
    asks: ClassVar[bool] = True  # False: `at` has no meaning
    reads: ClassVar[frozenset[str]] = frozenset()
    per_image: ClassVar[bool] = True  # False: the rows of a call decide together, so what is batched matters
    timeless: ClassVar[bool] = False  # True: one rule for what it reads, whatever the time
    kind: ClassVar[type[Calls] | None] = None  # how a sampling's calls are made, where they remember earlier ones

    def __post_init__(self):
        if self.at and not self.asks:
            raise ValueError(f"exit.{self.name}.at is {self.at}; this method asks at no exit")

    def check(self, model: EarlyExitModel) -> None:
        """Raise ValueError, naming the setting, for what this policy cannot do on `model`. Called before any work."""
        if foreign := sorted(set(self.at) - set(model.points)):
            raise ValueError(f"exit.at asks at {foreign}; this model can be left at {model.points}")

    def on(self, model: EarlyExitModel) -> ExitPolicy:
        """This policy as it asks on `model`.

        A rule that knows no time does not ask at a Gaussian exit 0 unless `at` names it: the patch tokens are not told
        the time before the first layer, and what leaving there costs depends on little else.
        """
        if self.timeless and not self.at and model.gaussian is not None:
            return replace(self, at=model.points[1:-1])
        return self

    def asked(self, points: tuple[int, ...]) -> tuple[int, ...]:
        """The exits, among the model's `points`, at which this policy wants to be asked. The last is no question."""
        return tuple(k for k in (self.at or points) if k != points[-1])

    def questions(self, points: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `asked` at which the estimator must answer."""
        return self.asked(points) if "u" in self.reads else ()

    def bind(self, seed: int, ids: Sequence[int]) -> ExitPolicy:
        """This policy for a batch of the images `ids` of noise seed `seed`: few need to know whose rows they see."""
        return self

    def start(self, n_rows: int, depth: int, t: Tensor) -> Decide:
        """Called once per network call with the times t (n_rows,) in [0, 1] on the CPU: no memory between calls."""
        raise NotImplementedError

    def at_call(self, number: int) -> ExitPolicy:
        """Who decides in the `number`-th network call of a sampling (0 = the first): itself, unless numbers matter."""
        return self

    def paired(self, pair: str) -> ExitPolicy:
        """This policy for guidance pairs that leave together, "tied" or by the "cond" row.

        ValueError where the rows of a call decide together, or remember what their own branch did.
        """
        if self.kind is None and self.per_image:
            return GuidancePairs(inner=self, pair=pair)
        raise ValueError(f"sample.pair is {pair!r}; exit.{self.name} decides for each guidance branch alone: use free")


def max_u_of(value: float) -> float:
    """The uncertainty below which a row leaves at the certainty `value`: 1 - value, the released convention.

    Raises ValueError unless `value` is a number in (0, 1]; at 1 nobody leaves.

    >>> round(max_u_of(0.98), 4)
    0.02
    >>> max_u_of(98)
    Traceback (most recent call last):
        ...
    ValueError: exit_threshold is 98; it is a certainty and must lie in (0, 1], 1 = never exit early
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and 0 < value <= 1):
        raise ValueError(f"exit_threshold is {value!r}; it is a certainty and must lie in (0, 1], 1 = never exit early")
    return 1.0 - value


@dataclass(frozen=True, kw_only=True)
class Wrapped(ExitPolicy):
    """Base of the policies that ask as `inner` does."""

    inner: ExitPolicy

    @property
    def reads(self) -> frozenset[str]:
        return self.inner.reads

    @property
    def per_image(self) -> bool:
        return self.inner.per_image

    def check(self, model):
        self.inner.check(model)

    def on(self, model):
        return replace(self, inner=self.inner.on(model))

    def asked(self, points):
        return self.inner.asked(points)

    def questions(self, points):
        return self.inner.questions(points)


@dataclass(frozen=True, kw_only=True)
class GuidancePairs(Wrapped):
    """Guidance pairs that leave together: where both rows would ("tied"), or where the conditional row would ("cond").

    Rows are [cond; null].
    """

    pair: str

    def at_call(self, number):
        inner = self.inner.at_call(number)
        return self if inner is self.inner else replace(self, inner=inner)

    def start(self, n_rows, depth, t):
        inner = self.inner.start(n_rows, depth, t)

        def decide(look: Look) -> Decision:
            stop = inner(look)
            if isinstance(stop, bool):
                return stop
            halves = stop.view(2, -1)  # they match, as pairs left together before
            return (halves[0] if self.pair == "cond" else halves.all(0)).repeat(2)

        return decide


def one_size(name: str, model: EarlyExitModel) -> None:
    """Refuse the policy `name`, which compares or joins the features of layers, where these differ in size."""
    if model.backbone.decodes:
        raise ValueError(f"exit.name is {name!r}, which needs layers of one size; this U-Net's have several")
