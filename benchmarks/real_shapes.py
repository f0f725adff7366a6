"""The largest networks at their real shapes: that they run, how long and in how much memory.

    python -m benchmarks.real_shapes --sizes L/2 H/2  # batch 1; about 3 minutes on two cores, 11 GB
    python -m benchmarks.real_shapes --sizes DiT-XL/2 --jobs forward guided  # about a minute, 4 GB
    python -m benchmarks.real_shapes --batch 64 --dtype bf16 --device cuda

`forward` is one full-depth call. `guided` is one sampling step: conditional and null rows in one batch, the estimator
asked at every exit, none taken (certainty 1 - 1e-9). `train` is a whole training step as configured, all exits and
losses, with activation checkpointing: forward, backward, AdamW, EMA. Weights are random. Every job runs in a process of
its own; its memory is the peak resident size on a CPU, the allocator's peak on CUDA. `first` is the first call.
"""

import argparse
import copy
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.common import DTYPES, autocast, sampling, save, table, wait
from libs import regimes
from libs.exits import EXIT_POLICIES
from libs.losses import Objective
from libs.models import build_model
from libs.sampling.denoiser import Denoiser, Guidance
from libs.trainer import ema_update, make_optimizer

EXPERIMENTS = {"L/2": "imagenet256_uvit_large", "H/2": "imagenet256_uvit_huge", "DiT-XL/2": "imagenet256_dit_xl"}
JOBS = ("forward", "guided", "train")


def make_job(
    name: str, size: str, options: argparse.Namespace
) -> tuple[Callable[[], None], AbstractContextManager[None]]:
    """One call of the job, and the context of all calls; what it needs lives as long as it does."""
    torch.manual_seed(0)
    config = importlib.import_module(f"configs.{EXPERIMENTS[size]}").get_config()
    process = regimes.process(config)
    model = build_model(config).to(options.device)
    n, device = options.batch, options.device
    x0 = torch.randn(n, config.nnet.in_chans, config.nnet.img_size, config.nnet.img_size, device=device)
    labels, null = torch.randint(1000, (n,), device=device), torch.full((n,), 1000, device=device)
    t = torch.full((n,), 0.5, dtype=torch.float64)
    if name == "train":
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer, objective = make_optimizer(config.optimizer, model), Objective(**config.loss)

        def train():
            eps, times = torch.randn_like(x0), process.times(torch.rand(n, dtype=torch.float64)).to(device)
            with autocast(device, options.dtype):
                exits = model(process.noised(x0, times, eps), process.network_time(times), labels)
            loss, _ = objective(exits, process, config.pred, x0, eps, times)
            (loss.sum() / n).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema_update(ema, model, config.train.ema_rate)

        return train, nullcontext()

    model.eval().requires_grad_(False)

    def sample():
        if name == "forward":
            model.backbone(x0, process.network_time(t).to(device, torch.float32), labels)
        else:
            policy = EXIT_POLICIES["threshold"](certainty=1 - 1e-9)
            guidance = Guidance.of(config.sample, "tied")
            Denoiser(model, process, config.pred, policy, cond=labels, null=null, guidance=guidance)(x0, t)

    return sample, sampling(model, device, options.dtype)


def measure(name: str, size: str, options: argparse.Namespace) -> dict:
    """Runs in a process of its own."""
    (job, context), seconds = make_job(name, size, options), []
    with context:
        for _ in range(1 + options.rounds):
            wait(options.device)
            start = time.perf_counter()
            job()
            wait(options.device)
            seconds.append(time.perf_counter() - start)
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": seconds[0], "seconds": min(seconds), "peak_gb": peak / 1e9, "rounds": options.rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="after the first; default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="below fp32: by autocast")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.sizes[0], options)))
        return
    cases, rows = {}, [["", "first s", "s", "peak GB"]]
    for size in options.sizes:
        for job in options.jobs:
            flags = [f"--{key}={getattr(options, key)}" for key in ("batch", "rounds", "device", "dtype")]
            command = [sys.executable, "-m", "benchmarks.real_shapes", f"--sizes={size}", f"--child={job}", *flags]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            case = f"{size}, {job}, batch {options.batch}, {options.dtype}"
            cases[case] = found
            rows.append([case, found["first"], found["seconds"], found["peak_gb"]])
            print(f"{case}: {found}", file=sys.stderr)
    table(rows)
    save("real_shapes", options.device, cases)


if __name__ == "__main__":
    main()
