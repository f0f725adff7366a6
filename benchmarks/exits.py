"""What leaving early saves, and what the machinery for it costs, in single network calls.

    python -m benchmarks.exits                                       # about 4 minutes on two cores
    python -m benchmarks.exits --sizes S/2 --batches 64 --least 5    # a case again, longer

Everything is held against the plain backbone in the same round:

    full        run through the exit machinery, nothing asked             time: at most 1.01
    asked       the estimator asked at every exit, nobody leaves          time: at most 1.03
    threshold   every image leaves on its own, exits spread over all      time saved / MACs saved: at least 0.90
    fixed       all leave at the middle layer                             at least 0.97
    schedule    the depth follows from the time alone                     at least 0.97

Weights are random; the estimators' biases are set so that every exit is taken by as many images. A batch of one is
measured on eight different images in a row.
"""

from collections import Counter
from collections.abc import Callable
from itertools import repeat

import numpy as np
import torch

from benchmarks.common import (
    case_parser,
    cells,
    in_turn,
    make_inputs,
    make_model,
    middle,
    ratios,
    sampling,
    save,
    spread_exits,
    table,
)
from libs.exits import EXIT_POLICIES, Trace, run_with_exits
from libs.metrics.cost import macs_per_image

BATCH_SIZES = {"tiny": (1, 8, 64, 256), "S/2": (1, 8, 64), "L/2": (1, 8, 64)}
LEAST = {("S/2", 64): 2}  # rounds where one takes most of a minute on a CPU
TIME = 0.75  # of the schedule's calls: 16 of 28 layers


def policies(depth: int) -> dict:
    return {
        "full": EXIT_POLICIES["full"](),
        "asked": EXIT_POLICIES["threshold"](certainty=1.0),
        "threshold": EXIT_POLICIES["threshold"](certainty=0.5),
        "fixed": EXIT_POLICIES["fixed"](layer=(depth + 1) // 2),
        "schedule": EXIT_POLICIES["schedule"](),
    }


def measure(model, order: torch.Tensor, batch: int, options) -> dict:
    """One case: seconds of all jobs, what they save, and the depths. order: rows by their exit."""
    n = max(batch, 8)
    rows = order[(torch.arange(n) * max(1, len(order) // n)) % len(order)]  # spread over the exits, in any batch
    x, t, time, cond = (None if part is None else part[rows.to(part.device)] for part in make_inputs(model, len(order)))
    calls = list(zip(*(repeat(None) if part is None else part.split(batch) for part in (x, t, time, cond))))  # noqa: B905
    used: dict[str, np.ndarray] = {}

    def job(name, policy) -> Callable[[], None]:
        def run():
            depths = []
            for x, t, time, cond in calls:
                if name == "schedule":
                    t = torch.full_like(t, TIME)
                depths.append(run_with_exits(model, policy, x, t, time, cond)[1])
            used[name] = np.concatenate(depths)

        return run

    def plain():
        for x, _, time, cond in calls:
            model.backbone(x, time, cond)

    known = policies(model.depth)
    jobs = {"plain": plain} | {name: job(name, policy) for name, policy in known.items()}
    with sampling(model, options.device, options.dtype):
        seconds = in_turn(jobs, options)
    macs = model.macs()
    plain_macs = macs.at(model.depth)
    result = {"plain": {"seconds": middle(seconds["plain"]), "images_per_call": batch, "calls": len(calls)}}
    for name, policy in known.items():
        trace = Trace(model.depth, policy.questions(model.points))
        trace.add(0.5, used[name][None])
        spent = float(macs_per_image(trace, macs).mean()) / plain_macs
        ratio = middle(ratios(seconds, name, "plain"))
        record = {"seconds": middle(seconds[name]), "time_ratio": ratio, "macs_ratio": spent}
        record["mean_depth"] = float(used[name].mean())
        record["depths"] = {int(k): n for k, n in sorted(Counter(used[name].tolist()).items())}
        if name not in ("full", "asked"):
            record["time_saved_per_macs_saved"] = (1 - ratio["median"]) / (1 - spent)
        result[name] = record
    return result


def main() -> None:
    arguments = case_parser(__doc__)
    options = arguments.parse_args()
    cases, rows = {}, [("case", "job", "seconds", "time", "25 %", "75 %", "MACs", "depth", "saved/saved", "rounds")]
    least = options.least
    for size in options.sizes:
        model = make_model(size, options.device)
        x, _, time, cond = make_inputs(model, 16 if model.depth > 7 else 64)
        order = spread_exits(model, x, time, cond)
        for batch in options.batches or BATCH_SIZES[size]:
            options.least = least if least != arguments.get_default("least") else LEAST.get((size, batch), least)
            case = f"{size} batch {batch} {options.dtype}"
            result = cases[case] = measure(model, order, batch, options)
            for name, record in result.items():
                ratio = record.get("time_ratio", {"median": 1.0, "low": 1.0, "high": 1.0})
                rows.append(
                    (
                        case,
                        name,
                        record["seconds"]["median"],
                        *cells(ratio),
                        record.get("macs_ratio", 1.0),
                        record.get("mean_depth", float(model.depth)),
                        record.get("time_saved_per_macs_saved", ""),
                        record["seconds"]["rounds"],
                    )
                )
    table(rows)
    save("exits", options.device, cases)


if __name__ == "__main__":
    main()
