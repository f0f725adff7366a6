"""The U-Net: diffusers' own forward pass at full depth, exits at levels of different sizes, bridges, weight files."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import inputs, tiny_unet
from test_cost import count_macs
from test_exits import check_batch_equals_singles

from configs import base
from libs import weights
from libs.evaluator import build_model
from libs.exits import EXIT_POLICIES, looking_back, run_dense, run_with_exits
from libs.exits.calls import start_calls
from libs.models import ESTIMATORS, EarlyExitModel, UNet
from libs.models.unet import Bridge
from scripts import inspect_checkpoint

NET = dict(img_size=8, in_chans=1, widths=(8, 16, 16), n_blocks=2, attention=(1,), groups=4)


def test_full_depth_is_the_plain_network():
    """Catches skips in the wrong order, a lost time or label, and a layer that runs twice or never."""
    model = tiny_unet(num_classes=10)
    x, _, time, cond = inputs(4, model=model)
    wanted = model.backbone.net(x, time, cond).sample
    assert torch.equal(model.backbone(x, time, cond), wanted)
    assert torch.equal(run_dense(model, x, time, cond).out[-1], wanted)


def test_published_size():
    """Catches a network that is not DDPM's (35.7 M parameters, 6.22 GMACs), and levels that are not bypassed.

    Without its deepest 1, 2 and 3 levels and the middle, level skipping leaves 96.5, 85.1 and 36.0 % of the MACs; a
    level here ends with its halving convolution, at most 0.6 % each.
    """
    with torch.device("meta"):
        network = UNet(img_size=32, in_chans=3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    macs = network.macs()
    assert macs.at(4) / 1e9 == pytest.approx(6.222, abs=6e-4)
    shares = [macs.at(k) / macs.at(4) for k in (1, 2, 3)]
    assert shares == pytest.approx([0.360, 0.851, 0.965], abs=7e-3)


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", ["threshold", "fixed", "schedule"])
def test_batch_equals_single_images(name, heads):
    """Catches heads that read the skips of rows that left, and bridges of another exit."""
    settings = {"threshold": {"certainty": 0.5}, "fixed": {"layer": 2}}.get(name, {})
    used = check_batch_equals_singles(tiny_unet("time", heads), EXIT_POLICIES[name](**settings))
    assert name != "threshold" or len(set(used)) >= 3, "the exits must be spread or the test shows nothing"


def test_outputs_are_those_of_the_exits():
    """Catches a bypassed level that still has a say, and a head that decodes from the wrong level."""
    model = tiny_unet()
    x, t, time, cond = inputs()
    out, used = run_with_exits(model, EXIT_POLICIES["threshold"](certainty=0.5), x, t, time, cond)
    dense = run_dense(model, x, time, cond).out
    torch.testing.assert_close(out, dense[used - 1, range(len(used))], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_macs_are_those_of_the_work(heads):
    """Catches heads, bridges and levels that are charged but not run, or run but not charged."""
    model = tiny_unet(heads=heads, num_classes=10)
    x, t, time, cond = inputs(1, model=model)
    for k in range(1, model.depth + 1):
        policy = EXIT_POLICIES["fixed"](layer=k)
        spent = count_macs(lambda policy=policy: run_with_exits(model, policy, x, t, time, cond))
        assert spent == model.macs().at(k)


@pytest.mark.parametrize("uem", ESTIMATORS)
def test_estimators_at_every_size(uem):
    """Catches an estimator that takes one grid and width for all exits: maps cover the image at each."""
    model = tiny_unet(uem)
    x, _, time, _ = inputs(5)
    u = run_dense(model, x, time, None).u
    assert u.shape == ((4, 5) if model.uem.scalar else (4, 5, 1, 8, 8)) and u.min() >= 0 and u.max() <= 1


@pytest.mark.parametrize("uem", ESTIMATORS)
@torch.no_grad()
def test_questions_at_every_size(uem):
    """Catches questions that are charged by the first level's size."""
    model = tiny_unet(uem)
    x, _, time, _ = inputs(1)
    carry, asked = model.embed(x, time, None), []
    if model.uem.ahead:
        assert count_macs(lambda: model.foresee(carry)) == model.macs().ask[0] > 0
        return
    for k in (1, 2, 3):
        carry = model.layer(k - 1, carry)
        asked.append(count_macs(lambda k=k, carry=carry: model.estimate(k, carry)))
    assert asked == list(model.macs().ask[1:4]) and min(asked) > 0


def test_bridges_start_as_nothing_and_learn():
    """Catches bridges that change the network they are added to, and bridges that no loss reaches."""
    torch.manual_seed(0)
    network = UNet(**NET)
    shared, own = (EarlyExitModel(network, ESTIMATORS["linear"], heads=heads) for heads in ("shared", "own"))
    x, _, time, _ = inputs(3)
    torch.testing.assert_close(run_dense(shared, x, time, None).out, run_dense(own, x, time, None).out)
    assert [type(part) for part in own.heads.values()] == [Bridge, Bridge]
    own.freeze_backbone()
    run_dense(own, x, time, None).out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in own.heads.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_residual_correction():
    """Catches a residual that is measured without the skips of its call."""
    model, k = tiny_unet(), 2
    policy = looking_back(EXIT_POLICIES["fixed"](layer=k), residual=True, refresh=2)
    calls = start_calls(model, policy, lambda out, x, t: out)
    (x, t, time, _), (x2, *_) = inputs(6), inputs(6, seed=2)
    first, second = run_dense(model, x, time, None).out, run_dense(model, x2, time, None).out
    torch.testing.assert_close(calls(x, t, time, None)[0], first[-1])
    corrected, used, costs = calls(x2, t, time, None)
    torch.testing.assert_close(corrected, second[k - 1] + first[-1] - first[k - 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(used, k)


@pytest.mark.parametrize("policy", [EXIT_POLICIES["similarity"](), EXIT_POLICIES["cache"](every=2)])
def test_methods_for_layers_of_one_size_are_refused(policy):
    """Catches tokens of different sizes that are compared, or levels that are taken for a U-ViT's last layers."""
    with pytest.raises(ValueError, match=r"exit\.name is '(similarity|cache)'"):
        start_calls(tiny_unet(), policy, lambda out, x, t: out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(8,)), "nnet.widths is (8,): at least 2 levels"),
        (dict(img_size=6), "nnet.img_size 6 must be a multiple"),
        (dict(widths=(8, 10, 16)), "nnet.widths is (8, 10, 16); each must be a multiple of nnet.groups, 4"),
        (dict(attention=(3,)), "nnet.attention is (3,); it must name levels in 0..2"),
        (dict(n_blocks=0), "nnet.n_blocks is 0; it must be at least 1"),
    ],
)
def test_impossible_networks_are_refused(changes, message):
    """Catches a shape error deep inside a block."""
    with pytest.raises(ValueError, match=re.escape(message)):
        UNet(**NET | changes)


def test_labels_are_needed_or_refused():
    """Catches a condition that is silently ignored."""
    x, _, time, _ = inputs(2)
    with pytest.raises(ValueError, match="10 classes and needs labels"):
        UNet(**NET, num_classes=10)(x, time)
    with pytest.raises(ValueError, match="unconditional"):
        UNet(**NET)(x, time, torch.zeros(2, dtype=torch.long))


# ---- weight files ----------------------------------------------------------------------------------------------------

FIRST_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def first_names(key: str) -> str:
    """The name of a tensor in files of diffusers before 0.15, DDPM's among them."""
    for new, old in FIRST_NAMES.items():
        key = re.sub(rf"(attentions\.\d+)\.{new}\.", rf"\1.{old}.", key)
    return key


@pytest.mark.parametrize("old", [False, True])
def test_a_file_of_diffusers(old, tmp_path):
    """Catches names of attention that stay behind, and a file that loads without being the network it was."""
    torch.manual_seed(1)
    net = UNet(**NET).net
    net.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    if old:
        state = {first_names(key): value for key, value in weights.read(path).items()}
        assert any("proj_attn" in key for key in state)
        weights.write(state, path)
    model = EarlyExitModel(UNet(**NET), ESTIMATORS["linear"], heads="own")
    assert "ddpm weights" in weights.load(model, path, start=True)
    x, _, time, _ = inputs(3)
    assert torch.equal(model.backbone(x, time), net(x, time).sample)
    with pytest.raises(ValueError, match="no uncertainty estimators"):
        weights.load(EarlyExitModel(UNet(**NET), ESTIMATORS["linear"]), path)
    text = "\n".join(inspect_checkpoint.describe(path))
    assert "nnet.widths = (8, 16, 16)" in text and "nnet.attention = (1,)" in text and "missing: uncertainty" in text


@pytest.mark.parametrize("uem", ESTIMATORS)
def test_settings_are_read_from_own_files(uem, tmp_path):
    """Catches a trained U-Net that cannot be told from another by its file."""
    model = EarlyExitModel(UNet(**NET, num_classes=4), ESTIMATORS[uem], heads="own", points=(2,))
    found = weights.infer(model.state_dict())
    config = base.config("unet")
    config.update_from_flattened_dict(found)
    twin = build_model(config)
    assert found["uem.name"] == uem and found["nnet.num_classes"] == 4 and tuple(found["nnet.points"]) in ((2,), (2, 3))
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    weights.write(model.state_dict(), tmp_path / "own.pth")
    other = EarlyExitModel(UNet(**NET | dict(widths=(8, 16)), num_classes=4), ESTIMATORS[uem], heads="own")
    with pytest.raises(ValueError, match=r"nnet.widths: \(8, 16, 16\) in the file, \(8, 16\) in the config"):
        weights.load(other, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="holds a U-ViT"):
        weights.export(model.state_dict(), "uvit")
