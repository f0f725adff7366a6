"""Weights that ship: what their export keeps."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_sampler import checkpoint

from libs import Sampler, checkpoints
from libs.data.digits import Digits
from libs.data.fashion_mnist import CLASS_NAMES as FASHION_NAMES
from libs.metrics import Moments, Statistics, build_extractor, features_of, frechet_distance
from libs.sampling.stored import plan_name
from scripts import export_checkpoint
from scripts.inspect_checkpoint import describe

RELEASED = Path(__file__).resolve().parents[1] / "assets" / "released"

PLAN = {
    "points": [1, 2, 3, 4, 5],
    "nnet_path": "/of/the/machine",
    "command": "python /of/the/machine/calibrate.py",
    "plan": {
        "nodes": [1.0, 0.5, 0.001],
        "computed": [True, True],
        "order": 1,
        "lower_order_final": False,
        "layers": [2, 5],
        "max_u": [0.0, 0.0],
    },
}


def test_export_of_a_release(tmp_path):
    """Catches plans and class names that stay behind, a plan taken for another file's, and paths of the machine."""
    step = checkpoint(tmp_path / "2.ckpt", **{"dataset.path": "/of/the/machine"})
    (step / "plan-budget-0.3.json").write_text(json.dumps(PLAN))
    file, other = tmp_path / "small.safetensors", tmp_path / "other.safetensors"
    for output in (file, other):
        export_checkpoint.main([str(step), str(output), "--layout=released"])
    (tmp_path / "other-plan-budget-0.3.json").unlink()
    assert (
        "/of/the/machine"
        not in json.dumps(checkpoints.about(file)) + (tmp_path / "small-plan-budget-0.3.json").read_text()
    )
    assert file.stat().st_size < 0.6 * (step / "nnet_ema.pth").stat().st_size
    sampler = Sampler.load(file, device="cpu")
    images = sampler(3, labels=["owl"] * 3, budget=0.3)
    assert images.depth.tolist() == [[2] * 3, [5] * 3] and images.labels.tolist() == [2] * 3
    exact = Sampler.load(step, device="cpu")(3, labels=[2] * 3, budget=0.3)
    assert (images.pixels.int() - exact.pixels.int()).abs().float().mean() < 1, "float16 is rounding, not other weights"
    with pytest.raises(ValueError, match="budget is 0.3; .* plans for: none"):
        Sampler.load(other, device="cpu")(3, budget=0.3)


def test_an_export_that_knows_no_experiment(tmp_path, capsys):
    """Catches a release that nobody can load, and a suffix that could not hold it."""
    weights = tmp_path / "w.pth"
    weights.write_bytes((checkpoint(tmp_path / "2.ckpt") / "nnet_ema.pth").read_bytes())
    for output, message in (("x.safetensors", "does not say which experiment"), ("x.pth", "must end in .safetensors")):
        with pytest.raises(SystemExit):
            export_checkpoint.main([str(weights), str(tmp_path / output), "--layout=released"])
        assert message in capsys.readouterr().err and not (tmp_path / output).exists()


def digits_statistics(extractor):
    data, moments = Digits(), Moments(extractor.n_features)
    pixels = torch.stack([data.pixels(i) for i in range(len(data))])
    moments.add(torch.from_numpy(features_of(extractor, [pixels])))
    return moments.statistics(extractor)


def fashion_statistics(extractor):
    return Statistics.load(RELEASED / "fashion-reference.npz", extractor)


@pytest.mark.parametrize(
    ("name", "budget", "shape", "statistics", "class_names"),
    [
        ("digits", "0.1", (1, 8, 8), digits_statistics, Digits.class_names),
        ("fashion", "0.1", (1, 32, 32), fashion_statistics, FASHION_NAMES),
    ],
)
def test_released_weights_keep_their_number(name, budget, shape, statistics, class_names):
    """Catches weights, a plan or a sampler that changed since the card in assets/released/README.md was written."""
    row = rf"`{name}\.safetensors` \| budget {budget}, (\d+) images of noise seed 1 \| ([\d.]+) ± ([\d.]+) \|"
    n, wanted, noise = re.search(row, (RELEASED / "README.md").read_text()).groups()
    sampler = Sampler.load(RELEASED / f"{name}.safetensors", device="cpu", precision="no")
    assert sampler.class_names == class_names
    extractor = build_extractor(f"{name}_cnn", shape)
    made = Moments(extractor.n_features)
    pixels = sampler(int(n), seed=1, budget=float(budget)).pixels
    made.add(torch.from_numpy(features_of(extractor, [pixels])))
    distance = frechet_distance(made.statistics(extractor), statistics(extractor))
    assert distance == pytest.approx(float(wanted), abs=float(noise))


@pytest.mark.parametrize("name, experiment", [("digits", "digits_uvit_tiny"), ("fashion", "fashion_uvit_small")])
def test_released_weights_say_what_they_fit(name, experiment):
    """Catches tuples of a config that JSON made lists, which then fit no experiment."""
    assert f"fits: configs/{experiment}.py" in describe(RELEASED / f"{name}.safetensors")


def test_released_files_are_small():
    """Catches a release that makes every clone large: 12 MB in all."""
    assert 0 < sum(path.stat().st_size for path in RELEASED.iterdir()) < 12e6


def test_plans_of_two_weight_files_in_one_folder(tmp_path):
    """Catches the plan of one .pth file that replaces, or serves, the other's."""
    state = checkpoints.read_weights(checkpoint(tmp_path / "2.ckpt"))
    about = checkpoints.about(tmp_path / "2.ckpt")
    for name in ("one", "two"):
        checkpoints.write_weights(state, tmp_path / f"{name}.pth", about)
    (tmp_path / plan_name(tmp_path / "one.pth", "budget-0.3")).write_text(json.dumps(PLAN))
    assert Sampler.load(tmp_path / "one.pth", device="cpu").budgets == (0.3,)
    assert Sampler.load(tmp_path / "two.pth", device="cpu").budgets == ()
    earlier = PLAN | {"nnet_path": "elsewhere/two.pth"}  # the name that files of earlier versions have
    (tmp_path / "plan-budget-0.2.json").write_text(json.dumps(earlier))
    assert Sampler.load(tmp_path / "one.pth", device="cpu").budgets == (0.3,)
    assert Sampler.load(tmp_path / "two.pth", device="cpu").budgets == (0.2,)
