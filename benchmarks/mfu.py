"""How much of a GPU's arithmetic a full-depth network call uses: model FLOPs utilisation (MFU).

    python -m benchmarks.mfu --dtype bf16 --peak 989        # peak: the vendor's dense TFLOP/s for this format

Counts 2 FLOPs per multiply-accumulate of the network (libs/metrics/cost.py) and divides by the time and the peak.
"""

from __future__ import annotations

import torch

from benchmarks.common import autocast, in_turn, make_inputs, make_model, middle, parser, save, table


def main() -> None:
    arguments = parser(__doc__, sizes=("S/2", "L/2"), batches=(1, 8, 64, 256))
    arguments.add_argument("--peak", type=float, required=True, metavar="TFLOPS", help="of the device, dense")
    options = arguments.parse_args()
    cases, rows = {}, [("case", "seconds", "images/s", "TFLOP/s", "MFU")]
    for size in options.sizes:
        model = make_model(size, options.device)
        for batch in options.batches:
            x, _, time, cond = make_inputs(model, batch)

            def job(x=x, time=time, cond=cond, model=model):
                model.backbone(x, time, cond)

            with torch.inference_mode(), autocast(options.device, options.dtype):
                seconds = in_turn(
                    {"full": job},
                    device=options.device,
                    rounds=options.rounds,
                    least=options.least,
                    budget=options.budget,
                )["full"]
            spent = middle(seconds)
            reached = 2 * batch * model.macs().at(model.depth) / spent["median"] / 1e12
            case = f"{size} batch {batch} {options.dtype}"
            cases[case] = {"seconds": spent, "tflops": reached, "peak_tflops": options.peak}
            cases[case]["mfu"] = reached / options.peak
            rows.append((case, spent["median"], batch / spent["median"], reached, reached / options.peak))
    table(rows)
    save("mfu", options.device, cases)


if __name__ == "__main__":
    main()
