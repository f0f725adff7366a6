"""Level skipping (Giladi, Meir, Kawar and Elad): what stands in for missing levels, k(t), and dropout that resumes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import inputs, tiny_unet
from test_configs import load
from test_cost import count_macs
from test_depths import ran
from test_exits import check_batch_equals_singles

from libs import checkpoints as weights
from libs import regimes, trainer
from libs.analysis import levels
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.exits.static import layers_at
from libs.models import ESTIMATORS, EarlyExitModel, UNet
from libs.models.unet import MISSING, same_width
from libs.run import Run

ORIGINAL = ("zero", "duplicate", "interpolate")


@pytest.mark.parametrize("missing", MISSING)
def test_bypassed_levels_do_not_run(missing):
    """Catches levels that run for nothing, a middle block that "interpolate" leaves out, work that is not charged."""
    model = tiny_unet(missing=missing, spread=False)
    x, t, time, cond = inputs(1)
    for k in range(1, 5):
        policy = EXIT_POLICIES["fixed"](layer=k)
        blocks = ran(model, lambda policy=policy: run_with_exits(model, policy, x, t, time, cond))
        middle = k == 4 or missing == "interpolate"
        assert blocks == [*[1] * k, *[0] * (4 - k), int(middle), *[0] * (4 - k), *[1] * k], k
        assert count_macs(lambda policy=policy: run_with_exits(model, policy, x, t, time, cond)) == model.macs().at(k)


def test_each_stand_in_is_what_it_says():
    """Catches a stand-in for another level, of another resolution, or with a convolution where none is needed."""
    x, _, time, _ = inputs(2)
    for missing in ORIGINAL:
        model = tiny_unet(
            missing=missing, spread=False
        )  # widths 8, 16, 16, 8: exits 1 and 3 change them, exit 2 does not
        carry, net = model.embed(x, time, None), model.backbone.net
        for k in (1, 2, 3):
            carry = model.layer(k - 1, carry)
            own, kept = model.heads[str(k)], carry.stored(-1)
            found = model.backbone.below(k, carry, own)
            if missing == "zero":
                wanted = torch.zeros(2, model.backbone.widths[k], *kept.shape[2:])
            elif missing == "duplicate":
                wanted = kept if k == 2 else F.conv2d(kept, own.weight, own.bias)
            else:
                small = F.interpolate(kept, size=(1, 1), mode="bicubic")
                assert isinstance(own.enter, torch.nn.Identity) == (kept.shape[1] == 8)
                middle = own.leave(net.mid_block(own.enter(small), carry.stored(0)))
                wanted = F.interpolate(middle, size=kept.shape[2:], mode="bicubic")
            torch.testing.assert_close(found, wanted)
        changed = replace(carry, h=torch.randn_like(carry.h))  # what level 3 would be given
        assert torch.equal(model.head(3, carry), model.head(3, changed)), "only the bridge looks at it"


@pytest.mark.parametrize("missing", ORIGINAL)
def test_batch_equals_single_images(missing):
    """Catches stand-ins made of the features of rows that left."""
    model = tiny_unet("time", missing=missing, spread=False)
    # convolutions sum in another order for another batch size: 2.1e-6 was seen
    used = check_batch_equals_singles(model, EXIT_POLICIES["levels"](c=2.0), 16, tolerance=4e-6)
    assert len(set(used)) >= 3


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("zero", 0),
        ("duplicate", 128 * 256 + 256),
        ("interpolate", 128 * 256 + 256),
        ("bridge", 128 * 256 + 256 + 2 * (256 * 256 + 256)),
    ],
)
def test_parameters_at_the_published_size(missing, extra):
    """Catches convolutions where channels agree already: of DDPM's 128, 256, 256, 256 only the first differs."""
    with torch.device("meta"):
        model = EarlyExitModel(UNet(img_size=32, in_chans=3, missing=missing), ESTIMATORS["linear"], heads="own")
    assert sum(p.numel() for p in model.heads.parameters()) == extra
    assert sum(p.numel() for p in model.backbone.parameters()) == 35_746_307
    found = weights.infer(model.state_dict())
    assert found.get("nnet.missing") == (missing if extra else None)


def test_remaining_work_at_the_published_size():
    """Remaining MACs for k = 0..3 of 4 levels with zeros are 100, 96.5, 85.1, 36.0 %; the average over uniform times
    falls by 20.7, 35.7, 43.2 and 50.5 % at c = 1, 2, 3, 5. Here halving convolutions are charged, at most 0.6 % each.
    """
    with torch.device("meta"):
        macs = UNet(img_size=32, in_chans=3, missing="zero").macs()
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for c, wanted in ((0, 0), (1, 0.207), (2, 0.357), (3, 0.432), (5, 0.505)):
        layers = layers_at(EXIT_POLICIES["levels"](c=float(c)), (1, 2, 3, 4), t)
        saved = 1 - sum(macs.at(int(k)) for k in layers) / len(t) / macs.at(4)
        assert saved == pytest.approx(wanted, abs=7e-3), c


@pytest.mark.parametrize("c", [1, 2, 3, 5])
def test_the_levels_of_a_time(c):
    """Catches a schedule that runs from the other end, and floors on the wrong side: k begins at 1-((4-k)/4)^(1/c)."""
    policy = EXIT_POLICIES["levels"](c=float(c))
    starts = [1 - ((4 - k) / 4) ** (1 / c) for k in (1, 2, 3)]
    t = torch.tensor([0.0, 1.0, *[s + d for s in starts for d in (-1e-6, 1e-6)]], dtype=torch.float64)
    assert layers_at(policy, (1, 2, 3, 4), t).tolist() == [4, 1, 4, 3, 3, 2, 2, 1]
    assert layers_at(EXIT_POLICIES["levels"](c=0.0), (1, 2, 3, 4), t).tolist() == [4] * 8
    if c == 1:  # on the border itself, whatever the rounding
        assert layers_at(policy, (1, 2, 3, 4), torch.tensor([0.25, 0.5, 0.75]).double()).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EXIT_POLICIES["levels"](c=-1.0), "exit.levels.c is -1.0; it must be a number of at least 0"),
        (lambda: tiny_unet(missing="mirror"), "nnet.missing is 'mirror'; it must be one of zero, duplicate"),
        (lambda: tiny_unet(dropout=1.0), "nnet.dropout is 1.0"),
        (lambda: tiny_unet(heads="shared", missing="duplicate"), "nnet.heads is 'shared'; this network needs own"),
    ],
)
def test_bad_settings(make, message):
    """Each error names the setting."""
    with pytest.raises(ValueError, match=message):
        make()


def test_no_convolution_where_channels_agree():
    """Catches random projections put between a pretrained network and its own features."""
    assert isinstance(same_width(8, 8), torch.nn.Identity) and same_width(8, 4).weight.shape == (4, 8, 1, 1)


def test_published_sampling_has_the_larger_variance():
    """Catches eta = 1 in the place of DDPM's own sampling: 4.73 where the report starts from 3.17."""
    assert load("cifar10_levels").sample.ddpm.variance == "beta"


def test_equal_seconds():
    """Catches a rival that is slower than ours, and a win over nobody: cells faster than every plain one."""
    found = {"ours": [2, 4], "ddim": [1, 2], "seconds_per_call": {"matched-c2": 0.4, "control-c0": 1.0}, "cells": {}}
    for eta in levels.PUBLISHED_SAMPLERS:  # seconds 0.8 and 1.6 of ours, 1 and 2 of theirs
        for network, c, fids in (("matched", 2, {2: 1.0, 4: 4.0}), ("control", 0, {1: 5.0, 2: 3.0})):
            found["cells"] |= {f"{network}-c{c}-eta{eta}-{n}": {"fid": fid} for n, fid in fids.items()}
    assert levels.beaten(found) == (4, [f"eta {eta}, 4 steps" for eta in levels.PUBLISHED_SAMPLERS])
    found["cells"]["control-c0-eta0.5-1"]["fid"] = 3.5  # any eta is a rival
    assert levels.beaten(found) == (4, [])


@pytest.mark.long
def test_tables(tmp_path, monkeypatch):
    """Catches networks that cannot be sampled as the tables say, cells that are lost or measured twice."""
    for name in levels.STAND_INS:
        config = load("digits_levels_tiny", "quick").unlock()
        config.nnet.missing, config.train.n_steps = name, 1
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path / name))
    with pytest.raises(ValueError, match="has no plain, control, matched: bash scripts/digits_levels.sh"):
        levels.tables(tmp_path, steps=2, ours=[2], ddim=[1, 2], images=8, runs=1)
    for name in ("plain", "control", "matched"):
        (tmp_path / name).symlink_to(tmp_path / "zero")
    arguments = dict(steps=2, ours=[2], ddim=[1, 2], images=8, runs=1)
    found = levels.tables(tmp_path, **arguments)
    assert len(found["cells"]) == 4 * 5 + 4 * 1 + 4 * 2
    text = levels.markdown(found)
    assert text.count("\n| ") == 5 + 4 + 5 and "better in" in text
    c5, c0 = (found["cells"][f"zero-c{c}-eta{levels.FIRST}-2"]["fid"] for c in (5, 0))
    assert c5 != c0, "levels must be bypassed"
    eta1, ddpm = (found["cells"][f"control-c0-eta{eta}-2"]["fid"] for eta in ("1", "DDPM"))
    assert eta1 != ddpm, "DDPM's larger variance is not eta = 1"
    monkeypatch.setattr(levels, "quality", lambda *_: pytest.fail("a cell is measured again"))
    assert levels.tables(tmp_path, **arguments)["cells"] == found["cells"]


def test_dropout_resumes_and_is_off_in_samples(tmp_path):
    """Catches masks that depend on what ran before, and masks in sampling."""

    def train(directory, *steps):
        config = load("digits_levels_tiny", "quick").unlock()
        config.nnet.dropout = 0.3
        for n_steps in steps:
            config.train.update(n_steps=n_steps, save_interval=1)
            trainer.fit(config, regimes.pixels(config), Run.single(directory))
        return weights.read_weights(directory / "last.ckpt" / "nnet.pth"), config

    (whole, config), (resumed, _) = train(tmp_path / "whole", 3), train(tmp_path / "resumed", 1, 3)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    model = trainer.build_model(config)
    model.load_state_dict(whole)
    x, _, time, _ = inputs(4)
    cond = torch.zeros(4, dtype=torch.long)
    a, b = (model(x, time, cond).out for _ in range(2))
    assert not torch.equal(a, b)
    a, b = (model.eval()(x, time, cond).out for _ in range(2))
    assert torch.equal(a, b)
