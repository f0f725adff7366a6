"""Weight files: every kind loads by its keys, goes back unchanged, and what does not fit is refused with a reason."""

import argparse
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finished, inputs, tiny, tiny_dit
from test_configs import load as load_config
from test_cost import count_macs

from libs import checkpoints as weights
from libs import regimes, trainer
from libs.build import build, flat
from libs.exits import EXIT_POLICIES
from libs.models import ESTIMATORS, EarlyExitModel, NoEstimator, UViT, build_model
from libs.run import Run
from libs.sampling.sampler import Sampler, load_model
from libs.sampling.stored import make_plan
from scripts import export_checkpoint, inspect_checkpoint
from tests.golden.recipe import golden_weights

GOLDEN = Path(__file__).parent / "golden"
NET = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=4, num_heads=4)
FORMATS = (".pth", ".safetensors")
PROBED = dict(points=range(5), heads="own")  # the replication's form


def model(kind: str, seed=0, **net) -> EarlyExitModel:
    """A small network that a file of this kind can hold."""
    if kind == "dit":
        return tiny_dit(seed=seed, spread=False, **net)
    torch.manual_seed(seed)
    network = UViT(**NET | net)
    if kind == "uva":
        return EarlyExitModel(network, ESTIMATORS["probe"], **PROBED)
    return EarlyExitModel(network, ESTIMATORS["linear"], norm=kind not in ("adadiff", "uvit"))


def file_of(kind: str, path: Path, seed=1, **net) -> Path:
    """A file of this kind as its makers would have written it."""
    state = model(kind, seed, **net).state_dict()
    state = state if kind == "ours" else weights.export(state, kind)
    if kind == "uva" and path.suffix == ".pth":
        state = {
            "model_state_dict": state,
            "optimizer_state_dict": {"state": {0: {"step": torch.ones(()), "lr": 1e-3}}, "param_groups": [{"lr": 1}]},
            "args": argparse.Namespace(n_steps=3, name="x"),
            "train_state": {"step": 7},
        }
        torch.save(state, path)
    else:
        weights.write_weights(state, path)
    return path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# ---- kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["ours", "adadiff", "uva"])
def test_loads_by_its_keys(kind, suffix, tmp_path):
    """Whatever the file is called: catches a kind told by name or suffix, and a certainty taken for an uncertainty."""
    path = file_of(kind, tmp_path / f"weights{suffix}").rename(tmp_path / "weights.bin")
    network, source = model(kind), model(kind, seed=1)
    assert f"({kind} weights) from {path}" in weights.load_weights(network, path)
    assert same(network.state_dict(), source.state_dict())
    x, _, time, _ = inputs(4)
    a, b = network(x, time), source(x, time)
    assert torch.equal(a.out, b.out) and torch.equal(a.u, b.u)


def test_adadiff_certainty_becomes_uncertainty(tmp_path):
    """sigmoid of the file's head is certainty: a head that says certain everywhere must give u near 0."""
    path = file_of("adadiff", tmp_path / "a.pth")
    state = weights.read_weights(path)
    state["lte_classifer.2.lte.bias"] += 9
    weights.write_weights(state, path)
    network = model("adadiff")
    weights.load_weights(network, path)
    x, _, time, _ = inputs(2)
    u = network(x, time).mean_u.mean(1)
    assert u[2] < 0.01 and (u[[0, 1, 3, 4]] > 0.2).all()


def test_a_plain_uvit_runs_at_full_depth(tmp_path):
    """Released baselines: no estimator is needed where nothing is asked, and asking is an error, not a guess."""
    path = file_of("uvit", tmp_path / "u.pth")
    network = model("uvit")
    assert "nothing leaves early" in weights.load_weights(network, path, full_depth=True)
    assert isinstance(network.uem, NoEstimator) and set(network.macs().ask) == {0}
    x, _, time, _ = inputs(2)
    assert torch.equal(network.backbone(x, time), model("uvit", 1).backbone(x, time))
    with pytest.raises(ValueError, match="no uncertainty estimator"):
        network(x, time)
    with pytest.raises(ValueError, match="--pretrained_weight"):
        weights.load_weights(model("uvit"), path)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_fine_tuning_starts_from_a_plain_uvit(heads, tmp_path):
    """Estimators start as initialised, own heads as copies of the loaded head: catches copies of the random one."""
    path = file_of("uvit", tmp_path / "u.pth")
    network = EarlyExitModel(UViT(**NET), ESTIMATORS["time"], heads=heads)
    before = {key: value.clone() for key, value in network.uem.state_dict().items()}
    assert "start fresh" in weights.load_weights(network, path, start=True)
    assert same(before, network.uem.state_dict())
    head = model("uvit", 1).backbone.new_head(1).state_dict()
    assert len(network.heads) == (4 if heads == "own" else 0)
    assert all(same(own.state_dict(), head) for own in network.heads.values())
    x, _, time, _ = inputs(2)
    assert torch.equal(network(x, time).out[-1], model("uvit", 1)(x, time).out[-1])


def test_fine_tuning_from_adadiff_keeps_its_estimators(tmp_path):
    """A file with estimators never starts with fresh ones in silence."""
    path = file_of("adadiff", tmp_path / "a.pth")
    network = model("adadiff")
    weights.load_weights(network, path, start=True)
    assert same(network.uem.state_dict(), model("adadiff", 1).uem.state_dict())
    with pytest.raises(ValueError, match="uem.linear.norm: False in the file, True in the config"):
        weights.load_weights(model("ours"), path, start=True)


def test_fine_tuning_with_another_estimator(tmp_path):
    """Another uem.name than the file's: catches heads or a backbone that start anew with the estimators."""
    trained, network = (EarlyExitModel(UViT(**NET), ESTIMATORS[name], heads="own") for name in ("linear", "attention"))
    weights.write_weights(trained.state_dict(), tmp_path / "w.pth")
    before = {key: value.clone() for key, value in network.uem.state_dict().items()}
    assert "estimator and head tensors start fresh" in weights.load_weights(network, tmp_path / "w.pth", start=True)
    assert same(before, network.uem.state_dict())
    assert same(network.backbone.state_dict(), trained.backbone.state_dict())
    assert same(network.heads.state_dict(), trained.heads.state_dict())
    with pytest.raises(ValueError, match="uem.name: 'linear' in the file, 'attention' in the config"):
        weights.load_weights(network, tmp_path / "w.pth")


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", weights.LAYOUTS)
def test_round_trips_are_exact(layout, suffix, tmp_path):
    """Theirs -> ours -> theirs and ours -> theirs -> ours, to the last bit: catches a lost key, a sign, a dtype."""
    theirs = weights.read_weights(file_of(layout, tmp_path / "theirs.pth"))
    assert same(weights.export(weights.to_ours(theirs), layout), theirs)
    ours = model(layout, seed=2).state_dict()
    weights.write_weights(weights.export(ours, layout), tmp_path / f"x{suffix}")
    back, plain = weights.to_ours(weights.read_weights(tmp_path / f"x{suffix}")), ("uvit", "dit")
    assert same(back, {key: value for key, value in ours.items() if layout not in plain or key.startswith("backbone.")})
    half = {key: value.half() for key, value in theirs.items()}
    assert same(weights.export(weights.to_ours(half), layout), half)


def test_export_command(tmp_path, capsys):
    """From file to file, all layouts in a circle."""
    path = file_of("adadiff", tmp_path / "a.pth")
    export_checkpoint.main([str(path), str(tmp_path / "ours.safetensors"), "--layout=ours"])
    export_checkpoint.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "b.pth"), "--layout=adadiff"])
    assert same(weights.read_weights(path), weights.read_weights(tmp_path / "b.pth"))
    export_checkpoint.main([str(path), str(tmp_path / "u.pth"), "--layout=uvit"])
    assert weights.kind(weights.read_weights(tmp_path / "u.pth")) == "uvit"
    for arguments, message in (
        ([str(path), str(tmp_path / "c.ckpt"), "--layout=uvit"], "must end in .pth"),
        ([str(tmp_path / "u.pth"), str(tmp_path / "c.pth"), "--layout=adadiff"], "one linear map after every layer"),
        ([str(tmp_path / "no.pth"), str(tmp_path / "c.pth"), "--layout=uvit"], "no weight file at"),
    ):
        with pytest.raises(SystemExit):
            export_checkpoint.main(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c.pth").exists()


@pytest.mark.parametrize(
    ("network", "layout", "message"),
    [
        (dict(uem="linear", uem_options={"norm": True}), "adadiff", "uem.norms"),
        (dict(uem="time", uem_options={"norm": False}), "adadiff", "uem.time_maps"),
        (dict(uem="linear", uem_options={"norm": False}, heads="own"), "adadiff", "heads."),
        (dict(uem="linear", uem_options={"norm": False}, points=(2, 4)), "adadiff", "uem.maps.1"),
        (dict(uem="linear", uem_options={"norm": False, "output": "scalar"}), "adadiff", "scalar"),
        (dict(uem="linear", uem_options={"norm": False}), "uva", "probe"),
        (dict(uem="linear"), "ours", "layout is 'ours'"),
    ],
)
def test_export_refuses_what_a_layout_cannot_hold(network, layout, message):
    """Catches an export that silently leaves tensors behind."""
    with pytest.raises(ValueError, match=message):
        weights.export(tiny(**network).state_dict(), layout)


# ---- settings from tensors -----------------------------------------------------------------------------------------

VARIANTS = [
    dict(),
    dict(num_classes=7, in_chans=3, conv=False, qkv_bias=True),
    dict(clip_dim=12, num_clip_token=5, mlp_time_embed=True),
    dict(clip_dim=12, mlp_ratio=2.0, img_size=32, patch_size=4),
    dict(embed_dim=64, depth=2, num_heads=1),
]


@pytest.mark.parametrize("net", VARIANTS)
def test_settings_from_tensors(net):
    """Every setting that shapes a tensor is read back from the tensors, also without their memory."""
    options = NET | net
    with torch.device("meta"):
        state = UViT(**options).state_dict()
    found = weights.infer(state)
    wrong = {key for key, value in options.items() if found.get(f"nnet.{key}", value) != value}
    assert wrong <= {"num_heads"}
    assert not any(key.startswith("uem.") or key in ("nnet.heads", "nnet.points") for key in found)


@pytest.mark.parametrize(
    ("uem", "options"),
    [
        ("linear", {"norm": True, "output": "map"}),
        ("linear", {"norm": False, "output": "scalar"}),
        ("time", {"norm": False, "output": "map"}),
        ("time_bank", {"bins": 7, "norm": False}),
        ("attention", {"hidden": 9}),
        ("ahead", {"hidden": 9}),
        ("probe", {}),
        ("attention_probe", {}),
        ("shared", {}),
    ],
)
@pytest.mark.parametrize(("points", "heads"), [((), "shared"), ((0, 2, 3), "own")])
def test_exit_settings_from_tensors(uem, options, points, heads):
    """Estimator, exits and heads; a file's own settings rebuild a network that it fits."""
    state = EarlyExitModel(UViT(**NET), ESTIMATORS[uem], points=points, heads=heads, **options).state_dict()
    found = weights.infer(state)
    assert (found["uem.name"], found["nnet.heads"]) == (uem, heads)
    assert tuple(found.get("nnet.points", ())) == points
    assert {key: value for key, value in found.items() if key.startswith("uem.") and key != "uem.name"} == {
        f"uem.{uem}.{key}": value for key, value in options.items()
    }


def test_every_estimator_is_inferred():
    """Catches an estimator added to the registry without being known here."""
    marks = test_exit_settings_from_tensors.pytestmark
    tested = {case[0] for mark in marks if mark.args[0] == ("uem", "options") for case in mark.args[1]}
    assert tested == set(ESTIMATORS)


@pytest.mark.parametrize("kind", ["ours", "adadiff", "uva", "uvit"])
def test_inspect_command(kind, tmp_path, capsys):
    """Prints kind, settings, flags that rebuild the network, what is missing, and a cost for every exit."""
    path = file_of(kind, tmp_path / "x.pth")
    inspect_checkpoint.main([str(path)])
    text = capsys.readouterr().out
    assert f"{path}: {kind} weights" in text and "nnet.embed_dim = 32" in text and "(assumed:" in text
    assert ("uncertainty estimators; evaluate at full depth" in text) == (kind == "uvit")
    count = sum(value.numel() for value in weights.to_ours(weights.read_weights(path)).values())
    assert f"{count:,} parameters" in text
    macs = model(kind).macs()
    for k in [*([0] if kind == "uva" else []), 1, 2, 3, 4, 5]:
        assert f"after {k:2d} of 5 layers: {macs.at(k) / 1e9:.4f}" in text
    assert "attention products" in text
    assert ("'--config.nnet.points=(0,1,2,3,4)'" in text) == (kind == "uva")
    assert ("--config.uem.linear.norm=False" in text) == (kind == "adadiff")


def test_inspect_refuses(tmp_path, capsys):
    """A file that lacks tensors is not described as if it were whole."""
    state = weights.export(model("uvit").state_dict(), "uvit")
    del state["in_blocks.1.mlp.fc2.bias"]
    weights.write_weights(state, tmp_path / "x.pth")
    with pytest.raises(SystemExit):
        inspect_checkpoint.main([str(tmp_path / "x.pth")])
    assert "missing: backbone.in_blocks.1.mlp.fc2.bias" in capsys.readouterr().err


# ---- refusals ------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refused(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Bad files, and what the message must say."""
    good, safe = file_of("uvit", tmp_path / "good.pth"), tmp_path / "good.safetensors"
    weights.write_weights(weights.read_weights(good), safe)
    cases = {}

    def case(name: str, content: bytes, message: str):
        path = tmp_path / name
        path.write_bytes(content)
        cases[name] = (path, message)

    def saved(name: str, content, message: str):
        torch.save(content, tmp_path / name)
        cases[name] = (tmp_path / name, message)

    whole, tensors = good.read_bytes(), weights.read_weights(good)
    case("cut.pth", whole[: len(whole) // 2], "truncated")
    case("cut_short.pth", whole[:40], "truncated")
    case("cut.safetensors", safe.read_bytes()[:-100], "truncated")
    case("empty.pth", b"", "empty")
    case("quota.pth", b"<!DOCTYPE html><html>Quota exceeded</html>", "web page")
    case("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer")
    case("notes.txt", b"these are my notes about the weights\n", "no .pth or .safetensors")
    case("image.pth", b"\x89PNG\r\n\x1a\n0000", "no .pth or .safetensors")
    saved("code.pth", {"x": torch.ones(2), "y": Malicious(tmp_path / "ran")}, "could run code")
    saved("module.pth", torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")
    saved("hidden.pth", {"model_state_dict": tensors, "args": Malicious(tmp_path / "ran")}, "could run code")
    saved("list.pth", [torch.ones(2)], "holds a list")
    saved("optimizer.pth", {"state": {}, "param_groups": []}, "state, param_groups")
    saved("lightning.ckpt", {"epoch": 3, "weights": tensors}, "epoch, weights")
    saved("complex.pth", tensors | {"norm.bias": tensors["norm.bias"].to(torch.complex64)}, "norm.bias has .*complex")
    saved("meta.pth", tensors | {"norm.bias": tensors["norm.bias"].to("meta")}, "norm.bias has no values")
    saved("long.pth", {"k" * 1_000_000: 1}, r"holds k{117}\.\.\.,")
    saved("numbers.pth", {3: torch.ones(2)}, "holds 3,")
    saved("none.pth", {}, "nothing")
    saved("other.ckpt", {"encoder.conv_in.weight": torch.ones(2)}, "unknown weights.*encoder.conv_in.weight")
    return cases


def test_bad_files_are_refused(tmp_path):
    """Each message names the file and the reason; no code of a file runs."""
    for path, message in refused(tmp_path).values():
        with pytest.raises(ValueError, match=message) as error:
            weights.load_weights(model("uvit"), path, full_depth=True)
        assert str(path) in str(error.value), "the file's name"
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "code.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the test's file must be able to run code, or it shows nothing"


@pytest.mark.parametrize("wrapper", ["ema", "state_dict", "model", "nested"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_training_states_of_others_load(wrapper, prefix, tmp_path):
    """Catches a file refused, or read without its averaged weights, for what other trainers put around them."""
    tensors = weights.read_weights(file_of("uvit", tmp_path / "plain.pth"))
    named = {prefix + key: value for key, value in tensors.items()}
    other = {prefix + key: value + 1 for key, value in tensors.items()}
    states = {
        "ema": {"model": other, "ema": named, "opt": {}},
        "state_dict": {"epoch": 3, "state_dict": named},
        "model": {"model": named},
        "nested": {"model": {"state_dict": named}, "step": 1},
    }
    torch.save(states[wrapper], tmp_path / "wrapped.pth")
    assert same(weights.read_weights(tmp_path / "wrapped.pth"), tensors)


def test_a_missing_release_names_its_command(tmp_path, monkeypatch):
    """Catches a path that scripts.download knows and an error that does not say so."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="python -m scripts.download cifar10_uvit_small"):
        weights.read_weights("assets/uvit/cifar10_uvit_small.pth")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_config_travels_with_the_weights(suffix, tmp_path):
    """Catches 2 heads on weights trained with 4, or eps read from a network trained for v, sampled without a word."""
    config = load_config("digits_uvit_tiny", "quick")
    path = tmp_path / f"w{suffix}"
    known = {"config": config.to_dict(), "class_names": ["zero", "one"]}
    weights.write_weights(build_model(config).state_dict(), path, known)
    found = weights.about(path)
    assert found["class_names"] == ["zero", "one"] and found["config"]["nnet"]["num_heads"] == 4
    weights.check_config(path, config)
    for key, value, both in (
        ("nnet.num_heads", 2, "nnet.num_heads: 4 in the file, 2 in the config"),
        ("pred", "noise", "pred: 'v' in the file, 'noise' in the config"),
        ("process", "ddpm", "process: 'vp_linear' in the file, 'ddpm' in the config"),
    ):
        other = load_config("digits_uvit_tiny", "quick")
        other.update_from_flattened_dict({key: value, "nnet_path": str(path)})
        with pytest.raises(ValueError, match=both):
            load_model(other, Run.single(tmp_path / "run"))
    config.nnet.attention = "sdpa"  # computed otherwise, the same function
    weights.check_config(path, config)
    weights.write_weights(weights.read_weights(path), path)
    assert weights.about(path) == {} and weights.known(path) == {}


@pytest.mark.parametrize("length", [2**64 - 1, 2**62, 2**40, 20])
def test_a_header_that_lies_about_its_length(length, tmp_path):
    """Catches gigabytes asked for because eight bytes say so."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":1}')
    for read in (weights.read_weights, weights.about):
        with pytest.raises(ValueError, match="x.safetensors"):
            read(path)


def test_a_foreign_file_beside_a_meta_json(tmp_path):
    """Catches another program's meta.json taken for the config of a weight file, and a best.pth without its run's."""
    path = file_of("uvit", tmp_path / "uvit.pth")
    (tmp_path / "meta.json").write_text(json.dumps({"config": {"pred": "v"}}))
    assert weights.about(path) == {}
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"config": {"pred": "x0"}, "command": "train.py"}))
    torch.save(weights.read_weights(path), tmp_path / "best.pth")
    assert weights.about(tmp_path / "best.pth") == {"config": {"pred": "x0"}}


def test_inspect_reads_what_lies_beside(tmp_path, capsys):
    """Catches flags with a guessed number of heads for a checkpoint whose own meta.json has the right one."""
    config = load_config("digits_uvit_tiny")
    folder = tmp_path / "5.ckpt"
    folder.mkdir()
    torch.save(build_model(config).state_dict(), folder / "nnet_ema.pth")
    (folder / "meta.json").write_text(json.dumps({"config": config.to_dict(), "command": "x"}))
    inspect_checkpoint.main([str(folder)])
    text = capsys.readouterr().out
    assert "--config.nnet.num_heads=4" in text and "nnet.num_heads = 4\n" in text and "--config.pred=v" in text


def test_the_replications_arguments_are_read(tmp_path):
    """Catches 1/1000 for a replication trained with plain times."""
    path = file_of("uva", tmp_path / "u.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path)
    content["args"] = argparse.Namespace(normalize_timesteps=False, num_heads=2, name="x")
    torch.save(content, path)
    assert weights.known(path) == {"nnet.time_scale": 1.0, "nnet.num_heads": 2}


def test_adadiff_of_odd_depth_and_networks_without_skips(tmp_path):
    """Catches the head that the public code makes and never runs, and a network whose halves are not joined."""
    path = file_of("adadiff", tmp_path / "odd.pth")
    state = weights.read_weights(path)
    unused = {f"lte_classifer.5.lte.{name}": state[f"lte_classifer.4.lte.{name}"] for name in ("weight", "bias")}
    torch.save(state | unused, path)
    network = model("adadiff")
    weights.load_weights(network, path)
    path = file_of("adadiff", tmp_path / "straight.pth", skip=False)
    assert weights.infer(weights.read_weights(path))["nnet.skip"] is False
    straight = model("adadiff", seed=3, skip=False)
    weights.load_weights(straight, path)
    with pytest.raises(ValueError, match="nnet.skip: False in the file, True in the config"):
        weights.load_weights(network, path)
    x, t, time, cond = inputs(1, model=straight)
    assert count_macs(lambda: straight.backbone(x, time, cond)) == straight.macs().at(straight.depth)


def test_mutated_files_are_refused_by_name(tmp_path):
    """Catches a traceback of torch, safetensors or json, or an error that does not say which of many files is meant.

    MUTATIONS=500 tries as many.
    """
    rng = np.random.default_rng(0)
    originals = [file_of(kind, tmp_path / f"{kind}{suffix}") for kind in ("uvit", "uva") for suffix in FORMATS]
    known = {"config": {"nnet": {"num_heads": 4}}}
    for suffix in FORMATS:
        weights.write_weights(weights.read_weights(originals[0]), tmp_path / f"known{suffix}", known)
    originals += [tmp_path / name for name in ("known.safetensors", "known.pth")]
    for number in range(int(os.environ.get("MUTATIONS", 60))):
        original = originals[number % len(originals)]
        content = bytearray(original.read_bytes())
        at = int(rng.integers(min(len(content), 4000)))  # the structure stands at both ends
        at = at if rng.integers(2) else len(content) - at
        match int(rng.integers(4)):
            case 0:
                content = content[:at]
            case 1:
                content[at : at + 8] = rng.bytes(8)
            case 2:
                content[at:at] = b"[" * 5000
            case 3:
                del content[at : at + 40]
        path = tmp_path / f"mutated{number}" / original.name
        path.parent.mkdir()
        path.write_bytes(content)
        for read in (
            weights.read_weights,
            weights.about,
            weights.known,
            lambda p: weights.load_weights(model("uvit"), p, start=True),
        ):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error) and len(str(error)) < 3000, f"{original.name}: {error}"


def test_a_missing_file_is_named(tmp_path):
    """Also in a checkpoint folder without weights."""
    with pytest.raises(ValueError, match="no weight file at .*no.pth"):
        weights.read_weights(tmp_path / "no.pth")
    with pytest.raises(ValueError, match="nnet_ema.pth"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dim=64), "nnet.embed_dim: 32 in the file, 64 in the config"),
        (dict(depth=6), "nnet.depth: 4 in the file, 6 in the config"),
        (dict(img_size=16), "nnet.img_size: 8 in the file, 16 in the config"),
        (dict(patch_size=4, img_size=16), "nnet.patch_size: 2 in the file, 4 in the config"),
        (dict(num_classes=10), "nnet.num_classes: -1 in the file, 10 in the config"),
        (dict(conv=False), "nnet.conv: True in the file, False in the config"),
        (dict(qkv_bias=True), "nnet.qkv_bias: False in the file, True in the config"),
        (dict(in_chans=3), "nnet.in_chans: 1 in the file, 3 in the config"),
    ],
)
@pytest.mark.parametrize("kind", ["uvit", "adadiff", "uva", "ours"])
def test_a_config_that_contradicts_the_file(kind, change, message, tmp_path):
    """Both sides are shown, and the flags that would fit."""
    path = file_of(kind, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as error:
        weights.load_weights(model(kind, **change), path, full_depth=True)
    key, value = message.split(":")[0], message.split(": ")[1].split()[0]
    assert str(path) in str(error.value) and f"--config.{key}={value}" in str(error.value)


def test_missing_and_unexpected_tensors(tmp_path):
    """Named, and never skipped: catches a load that is not strict."""
    state = weights.read_weights(file_of("adadiff", tmp_path / "a.pth"))
    for name, changed, message in (
        ("less.pth", {k: v for k, v in state.items() if k != "norm.weight"}, "missing: backbone.norm.weight"),
        ("no_head.pth", {k: v for k, v in state.items() if k != "lte_classifer.3.lte.bias"}, "uem.maps.4.bias"),
        ("more.pth", state | {"extra.weight": torch.ones(1)}, "unexpected: backbone.extra.weight"),
        ("shape.pth", state | {"norm.bias": torch.ones(5)}, r"backbone.norm.bias: \(5,\) in the file, \(32,\) in the"),
    ):
        weights.write_weights(changed, tmp_path / name)
        for options in ({}, {"start": True}, {"full_depth": True}):
            with pytest.raises(ValueError, match=message):
                weights.load_weights(model("adadiff"), tmp_path / name, **options)
    probes = weights.read_weights(file_of("uva", tmp_path / "u.pth"))
    for changed, message in (
        ({"matrix.3.q": torch.ones(1)}, "matrix.3.q"),
        ({"matrix.999.classifier.0.weight": torch.ones(1, 32)}, "the batch's first row for all rows"),
        ({"matrix.0, 7.classifier.0.weight": torch.ones(1, 32)}, "the batch's first row for all rows"),
    ):
        weights.write_weights(probes | changed, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            weights.load_weights(model("uva"), tmp_path / "other.pth")


# ---- the published shapes ------------------------------------------------------------------------------------------

PUBLISHED = {
    "uvit_cifar10_small": "cifar10_uvit_small",
    "uvit_imagenet256_large": "imagenet256_uvit_large",
    "uvit_imagenet256_huge": "imagenet256_uvit_huge",
    "uvit_mscoco_small": "mscoco_uvit_small",
    "adadiff_cifar10_small": "cifar10_adadiff_small",
    "adadiff_mscoco_small": "mscoco_adadiff_small",
    "uva_cifar10_mlp": "cifar10_uva_small",
}


def recorded_shapes(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"keys_{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """The released key lists, exactly: catches a config, a key or a shape other than what people have on disk."""
    layout = name.split("_")[0]
    state = {key: torch.empty(shape, device="meta") for key, shape in recorded_shapes(name).items()}
    assert weights.kind(state) == layout
    config = load_config(PUBLISHED[name])
    with torch.device("meta"):
        network = build_model(config)
    written = weights.export(network.state_dict(), layout)
    assert {key: list(value.shape) for key, value in written.items()} == recorded_shapes(name)
    if layout == "uvit":
        network.drop_exits(heads=False)
    weights.check_fit(name, layout, weights.to_ours(state), network.state_dict())
    settings = flat(config.to_dict())
    for key, value in weights.infer(state).items():
        assert settings[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uvit_cifar10_small", "adadiff_cifar10_small", "uva_cifar10_mlp"])
def test_full_size_files(name, tmp_path):
    """44 M parameters in the real layouts, loaded as eval.py does; one image through the config's sampler and exits."""
    path = tmp_path / f"{name}.pth"
    torch.save(golden_weights(recorded_shapes(name)), path)
    config = load_config(PUBLISHED[name])
    config.nnet_path = str(path)
    run = Run.single(tmp_path / "run")
    network, regime = load_model(config, run), regimes.pixels(config)
    layout = name.split("_")[0]
    policy = build(EXIT_POLICIES, config.exit, setting="exit") if layout != "uvit" else EXIT_POLICIES["full"]()
    plan = make_plan(regime.process, config.sample, 1)
    images = Sampler(network, regime, run, pred=config.pred).batch(np.arange(1), plan=plan, policy=policy)
    assert images.pixels.shape == (1, 3, 32, 32) and images.trace.used.shape == (1, 1, 1)
    assert network.macs().at(13) / 1e9 == pytest.approx(12.201, abs=1e-3)
    written = weights.export(network.state_dict(), layout)
    assert same(written, golden_weights(recorded_shapes(name)))


@pytest.mark.slow
def test_public_command_lines(tmp_path):
    """The eval scripts on a file of each kind, with the flags of the public ones; only paths and sizes differ."""
    threshold = ["--exit_threshold=0.92", "--is_train=False"]
    cases = [
        ("eval.py", "uvit", "cifar10_uvit_small", [], ["full"]),
        ("eval.py", "adadiff", "cifar10_adadiff_small", threshold, ["full", "released_batch_mean"]),
        ("eval.py", "uva", "cifar10_uva_small", [], ["full", "threshold"]),
        ("eval_ldm.py", "uvit", "imagenet256_uvit_huge", [], ["full"]),
        ("eval_ldm.py", "adadiff", "imagenet256_adadiff_large", threshold, ["full", "released_batch_mean"]),
        ("eval_t2i_discrete.py", "uvit", "mscoco_uvit_small", [], ["full"]),
        ("eval_t2i_discrete.py", "adadiff", "mscoco_adadiff_small", threshold, ["full", "released_batch_mean"]),
    ]
    for script, kind, name, flags, families in cases:
        config = load_config(name, "quick")
        weights.write_weights(weights.export(build_model(config).state_dict(), kind), tmp_path / f"{name}.pth")
        out, log = tmp_path / name, tmp_path / f"{name}.log"
        line = [script, f"--config=configs/{name}.py:quick", f"--nnet_path={out}.pth", f"--output_path={out}"]
        finished(log, *line, "--config.cpu=True", *flags)
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        # under guidance, free and tied pairs are families of their own
        assert list(dict.fromkeys(line["family"].split(",")[0] for line in lines)) == families
        assert lines[0]["metrics"]["mean_depth"] == 5


def test_thresholds_need_estimators(tmp_path):
    """A plain U-ViT with a threshold asked for: an error, not full depth under another name."""
    config = load_config("cifar10_uvit_small", "quick")
    state = build_model(config).state_dict()
    weights.write_weights(weights.export(state, "uvit"), tmp_path / "u.pth")
    config.nnet_path, config.eval.thresholds = str(tmp_path / "u.pth"), (0.9,)
    with pytest.raises(ValueError, match="no uncertainty estimators"):
        load_model(config, Run.single(tmp_path / "run"))
    config.eval.thresholds = ()
    assert isinstance(load_model(config, Run.single(tmp_path / "run")).uem, NoEstimator)


def test_training_starts_from_weights_of_the_same_meaning(tmp_path):
    """Catches a fine-tuning with 2 heads of weights with 4, which fit tensor by tensor; what is learned may change."""
    config = load_config("digits_uvit_tiny", "quick")
    path = tmp_path / "w.pth"
    weights.write_weights(build_model(config).state_dict(), path, {"config": config.to_dict()})
    config.pretrained_weight, config.pred = str(path), "noise"
    weights.check_config(path, config, start=True)
    config.nnet.num_heads = 2
    with pytest.raises(ValueError, match="num_heads: 4 in the file, 2 in the config\n.*--config.nnet.num_heads=4"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path / "run"))


def test_training_starts_from_a_released_file(tmp_path):
    """--pretrained_weight: the first EMA weights are the file's; catches a copy made before loading."""
    config = load_config("cifar10_uvit_small", "quick")
    state = weights.export(build_model(config).state_dict(), "uvit")
    weights.write_weights(state, tmp_path / "u.pth")
    config.pretrained_weight, config.train.n_steps, config.optimizer.lr = str(tmp_path / "u.pth"), 1, 0.0
    run = Run.single(tmp_path / "run")
    trainer.fit(config, regimes.pixels(config), run)
    assert same(weights.export(weights.read_weights(run.dir / "last.ckpt"), "uvit"), state)
