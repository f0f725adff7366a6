"""What compiled blocks and weights stored in bf16 give, at full depth and with exits, in single network calls.

    python -m benchmarks.compiled                       # ten minutes on two cores, most of them spent compiling
    python -m benchmarks.compiled --sizes tiny

Five ways to make the same call take turns: fp32 and bf16 eager, both compiled, and bf16 as autocast alone does it,
which casts every weight at every call. `saved` is the time that exits save over the MACs that they save, each way
against its own full depth: at least 0.90, compiled too.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy

import torch

from benchmarks.common import (
    DTYPES,
    autocast,
    case_parser,
    cells,
    in_turn,
    make_inputs,
    make_model,
    middle,
    ratios,
    save,
    spread_exits,
    table,
)
from libs.exits import EXIT_POLICIES, Trace, run_with_exits
from libs.metrics.cost import macs_per_image

BATCH_SIZE = {"tiny": 64, "mid": 4, "S/2": 8, "L/2": 8}
WAYS = {  # dtype, weights stored in it, compiled
    "fp32": ("fp32", False, False),
    "fp32 compiled": ("fp32", False, True),
    "bf16 autocast": ("bf16", False, False),
    "bf16": ("bf16", True, False),
    "bf16 compiled": ("bf16", True, True),
}
COMPILED = {"full": EXIT_POLICIES["full"](), "exits": EXIT_POLICIES["threshold"](certainty=0.5)}


def measure(size: str, batch: int, options) -> dict:
    """One case: every way at full depth and with exits; the seconds that compiling took."""
    eager = make_model(size, options.device)
    x, t, network_time, cond = make_inputs(eager, batch)
    spread_exits(eager, x, network_time, cond)
    compiled = deepcopy(eager)
    compiled.compile_blocks()
    used, macs = {}, eager.macs()

    def job(way: str, policy: str) -> Callable[[], None]:
        dtype, stored, fused = WAYS[way]
        model = compiled if fused else eager

        def run():
            with ExitStack() as stack:
                stack.enter_context(autocast(options.device, dtype))
                stack.enter_context(model.weights_in(DTYPES[dtype] if stored else None))
                for _ in range(options.calls):  # a sampling casts once for many calls
                    used[way, policy] = run_with_exits(model, COMPILED[policy], x, t, network_time, cond)[1]

        return run

    torch._dynamo.reset()
    with torch.inference_mode():
        jobs = {(way, policy): job(way, policy) for way in options.ways for policy in COMPILED}
        start = time.perf_counter()
        for run in jobs.values():
            run()
        warm = time.perf_counter() - start
        seconds = in_turn(jobs, options)
    result = {"seconds of the first calls": warm, "images_per_call": batch, "calls": options.calls}
    for way in options.ways:
        trace = Trace(eager.depth, COMPILED["exits"].questions(eager.points))
        trace.add(0.5, used[way, "exits"][None])
        spent = float(macs_per_image(trace, macs).mean()) / macs.at(eager.depth)
        own = middle(ratios(seconds, (way, "exits"), (way, "full")))
        result[way] = {
            "full over fp32": middle(ratios(seconds, (way, "full"), (next(iter(options.ways)), "full"))),
            "exits over full": own,
            "macs_ratio": spent,
            "time_saved_per_macs_saved": (1 - own["median"]) / (1 - spent),
        }
    return result


def main() -> None:
    arguments = case_parser(__doc__, sizes=("tiny", "mid"), dtype=False)
    arguments.add_argument("--calls", type=int, metavar="N", default=4, help="network calls per job; default: 4")
    arguments.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="fp32 first")
    options = arguments.parse_args()
    cases, rows = {}, [("case", "way", "full over fp32", "25 %", "75 %", "exits over full", "MACs", "saved", "rounds")]
    for size in options.sizes:
        for batch in options.batches or [BATCH_SIZE[size]]:
            case = f"{size} batch {batch}"
            result = cases[case] = measure(size, batch, options)
            for way in options.ways:
                full, exits = result[way]["full over fp32"], result[way]["exits over full"]
                spent, saved = result[way]["macs_ratio"], result[way]["time_saved_per_macs_saved"]
                rows.append((case, way, *cells(full), exits["median"], spent, saved, full["rounds"]))
    table(rows)
    save("compile", options.device, cases)


if __name__ == "__main__":
    main()
