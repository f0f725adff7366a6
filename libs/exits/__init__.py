"""Exit policies, and the executor that applies them.

To add a policy: a file in this folder with one frozen dataclass, and a line for it in `EXIT_POLICIES` below; README.md
has an example. The setting (`--config.exit.name=mine --config.exit.mine.slack=0.01`), sweeps, costs and the contract
tests follow.
"""

from libs.exits.caching import Cache, Refresh, Residual, Reuse, looking_back
from libs.exits.calls import Answer, start_calls
from libs.exits.changes import FirstBlock, TeaCache
from libs.exits.controls import MatchedRandom, MatchedStatic
from libs.exits.execute import oracle, run_with_exits
from libs.exits.planned import Planned
from libs.exits.policy import ExitPolicy, GuidancePairs, Look
from libs.exits.similarity import Similarity
from libs.exits.static import Fixed, Full, Levels, Power, Schedule
from libs.exits.sublayers import LazyGate, LearnedCache
from libs.exits.threshold import Calibrated, Patience, ReleasedBatchMean, Threshold
from libs.exits.trace import Trace
from libs.exits.two_networks import Duo

EXIT_POLICIES: dict[str, type[ExitPolicy]] = {
    "full": Full,
    "fixed": Fixed,
    "threshold": Threshold,
    "patience": Patience,
    "schedule": Schedule,
    "power": Power,
    "levels": Levels,
    "planned": Planned,
    "calibrated": Calibrated,
    "similarity": Similarity,
    "matched_random": MatchedRandom,
    "matched_static": MatchedStatic,
    "released_batch_mean": ReleasedBatchMean,
    "reuse": Reuse,
    "cache": Cache,
    "first_block": FirstBlock,
    "teacache": TeaCache,
    "duo": Duo,
    "learned_cache": LearnedCache,
    "lazy_gate": LazyGate,
}
