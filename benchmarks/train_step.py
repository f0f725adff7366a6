"""What training the early-exit parts adds to a training step: time and peak memory.

    python -m benchmarks.train_step                   # U-ViT-S/2, batch 8; about 2 minutes on two cores

`plain` is U-ViT's own training: one output, the simple loss, no estimators and no losses of earlier exits. `uem` adds
an estimator and a loss at every exit, as configured (UEM and UAL). Both take a whole step: forward, backward, AdamW,
EMA. Targets: at most 1.05 times the time and 1.10 times the peak memory. Memory is that of a process of its own: its
peak resident size on a CPU, the allocator's peak on CUDA.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.common import autocast, case_parser, cells, in_turn, make_trainable, middle, ratios, save, table
from libs.losses import Objective
from libs.trainer import ema_update
from sde import VPLinear

TRAINED_KINDS = ("plain", "uem")


def make_step(kind: str, size: str, batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """A training step on random images; the model, its EMA and the optimizer's state live as long as it does."""
    model = make_trainable(size, options.device)
    backbone = model.backbone
    if kind == "plain":
        model = backbone
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, fused=True)
    objective, process, pred = Objective(), VPLinear(), "noise"
    x0 = torch.randn(batch, backbone.channels, backbone.img_size, backbone.img_size, device=options.device)
    classes = backbone.num_classes
    cond = torch.randint(classes, (batch,), device=options.device) if classes else None

    def step():
        eps = torch.randn_like(x0)
        t = process.times(torch.rand(batch, device=options.device))
        x, time = process.noised(x0, t, eps), process.network_time(t)
        with autocast(options.device, options.dtype):
            out = model(x, time, cond)
        if kind == "plain":
            loss = (out.float() - process.target(pred, x0, eps, t)).square().flatten(1).mean(1)
        else:
            loss, _ = objective(out, process, pred, x0, eps, t)
        (loss.sum() / batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update(ema, model, 0.9999)

    return step


def peak_memory(kind: str, size: str, batch: int, options: argparse.Namespace) -> int:
    """Bytes at the peak of two steps, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory_of", kind, "--sizes", size]
    command += ["--batches", str(batch), "--device", options.device, "--dtype", options.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def own_peak(kind: str, size: str, batch: int, options: argparse.Namespace) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the interpreter and the libraries are not the step's
    step = make_step(kind, size, batch, options)
    for _ in range(2):
        step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    arguments = case_parser(__doc__, sizes=("S/2",), batches=(8,))
    arguments.add_argument("--memory_of", choices=TRAINED_KINDS, help=argparse.SUPPRESS)
    arguments.set_defaults(budget=90)
    options = arguments.parse_args()
    if options.memory_of:
        print(own_peak(options.memory_of, options.sizes[0], options.batches[0], options))
        return
    cases, rows = {}, [("case", "kind", "seconds", "time", "25 %", "75 %", "peak MB", "memory", "rounds")]
    for size in options.sizes:
        for batch in options.batches:
            peaks = {kind: peak_memory(kind, size, batch, options) for kind in TRAINED_KINDS}
            seconds = in_turn({kind: make_step(kind, size, batch, options) for kind in TRAINED_KINDS}, options)
            case = f"{size} batch {batch} {options.dtype}"
            cases[case] = {}
            for kind in TRAINED_KINDS:
                record = cases[case][kind] = {
                    "seconds": middle(seconds[kind]),
                    "time_ratio": middle(ratios(seconds, kind, "plain")),
                    "peak_bytes": peaks[kind],
                    "memory_ratio": peaks[kind] / peaks["plain"],
                }
                ratio, spent = record["time_ratio"], record["seconds"]
                rows.append(
                    (
                        case,
                        kind,
                        spent["median"],
                        *cells(ratio),
                        record["peak_bytes"] / 1e6,
                        record["memory_ratio"],
                        spent["rounds"],
                    )
                )
    table(rows)
    save("train_step", options.device, cases)


if __name__ == "__main__":
    main()
