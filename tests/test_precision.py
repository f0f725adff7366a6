"""Sampling below float32: weights cast once per sampling, the same images, and how far they are from float32's."""

import json
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_configs import load
from test_inflight import case
from torch.utils._python_dispatch import TorchDispatchMode

from libs import regimes, trainer
from libs.checkpoints import read_weights
from libs.exits import EXIT_POLICIES
from libs.models import EarlyExitModel
from libs.run import Alone, Run
from libs.sampling.denoiser import Denoiser


class Casts(TorchDispatchMode):
    """Counts weights that are cast."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::to", "aten::_to_copy") and isinstance(args[0], torch.nn.Parameter):
            self.n += 1
        return func(*args, **(kwargs or {}))


def images(precision="bf16", inflight=False, **options):
    """Images 0 to 22 as one array, raw, and the weights cast from the second network call on."""
    sampler, settings = case(Alone("cpu", precision), policy=EXIT_POLICIES["threshold"](certainty=0.5), **options)
    casts, marks = Casts(), []

    def call(self, *args, called=Denoiser.__call__):
        marks.append(casts.n)
        return called(self, *args)

    with casts, patch.object(Denoiser, "__call__", call):
        made = list(sampler.images(inflight=inflight, **settings | {"batch_size": 23}))
    return torch.cat([part.pixels for part in made]), casts.n - marks[1] if marks else None, sampler.model


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_weights_are_cast_once_and_the_images_stay(heads):
    """Catches weights that every call casts anew, casts of what autocast leaves alone, and weights that stay cast."""
    found, casts, model = images(heads=heads)
    with patch.object(EarlyExitModel, "weights_in", lambda self, dtype: nullcontext()):
        wanted, casts_of_autocast, _ = images(heads=heads)
    assert torch.equal(found, wanted) and casts == 0 and casts_of_autocast > 50
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_in_flight_casts_once():
    """Catches a second way of sampling without the first one's cast weights."""
    found, _, _ = images(inflight=True)
    with patch.object(EarlyExitModel, "weights_in", lambda self, dtype: nullcontext()):
        assert torch.equal(found, images(inflight=True)[0])


def test_norms_and_estimators_stay_in_float32():
    """Catches statistics and decisions in eight bits of precision."""
    model = case(Alone("cpu"))[0].model
    with model.weights_in(torch.bfloat16):
        left = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
        half = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert all("norm" in name or name.startswith("uem") or name == "backbone" for name in left)
    assert {"backbone.mid_block.mlp.fc1", "backbone.decoder_pred", "backbone.patch_embed.proj"} <= half
    assert any(name.startswith("uem") for name in left) and "backbone.norm" in left


def test_bf16_images_are_near_those_of_float32():
    """Catches sampler states or coefficients in bf16: full depth stays within 2 % of the images' spread."""
    made = {}
    for precision in ("no", "bf16"):
        sampler, settings = case(Alone("cpu", precision), policy=EXIT_POLICIES["full"]())
        made[precision] = torch.cat([part.pixels for part in sampler.images(**settings)])
    error = (made["bf16"] - made["no"]).square().mean().sqrt() / made["no"].std()
    assert 0 < error < 0.02
    assert made["bf16"].dtype == torch.float32


def test_a_training_step_that_overflows_is_skipped(tmp_path):
    """Catches fp16 gradients that are logged or clipped with their scale on them, and an overflow that ends a run."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)  # fp16 as accelerate sets it up on a GPU; it refuses a CPU
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15)
    config = load("digits_uvit_tiny", "quick")
    config.optimizer.name = "adamw"
    config.train.update(n_steps=5, log_interval=1, sample_interval=0, eval_interval=0, save_interval=1, keep=5)
    trainer.fit(config, regimes.of(config), Run(tmp_path, accelerator))
    AcceleratorState._reset_state(True)
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    skipped = norms.index(next(norm for norm in norms if norm is not None))  # null: not finite
    assert 1 <= skipped <= 3 and all(norm is None for norm in norms[:skipped])
    assert all(0 < norm < 100 for norm in norms[skipped:]), "without the scale, 2^10 or more"
    before, after = (read_weights(tmp_path / f"ckpts/{step}.ckpt/nnet.pth") for step in (skipped, 5))
    first = read_weights(tmp_path / "ckpts/1.ckpt/nnet.pth")
    assert all(torch.equal(before[name], first[name]) for name in first), "a skipped step changed the weights"
    assert any(not torch.equal(before[name], after[name]) for name in first)
