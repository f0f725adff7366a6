"""The same images at full depth and with exits, with the seconds of both: what scripts.play shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from libs.evaluation.timing import time_in_turn, timed
from libs.exits import EXIT_POLICIES
from libs.sampling.images import Images
from libs.sampling.sampler import Sampler


@dataclass(frozen=True)
class SideBySide:
    """Equal seeds, two ways to sample. `full` and `early` hold pixels (n, C, H, W) and depths (calls, n) in layers."""

    full: Images
    early: Images
    seconds: tuple[float, float]  # of all n images, at full depth and with exits

    @property
    def speed_up(self) -> float:
        return self.seconds[0] / self.seconds[1]


def side_by_side(
    sampler: Sampler,
    n: int,
    *,
    seed: int = 0,
    labels: Sequence[int | str] = (),
    prompts: Sequence[str] = (),
    budget: float | None = None,
    exit_threshold: float | None = None,
    rounds: int = 3,
) -> SideBySide:
    """Images 0 to n - 1 of a noise seed at full depth, on the experiment's own calls, and with exits.

    >>> sampler = Sampler.load("demo/last.ckpt", device="cpu")
    >>> both = side_by_side(sampler, 4, labels=[3], exit_threshold=0.98, rounds=1)
    >>> both.full.depth.shape, both.early.depth.shape, len(both.seconds)
    ((5, 4), (5, 4), 2)

    Args:
        sampler: the network and its experiment.
        n, seed, labels, prompts: as for `Sampler`.
        budget: one of `sampler.budgets`; its plan decides calls and depths.
        exit_threshold: certainty in (0, 1] above which an image leaves, on the calls of full depth.
        rounds: both are sampled in turn, once to warm up and so many times more; seconds are medians.

    Raises:
        ValueError: neither or both of budget and exit_threshold, or a value that the sampler refuses.
    """
    if (budget is None) == (exit_threshold is None):
        raise ValueError(f"budget is {budget} and exit_threshold is {exit_threshold}: give one of them")
    told = dict(seed=seed, labels=labels, prompts=prompts)
    plan = sampler.plan(sampler.config.sample.sample_steps)
    ways = [
        dict(plan=plan, policy=EXIT_POLICIES["full"]()),
        dict(budget=budget) if budget is not None else dict(plan=plan, exit_threshold=exit_threshold),
    ]
    made: dict[int, Images] = {}
    jobs = [timed(lambda i=i, way=way: made.update({i: sampler(n, **told, **way)})) for i, way in enumerate(ways)]
    seconds = time_in_turn(jobs, rounds, sampler.run)
    return SideBySide(made[0], made[1], tuple(map(median, seconds)))
