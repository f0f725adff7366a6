"""Where the time of a network call with early exits goes.

    python -m benchmarks.breakdown                  # digits-tiny and U-ViT-S/2; about a minute on two cores

Shares of the call's time in the parts of the executor: embedding, layers, questions to the estimator, heads, gathering
the rows that leave and stay, and everything else (decisions, the host). Skips are gathered within `layers`.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

from benchmarks.common import case_parser, make_inputs, make_model, sampling, save, spread_exits, table, wait
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.models.backbone import Carry

PARTS = {"embed": "embedding", "layer": "layers", "uncertainty": "questions", "head": "heads"}


@contextmanager
def watched(model, device: str):
    """Yields seconds by part, which grow while the model runs."""
    spent = dict.fromkeys([*PARTS.values(), "gathers"], 0.0)

    def timed(function: Callable, part: str) -> Callable:
        def call(*args):
            wait(device)
            start = time.perf_counter()
            out = function(*args)
            wait(device)
            spent[part] += time.perf_counter() - start
            return out

        return call

    keep = Carry.keep
    for name, part in PARTS.items():
        setattr(model, name, timed(getattr(model, name), part))
    Carry.keep = timed(keep, "gathers")
    try:
        yield spent
    finally:
        Carry.keep = keep
        for name in PARTS:
            delattr(model, name)


def main() -> None:
    arguments = case_parser(__doc__)
    arguments.set_defaults(budget=8)
    options = arguments.parse_args()
    cases, rows = {}, [("case", "seconds", *PARTS.values(), "gathers", "the rest")]
    for size in options.sizes:
        model = make_model(size, options.device)
        n = 64 if size == "tiny" else 16
        x, t, times, cond = make_inputs(model, n)
        order = spread_exits(model, x, times, cond)
        policy = EXIT_POLICIES["threshold"](certainty=0.5)
        for batch in options.batches or (1, 8, 64):
            index = order[(torch.arange(max(batch, 8)) * max(1, n // max(batch, 8))) % n]

            def run(index=index, batch=batch, model=model, policy=policy, inputs=(x, t, times, cond)):
                for some in index.split(batch):
                    parts = [None if part is None else part[some.to(part.device)] for part in inputs]
                    run_with_exits(model, policy, *parts)

            with sampling(model, options.device, options.dtype):
                run()
                with watched(model, options.device) as spent:
                    wait(options.device)
                    start, rounds = time.perf_counter(), 0
                    while rounds < 1 or (rounds < options.rounds and time.perf_counter() - start < options.budget):
                        run()
                        rounds += 1
                    wait(options.device)
                    seconds = time.perf_counter() - start
            case = f"{size} batch {batch} {options.dtype}"
            shares = {part: value / seconds for part, value in spent.items()}
            shares["the rest"] = 1 - sum(shares.values())
            cases[case] = {"seconds": seconds / rounds, "rounds": rounds, "shares": shares}
            rows.append((case, seconds / rounds, *shares.values()))
    table(rows)
    save("breakdown", options.device, cases)


if __name__ == "__main__":
    main()
