"""Tiny models with exits that spread, and one-process runs."""

import json
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import partial, wraps
from pathlib import Path

# MKL's exp of float32, and with it the sinusoids of time, differs in the last digit between kinds of CPUs, which a time
# of 1,000 makes 3e-5. The recorded numbers are those of this mode. Set before torch is imported; commands inherit it.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  this and torchvision, which the product loads late: once here, not in every fork
import torch
import torchvision.utils  # noqa: F401
from accelerate.state import AcceleratorState

from libs.exits import Trace
from libs.models import ESTIMATORS, DiT, EarlyExitModel, UNet, UViT
from libs.run import Run

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


def item(data, index: int, flip: bool, *draw: float):
    """Image `index` of a data set alone, float32, and its label, or its context (tokens, width)."""
    x, told = data.gather(torch.tensor([index]), torch.tensor([flip]), *(torch.tensor([d]) for d in draw))
    return x[0].float(), told[0].float() if told.dim() > 1 else int(told[0])


def forked(work: Callable[[], None], world: int = 1, log: str | Path = os.devnull) -> list[int]:
    """Run `work` in `world` forks of this process, which has everything imported; their ids. `log`: their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1), os.dup2(handle, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            torch.set_num_threads(1)
            os.environ["ACCELERATE_USE_CPU"] = "true"
            if world > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            AcceleratorState._reset_state(reset_partial_state=True)
            work()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return children


def exit_codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def command(*arguments: str) -> None:
    """Run a script of the checkout, or a module after "-m", as the main program.

    To be called in a fork, as flags are global.
    """
    from absl import flags

    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if not module.startswith("absl") else ():
            delattr(flags.FLAGS, flag.name)
    os.chdir(ROOT)
    sys.argv = list(arguments[arguments[0] == "-m" :])
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def finished(log: Path, *arguments: str, world: int = 1) -> list[str]:
    """The lines of stdout and stderr of a `command` in a fork, or in several; it must succeed."""
    codes = exit_codes(forked(partial(command, *arguments), world, log))
    lines = log.read_text().splitlines()
    assert codes == [0] * world, "\n".join(lines[-50:])
    return lines


def once(build: Callable[..., EarlyExitModel]) -> Callable[..., EarlyExitModel]:
    """`build`, as a copy where it has built such a model before: spreading the exits takes longer than most tests."""
    built = {}

    @wraps(build)
    def copied(*args, **options) -> EarlyExitModel:
        key = repr((args, sorted(options.items())))
        if key not in built:
            built[key] = build(*args, **options), torch.get_rng_state()
        model, state = built[key]
        torch.set_rng_state(state)  # what a test draws does not depend on the tests before it
        return deepcopy(model)

    return copied


@once
def tiny(uem="linear", heads="shared", seed=0, points=(), uem_options=None, spread=True, **nnet) -> EarlyExitModel:
    """Seven layers of width 32 on 8x8 images, whose estimators disagree between images, so that exits are spread."""
    torch.manual_seed(seed)
    options = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=6, num_heads=4, init="xavier") | nnet
    return spread_out(
        EarlyExitModel(UViT(**options), ESTIMATORS[uem], points=points, heads=heads, **(uem_options or {})), spread
    )


@once
def tiny_unet(uem="linear", heads="own", seed=0, points=(), spread=True, **nnet) -> EarlyExitModel:
    """As `tiny`, four levels of a U-Net with attention in two of them."""
    torch.manual_seed(seed)
    options = dict(img_size=8, in_chans=1, widths=(8, 16, 16, 8), n_blocks=1, attention=(1, 2), groups=4) | nnet
    return spread_out(EarlyExitModel(UNet(**options), ESTIMATORS[uem], points=points, heads=heads), spread)


@once
def tiny_dit(uem="linear", heads="shared", seed=0, points=(), spread=True, **nnet) -> EarlyExitModel:
    """As `tiny`, seven layers of a DiT whose modulations, zero at the start, are random."""
    torch.manual_seed(seed)
    options = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=7, num_heads=4) | nnet
    network = DiT(**options)
    for name, parameter in network.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return spread_out(EarlyExitModel(network, ESTIMATORS[uem], points=points, heads=heads), spread)


def spread_out(model: EarlyExitModel, spread: bool) -> EarlyExitModel:
    for parameter in model.heads.parameters():  # own heads start as copies: make them differ
        parameter.data += 0.05 * torch.randn_like(parameter)
    for linear in getattr(model.uem, "maps", {}).values():
        for weight in (value for value in linear.parameters() if value.ndim == 2):
            weight.data *= 40
    for linear in getattr(model.uem, "time_maps", {}).values():
        linear.weight.data *= 10
    if spread and not model.uem.scalar and not getattr(model.backbone, "context_shape", None):
        x, _, time, cond = inputs(16, model=model)
        for _ in range(30):  # level the exits' mean u, then let it fall slowly with depth
            u = model(x, time, cond).mean_u.mean(1)
            for (k, linear), mean in zip(model.uem.maps.items(), u.tolist(), strict=True):
                linear.bias.data += 3 * (0.6 - 0.025 * int(k) - mean)
    return model.eval()


def inputs(n=64, seed=1, model=None):
    """x (n, 1, 8, 8), t (n,) on the CPU, network time (n,), and labels where the model has classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    classes = model.backbone.num_classes if model is not None else 0
    cond = torch.randint(classes, (n,), generator=generator) if classes else None
    return x, t, (999 * t).float(), cond


FILES = tempfile.TemporaryDirectory()  # removed with the process


def calibration_file(points=tuple(range(1, 8))) -> str:
    """A file as scripts.calibrate writes it, for `tiny`: deep near the data, thresholds in the middle of u."""
    path = Path(FILES.name, f"calibration-{len(points)}.json")
    n = len(points) - 1
    schedule = {"t": [0.95, 0.6, 0.3, 0.1], "layers": [2, 4, 5, 7]}
    thresholds = {"edges": [0.5], "max_u": [[0.5 + 0.01 * i for i in range(n)], [0.0] + [0.45] * (n - 1)]}
    path.write_text(json.dumps({"points": points, "schedule": schedule, "thresholds": thresholds}))
    return str(path)


def plan_file(points=tuple(range(1, 8)), max_u=(0.0, 0.52, 0.0), layers=(2, 4, 7)) -> str:
    """A plan as scripts.calibrate --budget writes it, for `tiny`: four steps, the third of them a forecast."""
    path = Path(FILES.name, f"plan-{len(points)}-{max_u}-{layers}.json".replace(" ", ""))
    plan = {"nodes": [1.0, 0.6, 0.3, 0.1, 0.001], "computed": [True, True, False, True], "order": 1}
    plan |= {"lower_order_final": False, "layers": layers, "max_u": max_u}
    path.write_text(json.dumps({"points": points, "plan": plan}))
    return str(path)


def trace_file() -> str:
    """The trace of some policy on 40 images in four calls: 3 or 5 layers, then one layer fewer at every call."""
    path = Path(FILES.name, "trace.npz")
    trace = Trace(7)
    for number, t in enumerate([1.0, 0.7, 0.4, 0.1]):
        trace.add(t, np.array([[3] * 30 + [5] * 10]) - number + 2)
    trace.save(path, np.arange(40))
    return str(path)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.single(tmp_path / "run")
