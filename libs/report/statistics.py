"""The one place where a spread becomes an interval: Student's t of the n there is, for every page and sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95
FEWEST = 3  # two values can agree by chance: their interval is drawn, but it wins nothing


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values and its two-sided 95 % interval; `low` and `high` are None where one value is all there is.

    The interval is Student's t with n - 1 degrees of freedom, so two values have 12.7 standard errors on each side.

    >>> gain = estimate([1.9, 2.1, 2.0])  # a speed-up in three trainings
    >>> round(gain.mean, 2), round(gain.low, 2), round(gain.high, 2), gain.excludes(1)
    (2.0, 1.75, 2.25, True)
    >>> estimate([1.9, 2.1]).excludes(1) is None  # two values decide nothing
    True
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int = 1

    def excludes(self, value: float = 0.0) -> bool | None:
        """Whether `value` lies outside the interval; None with fewer than three values, which decide nothing."""
        if self.n < FEWEST or self.low is None or self.high is None:
            return None
        return not self.low <= value <= self.high

    def map(self, function) -> Estimate:
        """The estimate on another scale, by an increasing function."""
        low, high = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return Estimate(function(self.mean), low, high, self.n)


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and 95 % interval of independent values."""
    values = list(values)
    if len(values) < 2:
        return Estimate(values[0])
    return around(fmean(values), stdev(values) / math.sqrt(len(values)), len(values))


def around(mean: float, error: float, n: int) -> Estimate:
    """From a mean and its standard error over `n` values."""
    margin = error * float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(mean, mean - margin, mean + margin, n)


def over_seeds(quality: Sequence[dict[int, float]]) -> Estimate:
    """Of distances per training run and noise seed.

    Over training runs where there are several (noise seeds averaged within each), else over noise seeds: nine values
    of three trainings are three trainings.
    """
    if len(quality) > 1:
        return estimate(fmean(seeds.values()) for seeds in quality)
    return estimate(quality[0].values())


def difference(a: Sequence[dict[int, float]], b: Sequence[dict[int, float]], paired: bool) -> Estimate:
    """a - b of distances per training run and noise seed.

    `paired`: run i of both started from the same weights or training seed, so that what they share cancels, as does
    the noise of equal seeds. Otherwise, and where no noise seed is common, both are taken as independent, with the
    degrees of freedom of the one that has fewer.

    >>> early = [{1: 3.9, 2: 4.1}, {1: 3.6, 2: 3.6}, {1: 4.3, 2: 4.5}]  # three trainings, noise seeds 1 and 2
    >>> full = [{1: 3.8, 2: 4.0}, {1: 3.5, 2: 3.5}, {1: 4.2, 2: 4.4}]
    >>> round(difference(early, full, paired=True).high, 3), round(difference(early, full, paired=False).high, 3)
    (0.1, 1.505)
    """
    if paired and len(a) == len(b):
        gaps = [{seed: x[seed] - y[seed] for seed in x.keys() & y.keys()} for x, y in zip(a, b, strict=True)]
        if all(gaps):
            return over_seeds(gaps)
    one, two = over_seeds(a), over_seeds(b)
    if one.high is None or two.high is None:
        return Estimate(one.mean - two.mean)
    errors = [(e.high - e.mean) / float(student.ppf((1 + CONFIDENCE) / 2, e.n - 1)) for e in (one, two)]
    return around(one.mean - two.mean, math.hypot(*errors), min(one.n, two.n))


def ratio(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]], paired: bool) -> Estimate:
    """Geometric mean ratio of seconds per training run and timing run.

    Over training runs where there are several. With one, over timing runs if these were taken in turn (`paired`), as a
    slow moment of the machine then hits both; otherwise without an interval.
    """

    def mean(runs: Sequence[float]) -> float:
        return fmean(map(math.log, runs))

    if len(numerator) == len(denominator) > 1:
        logs = [mean(x) - mean(y) for x, y in zip(numerator, denominator, strict=True)]
    elif paired and len(numerator) == len(denominator) and len(numerator[0]) == len(denominator[0]):
        logs = [math.log(x / y) for x, y in zip(numerator[0], denominator[0], strict=True)]
    else:
        logs = [fmean(map(mean, numerator)) - fmean(map(mean, denominator))]
    return estimate(logs).map(math.exp)
