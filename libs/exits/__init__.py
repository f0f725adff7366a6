"""Exit policies, and the executor that applies them. To add one: a class with `start`, and a line here."""

from __future__ import annotations

from libs.exits.calibrated import Calibrated
from libs.exits.calls import Answer, check_sizes, start_calls
from libs.exits.execute import dense_decisions, oracle, run_dense, run_with_exits
from libs.exits.fixed import Fixed, Full
from libs.exits.matched import MatchedRandom, MatchedStatic
from libs.exits.policy import ExitPolicy, Look, Paired
from libs.exits.released import ReleasedBatchMean
from libs.exits.reuse import Cache, Refresh, Residual, Reuse, looking_back
from libs.exits.schedule import Power, Schedule
from libs.exits.similarity import Similarity
from libs.exits.threshold import Patience, Threshold
from libs.exits.trace import Trace

EXIT_POLICIES: dict[str, type[ExitPolicy]] = {
    "full": Full,
    "fixed": Fixed,
    "threshold": Threshold,
    "patience": Patience,
    "schedule": Schedule,
    "power": Power,
    "calibrated": Calibrated,
    "similarity": Similarity,
    "matched_random": MatchedRandom,
    "matched_static": MatchedStatic,
    "released_batch_mean": ReleasedBatchMean,
    "reuse": Reuse,
    "cache": Cache,
}

__all__ = [
    "EXIT_POLICIES",
    "Answer",
    "ExitPolicy",
    "Look",
    "Refresh",
    "Residual",
    "Paired",
    "Trace",
    "check_sizes",
    "dense_decisions",
    "oracle",
    "looking_back",
    "run_dense",
    "run_with_exits",
    "start_calls",
]
