"""Wrong implementations that were really made somewhere. Each must fail the check that is there to catch it."""

from dataclasses import dataclass, replace

import torch

from libs.exits.caching import ResidualCalls
from libs.exits.threshold import Patience, Threshold
from libs.models.backbone import Carry
from libs.models.uem import Time, TimeBank


@dataclass(frozen=True, kw_only=True)
class BatchMeanExit(Threshold):
    """All rows of a batch leave on their common mean: what an image gets depends on its batch mates."""

    def start(self, n_rows, depth, t):
        return lambda look: bool(look.u.mean() < 1 - self.certainty)


class FirstRowTime(Time):
    """The estimator of the whole batch is chosen by the first row's timestep."""

    def logits(self, k, patches, time):
        return super().logits(k, patches, time[:1].expand_as(time))


class FirstRowBank(TimeBank):
    """The bank of the whole batch is chosen by the first row's timestep."""

    def bin(self, time):
        return super().bin(time)[:1].expand(len(time))


class UngatheredSkips(Carry):
    """After rows left, a skip is cut to the number of survivors instead of gathered by who they are."""

    def pop(self):
        _, skip = self.skips[-1]
        return skip[: len(self.rows)], replace(self, skips=self.skips[:-1])


@dataclass(frozen=True, kw_only=True)
class RememberingPatience(Patience):
    """Counts hits across network calls: the second call starts with what the first one saw."""

    def start(self, n_rows, depth, t):
        memory = self.__dict__.setdefault("memory", torch.zeros(n_rows, dtype=torch.long))

        def decide(look):
            hit = look.u < 1 - self.certainty
            memory[look.rows] += hit
            return hit & (memory[look.rows] >= self.times)

        return decide


def mixed_guidance(eps, scale):
    """Takes the halves for (null, cond) although they are stacked (cond, null)."""
    null, cond = eps.chunk(2)
    return cond + scale * (cond - null)


class SharedResidualCalls(ResidualCalls):
    """Every image is corrected with the batch's mean residual."""

    def correct(self, eps, used):
        if self.residual is not None:
            self.residual[:] = self.residual[:, self.known].mean(1, keepdim=True)
        return super().correct(eps, used)
