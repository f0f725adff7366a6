"""What the code would ask of a GPU, on an emulated one (tests/device.py): no mixed memories, no more waits than due.

The budgets are what a CUDA stream needs to stay filled: a call whose depth is known beforehand never waits; a policy
that looks at the images waits once per exit at which it asks.
"""

import contextlib
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import FILES, calibration_file, tiny, tiny_dit, tiny_unet, trace_file
from device import DEVICE, Mixed, emulated
from test_configs import load
from test_inflight import PLANS, Raw
from test_rivals import sublayer_file

from libs import regimes, trainer
from libs.evaluation.evaluate import evaluate
from libs.exits import EXIT_POLICIES, looking_back
from libs.exits.threshold import Threshold
from libs.models import build_model
from libs.regimes import Labels, Regime
from libs.run import Alone, Run
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.sampler import Sampler
from sde import VPLinear

N, BATCH = 12, 4


@cache
def network(model, classes, **options):
    return model(num_classes=classes or -1, **options).requires_grad_(False)


def sampler(model=tiny, scale=0.0, pair="free", pred="v", **options) -> Sampler:
    """On the CPU."""
    classes = 4 if scale else 0
    labels = Labels(classes - (scale > 0), has_null=scale > 0)
    regime = Regime((1, 8, 8), (1, 8, 8), VPLinear(), Raw(), labels, dataset=None)
    net, guidance = network(model, classes, **options), Guidance(scale, pair)
    return Sampler(net, regime, Alone("cpu"), pred=pred, guidance=guidance)


def moved(made: Sampler) -> Sampler:
    """A copy on the emulated device."""
    return replace(made, model=deepcopy(made.model).to(DEVICE), run=Alone(DEVICE))


def count(policy, plan="multistep", inflight=False, **options) -> dict:
    """Waits, questions and calls of a sampling on the device, which must make the CPU's images to the bit.

    In lockstep from the second call of one batch to its last: what is made once per sampling is left out.
    """
    ids = np.arange(N if inflight else BATCH)
    settings = dict(ids=ids, seed=3, plan=PLANS[plan](), policy=policy, batch_size=BATCH, inflight=inflight)
    made = sampler(**options)
    wanted = [images.pixels for images in made.images(**settings)]
    with emulated() as log:
        device = moved(made)
        questions, marks = [], []

        def ask(k, carry, asked=device.model.uncertainty):
            questions.append(k)
            return asked(k, carry)

        def call(self, x, t, called=Denoiser.__call__):
            marks.append((len(log.waits), len(questions), sum(log.double.values())))
            return called(self, x, t)

        object.__setattr__(device.model, "uncertainty", ask)
        with patch.object(Denoiser, "__call__", call):
            log.clear()
            found = [images.pixels for images in device.images(**settings)]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b), "the device makes other images"
    if inflight:
        return dict(waits=log.waits[:], questions=len(questions), batches=len(found))
    calls = settings["plan"].nfe
    (w0, q0, d0), (w1, q1, d1) = marks[1], marks[calls - 1]
    return dict(waits=log.waits[w0:w1], questions=q1 - q0, calls=calls - 2, double=d1 - d0)


def policy(name, **options):
    return EXIT_POLICIES[name](**options)


def rival_file(name: str) -> str:
    """A table or a gate for `tiny` at the calls of the plan "multistep"."""
    plan = PLANS["multistep"]()
    return sublayer_file(Path(FILES.name), name, calls=plan.nfe, t=plan.t.tolist())


THRESHOLD = policy("threshold", certainty=0.5)
NEVER = {
    "full": dict(policy=policy("full")),
    "fixed": dict(policy=policy("fixed", layer=3)),
    "schedule": dict(policy=policy("schedule")),
    "power": dict(policy=policy("power")),
    "reuse": dict(policy=policy("reuse", every=2)),
    "cache": dict(policy=policy("cache", every=2)),
    "learned_cache": dict(policy=policy("learned_cache", path=rival_file("learned_cache"))),
    "matched_static": dict(policy=policy("matched_static", path=trace_file())),
    "matched_random": dict(policy=policy("matched_random", path=trace_file())),
    "forecasts": dict(policy=policy("full"), plan="forecast"),
    "noise at every step": dict(policy=policy("schedule"), plan="stochastic"),
    "schedule with residual": dict(policy=looking_back(policy("schedule"), residual=True, refresh=2)),
    "guided": dict(policy=policy("schedule"), scale=1.5),
    "U-Net": dict(policy=policy("schedule"), model=tiny_unet),
    "DiT": dict(policy=policy("schedule"), model=tiny_dit),
    "x0": dict(policy=policy("full"), pred="x0"),
}
ASKED = {
    "threshold": dict(policy=THRESHOLD),
    "threshold, never": dict(policy=policy("threshold", certainty=1.0)),
    "threshold at two exits": dict(policy=policy("threshold", certainty=0.5, at=(2, 4))),
    "calibrated": dict(policy=policy("calibrated", path=calibration_file())),
    "patience": dict(policy=policy("patience", certainty=0.5)),
    "released": dict(policy=policy("released_batch_mean", certainty=0.5)),
    "threshold with residual": dict(policy=looking_back(THRESHOLD, residual=True, refresh=3)),
    "guided pairs that part": dict(policy=THRESHOLD, scale=1.5),
    "guided pairs that stay": dict(policy=THRESHOLD, scale=1.5, pair="tied"),
    "own heads": dict(policy=THRESHOLD, heads="own"),
    "time": dict(policy=THRESHOLD, uem="time"),
    "time_bank": dict(policy=THRESHOLD, uem="time_bank"),
    "U-Net": dict(policy=THRESHOLD, model=tiny_unet),
}
# Policies that ask no estimator: the most waits that a call of theirs may have.
LOOKS = {
    "similarity": (dict(policy=policy("similarity", cosine=0.852)), 5),  # at the exits 2 to 6
    "first_block": (dict(policy=policy("first_block", threshold=0.2, per_image=True)), 1),
    "teacache": (dict(policy=policy("teacache", threshold=0.4, per_image=True)), 1),
    "lazy_gate": (dict(policy=policy("lazy_gate", path=rival_file("lazy_gate"))), 2 * 7),  # sublayers
}
FLIGHTS = {
    "threshold": dict(policy=THRESHOLD),
    "calibrated": dict(policy=policy("calibrated", path=calibration_file())),
    "guided": dict(policy=THRESHOLD, scale=1.5),
    "noise at every step": dict(policy=THRESHOLD, plan="stochastic"),
    "forecasts": dict(policy=THRESHOLD, plan="forecast"),
}


@pytest.mark.parametrize("name", NEVER)
def test_a_known_depth_never_waits(name):
    """Catches `.item()`, `.cpu()`, masks, CPU indices and plain copies in a call whose depth is known beforehand."""
    found = count(**NEVER[name])
    assert found["calls"] and found["waits"] == []
    assert found["double"] == 0, "coefficients are made on the host, once per call"


@pytest.mark.parametrize("name", ASKED)
def test_a_question_waits_once(name):
    """Catches a second wait at an exit: for rows, times, thresholds or the order of what left."""
    found = count(**ASKED[name])
    assert found["questions"] and len(found["waits"]) <= found["questions"], Counter(found["waits"])


@pytest.mark.parametrize("name", LOOKS)
def test_a_comparison_waits_once(name):
    """Catches gates that are copied to the device at every sublayer, and rows that are copied while the host waits."""
    options, most = LOOKS[name]
    found = count(**options)
    assert 0 < len(found["waits"]) <= most * found["calls"], Counter(found["waits"])
    assert {kind for kind, _ in found["waits"]} == {"to host"}


def test_looking_ahead_waits_once_per_call():
    """Catches an estimator that looks ahead and is waited for at every exit."""
    found = count(THRESHOLD, uem="ahead")
    assert len(found["waits"]) == found["calls"], Counter(found["waits"])


@pytest.mark.parametrize("name", FLIGHTS)
def test_in_flight_waits_for_decisions_and_images(name):
    """Catches queues that ask the device which rows they hold."""
    found = count(inflight=True, **FLIGHTS[name])
    assert len(found["waits"]) <= found["questions"] + found["batches"], Counter(found["waits"])


def test_in_flight_ahead():
    """As above: one wait per start of rows, and one per batch of images."""
    found = count(THRESHOLD, uem="ahead", inflight=True)
    places = {place for kind, place in found["waits"] if kind == "to host"}
    assert len(places) == 2 and not found["questions"], Counter(found["waits"])


# ---- training ------------------------------------------------------------------------------------------------------


class DeviceRun(Run):
    """A run whose accelerator works on the emulated device."""

    def __init__(self, directory):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True)
        for shared in (PartialState._shared_state, AcceleratorState._shared_state, accelerator.state.__dict__):
            shared["device"] = DEVICE
        accelerator.autocast = lambda *_, **__: contextlib.nullcontext()
        self.barriers = 0
        super().__init__(directory, accelerator)

    def barrier(self):
        self.barriers += 1


def on_device(name, preset, **changes):
    config = load(name, preset)
    config.cpu, config.mixed_precision = True, "no"
    config.update_from_flattened_dict(changes)
    return config


@contextlib.contextmanager
def device_run(folder):
    """A run on the emulated device, and the device's log."""
    from accelerate.state import AcceleratorState

    try:
        with emulated() as log:
            yield DeviceRun(folder), log
    finally:
        AcceleratorState._reset_state(True)


def train(folder, name="digits_uvit_tiny", preset="quick", steps=4, **changes) -> tuple[list, int, int]:
    """Waits, barriers and float64 kernels of a step that logs nothing: neither the first nor the last."""
    due = {"n_steps": steps, "log_interval": 100, "sample_interval": 0, "eval_interval": 0, "save_interval": 1000}
    config = on_device(name, preset, **{f"train.{key}": value for key, value in due.items()} | changes)
    found, update = [], trainer.ema_update
    with device_run(folder) as (run, log):

        def step(*args):
            update(*args)
            found.append((log.waits[:], run.barriers, sum(log.double.values())))
            log.clear()

        with patch.object(trainer, "ema_update", step):
            trainer.fit(config, regimes.of(config), run)
    (_, before, _), (waits, after, double) = found[-3:-1]
    return waits, after - before, double


TRAININGS = {
    "adamw": {"optimizer.name": "adamw"},
    "muon, accumulated": {"train.accumulate": 2},
    "exit 0": {"nnet.gaussian": 64},
}
LONG_TRAININGS = {
    "no clipping": {"train.grad_clip": 0.0},
    "latents": {"name": "imagenet256_uvit_large"},
    "text": {"name": "mscoco_uvit_small"},
    "U-Net": {"name": "digits_unet_tiny"},
    "frozen": {"train.freeze_backbone": True},
    "x0, calm weights": {"pred": "x0", "loss.weights": "calm"},
}


@pytest.mark.parametrize("name", [*TRAININGS, *(pytest.param(n, marks=pytest.mark.long) for n in LONG_TRAININGS)])
def test_a_training_step_that_logs_nothing_never_waits(name, tmp_path):
    """Catches a number that is read, or a batch that is copied without `non_blocking`, at every step."""
    changes = (TRAININGS | LONG_TRAININGS)[name]
    waits, barriers, double = train(tmp_path, **changes)
    assert (waits, barriers) == ([], 0)
    most = 3 * changes.get("train.accumulate", 1) + 20 * ("nnet.gaussian" in changes)  # alpha and sigma of the rows
    assert double <= most, "only the network's time, which it casts itself, and the uniform numbers that drop labels"


@pytest.mark.long
@pytest.mark.parametrize("name", ["digits_uvit_tiny", "imagenet256_uvit_large", "mscoco_uvit_small"])
def test_looks_and_a_resume_mix_no_memories(name, tmp_path):
    """Catches samples, a monitor or a resumed state that compute with tensors of both memories."""
    every = {"n_steps": 2, "log_interval": 1, "sample_interval": 2, "eval_interval": 2, "save_interval": 1}
    every |= {"monitor_samples": 8, "monitor_steps": 2}
    config = on_device(name, "quick", **{f"train.{key}": value for key, value in every.items()})
    with device_run(tmp_path) as (run, _):
        trainer.fit(config, regimes.of(config), run)
        config.train.n_steps = 3
        trainer.fit(config, regimes.of(config), run)
    assert (tmp_path / "ckpts/3.ckpt").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"sample.inflight": True}])
def test_an_evaluation_mixes_no_memories(changes, tmp_path):
    """Catches a metric, a sweep or a map of uncertainty that computes with tensors of both memories."""
    sweep = (
        () if changes else ("threshold.certainty=0.6,residual=True,refresh=2", "reuse.every=2", "schedule", "steps=3")
    )
    config = on_device("digits_uvit_tiny", "quick", **{"eval.thresholds": (0.5,), "eval.sweep": sweep}, **changes)
    torch.manual_seed(0)
    torch.save(build_model(config).state_dict(), tmp_path / "nnet.pth")
    config.nnet_path = str(tmp_path / "nnet.pth")
    with device_run(tmp_path / "eval") as (run, _):
        evaluate(config, regimes.of(config), run)
    assert (tmp_path / "eval/results.jsonl").is_file()


# ---- what this file must see ---------------------------------------------------------------------------------------


def test_the_emulation_refuses_and_counts():
    """Catches an emulated device that computes with the CPU's memory."""
    with emulated() as log:
        a, b = torch.ones(3).to(DEVICE), torch.ones(3)
        for wrong in (
            lambda: a + b,
            lambda: b[a.long()],
            lambda: torch.cat([a, b]),
            lambda: a.normal_(generator=torch.Generator()),
            lambda: a.numpy(),
        ):
            with pytest.raises((Mixed, TypeError, RuntimeError)):
                wrong()
        log.clear()
        a + 1, a * torch.tensor(2.0), a[torch.zeros(1, dtype=torch.long, device=DEVICE)]
        assert not log.waits and log.kernels["add"] == log.kernels["mul"] == 1
        torch.ones(2).to(DEVICE, non_blocking=True)
        assert not log.waits
        bool((a > 0).all()), a.cpu(), a[a > 0], a[torch.tensor([0])], torch.ones(2).to(DEVICE), a.nonzero(), a.tolist()
        kinds = Counter(kind for kind, _ in log.waits)
        assert kinds["item"] == kinds["CPU index"] == kinds["from host"] == 1 and kinds["to host"] == 2
        assert kinds["nonzero"] >= 1
        linear = torch.nn.Linear(3, 3).to(DEVICE)
        linear(a).sum().backward()
        assert type(linear.weight.grad) is type(a)


def test_a_cpu_index_is_caught():
    """Planted: a policy whose rows are picked by an index on the CPU."""

    def start(self, n_rows, depth, t):
        return lambda look: look.u[torch.arange(len(look.u))] < 0.5

    with patch.object(Threshold, "start", start):
        found = count(THRESHOLD)
    assert len(found["waits"]) > found["questions"] and "CPU index" in {kind for kind, _ in found["waits"]}


def test_an_item_in_the_loop_is_caught():
    """Planted: a policy that reads one number per exit besides its decision."""

    def start(self, n_rows, depth, t):
        return lambda look: look.u < 0.5 if float(look.u.min()) < 2 else False

    with patch.object(Threshold, "start", start):
        found = count(THRESHOLD)
    assert len(found["waits"]) > found["questions"] and "item" in {kind for kind, _ in found["waits"]}


def test_a_generator_on_the_wrong_device_is_caught():
    """Planted: noise that a CPU generator draws into the device's memory."""

    def draw(self):
        return torch.empty(len(self.generators), *self.shape, device=DEVICE).normal_(generator=self.generators[0])

    with emulated():
        device = moved(sampler())
        with patch("libs.rng.SeededNoise.draw", draw), pytest.raises(Mixed, match="a CPU generator fills"):
            device.batch(np.arange(2), plan=PLANS["ddim"](), policy=policy("full"))
