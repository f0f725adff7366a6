"""What the benchmarks share: models, jobs measured in turn, and result files.

A result file, benchmarks/results/<benchmark>-<device>.json, holds one record per case. A case that is measured again
replaces its record and leaves the others, and every record says by itself what it depends on.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from libs.files import write_json
from libs.models import BACKBONES, ESTIMATORS, EarlyExitModel
from libs.models.uvit import SIZES
from libs.run import describe_machine

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
# The networks of the deep digits, of CIFAR-10 and ImageNet 256, and one between; no config is read, so that
# the benchmarks run where ml_collections is not installed.
NETWORKS = {
    "tiny": dict(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=10,
        conv=False,
        attention="math",
    ),
    "mid": dict(img_size=32, patch_size=2, in_chans=3, embed_dim=256, depth=8, num_heads=8),
    "S/2": dict(img_size=32, patch_size=2, in_chans=3, **SIZES["S"]),
    "L/2": dict(img_size=32, patch_size=2, in_chans=4, num_classes=1001, **SIZES["L"]),
}
OWN_HEADS = ("tiny",)
LONG = 5.0  # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def case_parser(
    doc: str, sizes: Sequence[str] = ("tiny", "S/2"), batches: Sequence[int] = (), dtype: bool = True
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks know; `dtype`: whether one number format is chosen."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--sizes", nargs="+", choices=tuple(NETWORKS), default=list(sizes))
    found.add_argument("--batches", nargs="+", type=int, metavar="N", default=list(batches))
    found.add_argument("--rounds", type=int, metavar="N", default=50, help="at most; default: 50")
    found.add_argument("--least", type=int, metavar="N", default=3, help="rounds however long they take; default: 3")
    found.add_argument("--budget", type=float, metavar="S", default=15, help="seconds per case; default: 15")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    if dtype:
        found.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="below fp32: by autocast")
    return found


def make_model(size: str, device: str, **nnet) -> EarlyExitModel:
    """A model of a published experiment's size at random weights, on `device`, for sampling."""
    return make_trainable(size, device, **nnet).eval().requires_grad_(False)


def make_trainable(size: str, device: str, **nnet) -> EarlyExitModel:
    torch.manual_seed(0)
    backbone = BACKBONES["uvit"](**NETWORKS[size] | nnet)
    heads = "own" if size in OWN_HEADS else "shared"
    return EarlyExitModel(backbone, ESTIMATORS["linear"], heads=heads).to(device)


def make_inputs(model: EarlyExitModel, n: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x (n, C, H, W), t (n,) on the CPU, network time (n,), labels or None."""
    backbone = model.backbone
    device = backbone.pos_embed.device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, backbone.channels, backbone.img_size, backbone.img_size, generator=generator)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    classes = backbone.num_classes
    cond = torch.randint(classes, (n,), generator=generator).to(device) if classes else None
    return x.to(device), t, (999 * t).float().to(device), cond


@torch.inference_mode()
def spread_exits(model: EarlyExitModel, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
    """Set the biases of a linear estimator so that, of the given rows, as many leave at each exit at certainty 0.5.

    The biases do not change the tokens, so one pass through the network is enough. Returns the rows in the order in
    which they leave.
    """
    critical = []  # per exit (n,): the bias below which a row's mean uncertainty is below 0.5
    carry = model.embed(x, time, cond)
    for k in range(model.depth + 1):
        if k:
            carry = model.layer(k - 1, carry)
        if k in model.points[:-1]:
            logits = model.uem.logits(k, model.backbone.patches(carry), carry.time).flatten(1)  # (n, N p p C)
            low, high = torch.full_like(logits[:, 0], -50), torch.full_like(logits[:, 0], 50)
            for _ in range(50):
                middle = (low + high) / 2
                below = (logits + middle[:, None]).sigmoid().mean(1) < 0.5
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            critical.append(low)
    here, left = torch.ones(len(x), dtype=torch.bool), []
    for number, (k, bias) in enumerate(zip(model.points[:-1], critical, strict=True), 1):
        leave = round(len(x) * number / len(model.points)) - int((~here).sum())
        order = bias.cpu().masked_fill(~here, -torch.inf).sort(descending=True)
        values = order.values.clamp_min(-50)
        at = (values[leave - 1] + values[leave]) / 2 if leave else values[0] + 1
        model.uem.maps[str(k)].bias += at.to(x.device)
        here[order.indices[:leave]] = False
        left.append(order.indices[:leave])
    return torch.cat([*left, here.nonzero().flatten()])


def autocast(device: str, dtype: str):
    return nullcontext() if dtype == "fp32" else torch.autocast(device, DTYPES[dtype])


@contextmanager
def sampling(model: EarlyExitModel, device: str, dtype: str) -> Iterator[None]:
    """The context in which a sampling calls `model`: below fp32 its weights are cast once."""
    stored = None if dtype == "fp32" else DTYPES[dtype]
    with torch.inference_mode(), model.weights_in(stored), autocast(device, dtype):
        yield


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(jobs: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every job in every round; all jobs in turn, so that a drift of the machine hits all of them alike.

    One warm-up each, but none after a job that takes longer than LONG. Rounds end after `options.rounds`, or when
    `options.budget` seconds are spent, but not before `options.least`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    started = None
    while True:
        for name, job in jobs.items():
            wait(options.device)
            start = time.perf_counter()
            job()
            wait(options.device)
            if started is not None:
                seconds[name].append(time.perf_counter() - start)
            elif time.perf_counter() - start > LONG:
                break
        done = len(next(iter(seconds.values())))
        if started is None:
            started = time.perf_counter()
        elif done >= options.rounds:
            return seconds
        elif done >= options.least and time.perf_counter() - started > options.budget * (1 - 1 / (done + 1)):
            return seconds


def ratios(seconds: dict[str, list[float]], name: str, base: str) -> list[float]:
    """Of two jobs, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and the range of the middle half."""
    values = sorted(values)
    low, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return {"median": statistics.median(values), "low": low, "high": high, "rounds": len(values)}


def cells(found: dict[str, float]) -> tuple[float, float, float]:
    """What a table shows of `middle`."""
    return found["median"], found["low"], found["high"]


def machine(device: str) -> dict:
    """What a record depends on."""
    found = describe_machine()
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {**found, "device": name, "cores": os.cpu_count(), "command": command, "time": when}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "CPU"
    return f"{platform.machine()} {name}"


def table(rows: Sequence[Sequence[object]]) -> None:
    """The first row is the heading; numbers are shown with three digits after the point."""
    cells = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]))


def save(name: str, device: str, cases: dict[str, dict]) -> None:
    """Put the cases into the benchmark's result file and print them as the last line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{device}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stamped = {case: {**record, "machine": machine(device)} for case, record in cases.items()}
    write_json(path, stored | stamped)
    print(json.dumps({"benchmark": name, "file": path.name, "cases": stamped}))
