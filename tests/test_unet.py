"""The U-Net: diffusers' own forward pass at full depth, exits at levels of different sizes, bridges, weight files."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import inputs, tiny, tiny_unet
from diffusers import UNet2DModel
from test_cost import count_macs
from test_exits import check_batch_equals_singles

from configs import base, digits_unet_tiny
from libs import checkpoints as weights
from libs import regimes
from libs.evaluation.sweep import points
from libs.exits import EXIT_POLICIES, looking_back, run_with_exits
from libs.exits.calls import start_calls
from libs.models import ESTIMATORS, EarlyExitModel, UNet, build_model
from libs.models.unet import Bridge
from libs.run import Alone
from libs.sampling.denoiser import PAIRS, Denoiser, Guidance
from libs.sampling.sampler import Sampler
from scripts import inspect_checkpoint
from sde import VPLinear

# google/ddpm-cifar10-32's config.json.
PUBLISHED = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,  # of files since diffusers 0.15
}
NET = dict(img_size=8, in_chans=1, widths=(8, 16, 16), n_blocks=2, attention=(1,), groups=4)


def test_full_depth_is_the_plain_network():
    """Catches skips in the wrong order, a lost time or label, and a layer that runs twice or never."""
    model = tiny_unet(num_classes=10)
    x, _, time, cond = inputs(4, model=model)
    wanted = model.backbone.net(x, time, cond).sample
    assert torch.equal(model.backbone(x, time, cond), wanted)
    assert torch.equal(model(x, time, cond).out[-1], wanted)


def test_published_size():
    """Catches a network that is not DDPM's (35.7 M parameters, 6.22 GMACs), and levels that are not bypassed.

    Without its deepest 1, 2 and 3 levels and the middle, level skipping leaves 96.5, 85.1 and 36.0 % of the MACs; a
    level here ends with its halving convolution, at most 0.6 % each.
    """
    with torch.device("meta"):
        network = UNet(img_size=32, in_chans=3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    built = {key: list(value) if isinstance(value, tuple) else value for key, value in network.net.config.items()}
    assert {key: built[key] for key in PUBLISHED} == PUBLISHED
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
    dense = model(x, time, cond).out
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


@pytest.mark.parametrize("uem", [uem for uem in ESTIMATORS if uem != "shared"])
def test_estimators_at_every_size(uem):
    """Catches an estimator that takes one grid and width for all exits."""
    model = tiny_unet(uem)
    x, _, time, _ = inputs(5)
    u = model(x, time, None).u
    assert u.shape == ((4, 5) if model.uem.scalar else (4, 5, 1, 8, 8)) and u.min() >= 0 and u.max() <= 1


def test_one_classifier_for_all_sizes_is_refused():
    """Catches a shape error deep in the network where the setting is at fault."""
    with pytest.raises(ValueError, match=r"uem.name is shared.*widths \[8, 16\]"):
        tiny_unet("shared")


@pytest.mark.parametrize("uem", ["linear", "time"])
def test_maps_lie_where_the_features_do(uem):
    """Catches a map that is transposed, or cut into patches of another level's size."""
    model = tiny_unet(uem)
    x, _, time, _ = inputs(1)
    carry = model.embed(x, time, None)
    for k in (1, 2, 3):
        carry = model.layer(k - 1, carry)
        corner = torch.zeros_like(carry.h)
        empty = model.uncertainty_map(k, replace(carry, h=corner.clone()))
        corner[..., 0, -1] = torch.randn(corner.shape[1])
        changed = (model.uncertainty_map(k, replace(carry, h=corner)) != empty)[0, 0]
        side = 8 // carry.h.shape[-1]
        assert changed[:side, -side:].all() and changed.sum() == side**2


@pytest.mark.parametrize("uem", [uem for uem in ESTIMATORS if uem != "shared"])
@torch.no_grad()
def test_questions_at_every_size(uem):
    """Catches questions that are charged by the first level's size."""
    model = tiny_unet(uem)
    x, _, time, _ = inputs(1)
    carry, asked = model.embed(x, time, None), []
    if model.uem.ahead:
        assert count_macs(lambda: model.predict_ahead(carry)) == model.macs().ask[0] > 0
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
    torch.testing.assert_close(shared(x, time, None).out, own(x, time, None).out)
    assert [type(part) for part in own.heads.values()] == [Bridge, Bridge]
    own.freeze_backbone()
    own(x, time, None).out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in own.heads.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_residual_correction():
    """Catches a residual that is measured without the skips of its call."""
    model, k = tiny_unet(), 2
    policy = looking_back(EXIT_POLICIES["fixed"](layer=k), residual=True, refresh=2)
    calls = start_calls(model, policy, lambda out, x, t: out)
    (x, t, time, _), (x2, *_) = inputs(6), inputs(6, seed=2)
    first, second = model(x, time, None).out, model(x2, time, None).out
    torch.testing.assert_close(calls(x, t, time, None)[0], first[-1])
    corrected, used, costs = calls(x2, t, time, None)
    torch.testing.assert_close(corrected, second[k - 1] + first[-1] - first[k - 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(used, k)


@pytest.mark.parametrize("pair", PAIRS)
def test_guided_residuals_do_not_depend_on_batch_mates(pair):
    """Catches residuals, skips or labels of another row, where some rows run full depth and others do not."""
    model = tiny_unet("time", num_classes=11)
    policy = looking_back(EXIT_POLICIES["threshold"](certainty=0.5), residual=True)
    x, _, _, cond = inputs(24, model=model)

    def sampled(rows):
        null = torch.full_like(cond[rows], 10)
        options = dict(cond=cond[rows], null=null, guidance=Guidance(1.5, pair))
        denoiser = Denoiser(model, VPLinear(), "noise", policy, **options)
        t = torch.ones(len(x[rows]), dtype=torch.float64)
        return [denoiser(x[rows] * scale, t * scale) for scale in (1, 0.8)][-1], denoiser.trace.used

    together, used = sampled(slice(None))
    alone = [sampled(slice(i, i + 1)) for i in range(24)]
    same = [np.array_equal(used[..., i : i + 1], one[1]) for i, one in enumerate(alone)]
    assert sum(same) >= 22, "an exit may flip by rounding, seldom"
    torch.testing.assert_close(together[same], torch.cat([one[0] for one in alone])[same], rtol=1e-4, atol=1e-4)
    assert len(set(used.ravel().tolist())) >= 3 and (used == model.depth).any(), "the exits must be spread"


@pytest.mark.parametrize("policy", [EXIT_POLICIES["similarity"](), EXIT_POLICIES["cache"](every=2)])
def test_methods_for_layers_of_one_size_are_refused(policy):
    """Catches tokens of different sizes that are compared, or levels that are taken for a U-ViT's last layers."""
    with pytest.raises(ValueError, match=r"exit\.name is '(similarity|cache)'"):
        start_calls(tiny_unet(), policy, lambda out, x, t: out)


def test_they_are_refused_before_any_work():
    """Catches an evaluation that ends at its last point with nothing written, and a training that none can follow."""
    config = digits_unet_tiny.get_config("quick")
    config.eval.sweep = ("steps=2", "cache.every=2")
    with pytest.raises(ValueError, match="exit.name is 'cache'"):
        points(Sampler.of(config, build_model(config), regimes.of(config), Alone("cpu")))
    with pytest.raises(ValueError, match="calm"):
        digits_unet_tiny.get_config("calm")


def test_a_network_of_another_kind_is_refused():
    """Catches a TypeError with a trace instead of a sentence about the setting."""
    config = digits_unet_tiny.get_config()
    config.nnet.name = "uvit"
    with pytest.raises(ValueError, match="nnet.name is 'uvit', which has no nnet.dropout, nnet.groups"):
        build_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(8,)), "nnet.widths is (8,): at least 2 levels"),
        (dict(img_size=6), "nnet.img_size 6 must be a multiple"),
        (dict(widths=(8, 10, 16)), "nnet.widths is (8, 10, 16); each must be a multiple of nnet.groups, 4"),
        (dict(attention=(3,)), "nnet.attention is (3,); it must name levels in 0..2"),
        (dict(in_chans=0), "nnet.in_chans is 0; it must be at least 1"),
        (dict(img_size=-8), "nnet.img_size is -8; it must be at least 1"),
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
    kinds = dict(down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"])
    kinds |= dict(up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], block_out_channels=[8, 16, 16])
    shape = dict(in_channels=1, out_channels=1, sample_size=8, norm_num_groups=4)
    net = UNet2DModel(**PUBLISHED | kinds | shape)
    net.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    if old:
        state = {first_names(key): value for key, value in weights.read_weights(path).items()}
        assert any("proj_attn" in key for key in state)
        weights.write_weights(state, path)
    model = EarlyExitModel(UNet(**NET), ESTIMATORS["linear"], heads="own")
    assert "ddpm weights" in weights.load_weights(model, path, start=True)
    x, _, time, _ = inputs(3)
    assert torch.equal(model.backbone(x, time), net(x, time).sample)
    with pytest.raises(ValueError, match="no uncertainty estimators"):
        weights.load_weights(EarlyExitModel(UNet(**NET), ESTIMATORS["linear"]), path)
    plain = EarlyExitModel(UNet(**NET), ESTIMATORS["linear"], heads="own")
    assert "fixed layers and schedules use the common one" in weights.load_weights(plain, path, full_depth=True)
    assert torch.equal(plain.backbone(x, time), net(x, time).sample) and not plain.heads
    text = "\n".join(inspect_checkpoint.describe(path))
    assert "nnet.widths = (8, 16, 16)" in text and "nnet.attention = (1,)" in text and "missing: uncertainty" in text


@pytest.mark.parametrize(("key", "value"), [("freq_shift", 0), ("downsample_padding", 1), ("norm_num_groups", 2)])
def test_another_network_with_the_same_tensors_is_refused(key, value, tmp_path):
    """Catches a file that loads without a word and computes something else: these settings leave no trace in it."""
    net = UNet(**NET).net
    net.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    model = EarlyExitModel(UNet(**NET), ESTIMATORS["linear"])
    with pytest.raises(ValueError, match=f"config.json has {key} {value} instead of"):
        weights.load_weights(model, tmp_path / "diffusion_pytorch_model.safetensors", start=True)


@pytest.mark.parametrize("exits", [(2,), (0, 1, 2)])
@pytest.mark.parametrize("uem", [uem for uem in ESTIMATORS if uem != "shared"])
def test_settings_are_read_from_own_files(uem, exits, tmp_path):
    """Catches a trained U-Net that cannot be told from another by its file."""
    model = EarlyExitModel(UNet(**NET, num_classes=4), ESTIMATORS[uem], heads="own", points=exits)
    found = weights.infer(model.state_dict())
    config = base.config("unet")
    config.update_from_flattened_dict(found)
    twin = build_model(config)
    assert found["uem.name"] == uem and found["nnet.num_classes"] == 4 and build_model(config).points == model.points
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    weights.write_weights(model.state_dict(), tmp_path / "own.pth")
    other = EarlyExitModel(UNet(**NET | dict(widths=(8, 16)), num_classes=4), ESTIMATORS[uem], heads="own")
    with pytest.raises(ValueError, match=r"nnet.widths: \(8, 16, 16\) in the file, \(8, 16\) in the config"):
        weights.load_weights(other, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="it is a unet and nnet.name is 'uvit'"):
        weights.load_weights(tiny(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match="holds a U-ViT"):
        weights.export(model.state_dict(), "uvit")
