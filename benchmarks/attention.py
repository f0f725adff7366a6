"""Attention backends and number formats: seconds of a full-depth network call.

    python -m benchmarks.attention                            # digits-tiny and U-ViT-S/2; about 3 minutes on two cores
    python -m benchmarks.attention --device cuda --batches 1 64 --sizes S/2 L/2

Every backend that runs here (sdpa, math, xformers) with fp32, bf16 and fp16 (autocast), against sdpa in fp32 with the
same weights. The largest difference of the outputs from that is reported beside the time: speed is no excuse for it.
"""

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
    table,
)
from libs.models import EarlyExitModel
from libs.models.uvit import ATTENTION

BASE = ("sdpa", "fp32")


def runnable(model: EarlyExitModel, dtype: str, device: str) -> str:
    """Why a model cannot run in `dtype` here; "" if it can."""
    try:
        with torch.inference_mode(), autocast(device, dtype):
            x, _, time, cond = make_inputs(model, 1)
            model.backbone(x, time, cond)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return ""


def measure(size: str, batch: int, options) -> dict:
    jobs, outputs, refused = {}, {}, {}
    for backend in ATTENTION:
        try:
            model = make_model(size, options.device, attention=backend)
        except ValueError as error:
            refused[backend] = str(error)
            continue
        for dtype in DTYPES:
            if reason := runnable(model, dtype, options.device):
                refused[f"{backend} {dtype}"] = reason
                continue

            def job(model=model, dtype=dtype, key=(backend, dtype)):
                x, _, time, cond = make_inputs(model, batch)
                with torch.inference_mode(), autocast(options.device, dtype):
                    outputs[key] = model.backbone(x, time, cond).float()

            jobs[backend, dtype] = job
    seconds = in_turn(jobs, options)
    scale = outputs[BASE].abs().max()
    result = {"refused": refused}
    for key in jobs:
        difference = (outputs[key] - outputs[BASE]).abs().max() / scale
        record = {"seconds": middle(seconds[key]), "time_ratio": middle(ratios(seconds, key, BASE))}
        result[" ".join(key)] = record | {"largest_difference": float(difference)}
    return result


def main() -> None:
    arguments = case_parser(__doc__, dtype=False)
    arguments.set_defaults(budget=30)
    options = arguments.parse_args()
    cases, rows = {}, [("case", "backend", "seconds", "time", "25 %", "75 %", "difference", "rounds")]
    for size in options.sizes:
        for batch in options.batches or ((1, 64) if size == "tiny" else (1, 8)):
            case = f"{size} batch {batch}"
            cases[case] = measure(size, batch, options)
            for name, record in cases[case].items():
                if name == "refused":
                    continue
                spent, ratio = record["seconds"], cells(record["time_ratio"])
                rows.append((case, name, spent["median"], *ratio, record["largest_difference"], spent["rounds"]))
    table(rows)
    for name, reason in next(iter(cases.values()))["refused"].items():
        print(f"{name} does not run here: {reason}")
    save("attention", options.device, cases)


if __name__ == "__main__":
    main()
