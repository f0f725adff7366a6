"""The Sampler: images from a checkpoint alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_configs import load

from libs import Sampler, regimes
from libs import checkpoints as weights
from libs.exits import EXIT_POLICIES, looking_back
from libs.models import build_model
from libs.sampling.sampler import exit_settings


def checkpoint(folder, **changes):
    """A <step>.ckpt folder of an untrained network with 3 classes, as a training writes it, with its meta.json."""
    config = load("digits_uvit_tiny", "quick")
    config.nnet.num_classes = 3
    config.update_from_flattened_dict(changes)
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    for key in [key for key in state if key.startswith("uem.") and key.endswith("weight")]:
        state[key] = 3 * torch.randn_like(state[key])  # uncertainties that differ, so that images leave at many exits
    folder.mkdir()
    weights.write_weights(state, folder / "nnet_ema.pth")
    (folder / "meta.json").write_text(json.dumps({"config": config.to_dict(), "class_names": ["cat", "dog", "owl"]}))
    return folder


def plan_beside(folder, budget=0.2, of=""):
    """A plan of scripts.calibrate for the network of `checkpoint`: four steps, the third of them a forecast."""
    plan = {"nodes": [1.0, 0.6, 0.3, 0.1, 0.001], "computed": [True, True, False, True], "order": 1}
    plan |= {"lower_order_final": False, "layers": [2, 3, 5], "max_u": [0.0, 0.0, 0.0]}
    (folder / f"{of}plan-budget-{budget}.json").write_text(json.dumps({"points": [1, 2, 3, 4, 5], "plan": plan}))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("sampler") / "2.ckpt")


def test_six_lines(path, tmp_path, monkeypatch):
    """Catches a Python face that needs a config, a run directory, or loses labels or depths."""
    monkeypatch.chdir(tmp_path)
    sampler = Sampler.load(path, device="cpu")
    images = sampler(16, seed=0, labels=[2] * 16, exit_threshold=0.5, steps=3)
    images.save("three.png")
    assert os.listdir(tmp_path) == ["three.png"], "sampling writes nothing else"
    assert images.depth.shape == (3, 16) and images.labels.tolist() == [2] * 16 and len(images) == 16
    assert len(set(images.depth.ravel().tolist())) > 1, "this threshold must decide something"
    assert Image.open("three.png").size[0] > 8 * 48
    assert sampler(2, labels=["owl", "cat"], steps=1).labels.tolist() == [2, 0]
    assert sampler(2, exit_threshold=1, steps=3).depth.min() == sampler.model.depth


def test_a_budget_keeps_refresh(tmp_path):
    """Catches a budget that leaves sample.refresh out, which the same plan as exit.name=planned has."""
    path = checkpoint(tmp_path / "2.ckpt")
    plan_beside(path)
    sampler = Sampler.load(path, device="cpu")
    assert sampler(2, budget=0.2).depth.max(1).tolist()[:2] == [2, 3]
    sampler.config.sample.refresh = 2
    assert sampler(2, budget=0.2).depth[0].tolist() == [5, 5]
    with pytest.raises(ValueError, match="mini_batch_size is 0"):
        sampler(2, batch_size=0)


def test_an_image_depends_on_seed_and_number_only(path):
    """Catches images that change with their batch, or with how many are made."""
    sampler = Sampler.load(path, device="cpu")
    options = dict(seed=7, exit_threshold=0.5, steps=3)
    many, few = sampler(7, batch_size=3, **options), sampler(2, **options)
    np.testing.assert_array_equal(many.depth[:, :2], few.depth)
    assert (many.pixels[:2].int() - few.pixels.int()).abs().max() <= 1
    assert not torch.equal(sampler(2, **options | {"seed": 8}).pixels, few.pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=0), "n is 0"),
        (dict(n=2, labels=[3]), "labels are .*0..2"),
        (dict(n=2, labels=["dogs"]), "labels=dogs: .*dog"),
        (dict(n=2, labels="12"), "labels are '12'; a list"),
        (dict(n=2, labels=[1.7]), r"labels are \[1.7\]; a list"),
        (dict(n=2, prompts=["a cat"]), "takes no texts"),
        (dict(n=2, exit_threshold=1.5), "exit_threshold is 1.5"),
        (dict(n=2, steps=0), "steps is 0"),
        (dict(n=2, batch_size=-1), "mini_batch_size is -1"),
    ],
)
def test_mistakes(path, options, message):
    """Catches values that are ignored or end in an error of a library."""
    with pytest.raises(ValueError, match=message):
        Sampler.load(path, device="cpu")(**options)


def test_labels_as_text(path):
    """Catches a range of which only the first class is made, and a name whose comma is taken for two classes."""
    sampler = replace(Sampler.load(path, device="cpu"), class_names=("cat, tabby", "dog", "2"))
    told = sampler.told(["0-1", "dog,2", "cat, tabby", np.int64(1)])
    assert told.regime.conditions.chosen == (0, 1, 1, 2, 0, 1)


def test_a_plan_is_sampled_at_its_own_times(path, tmp_path):
    """Catches a planned policy that runs at the times of other steps, or at those of the experiment."""
    plan_beside(tmp_path)
    policy = EXIT_POLICIES["planned"](path=str(tmp_path / "plan-budget-0.2.json"))
    sampler = Sampler.load(path, device="cpu")
    for chosen in (policy, looking_back(policy, refresh=5)):
        assert sampler(2, policy=chosen).trace.t.tolist() == [1.0, 0.6, 0.3, 0.1]
        for other in (dict(steps=3), dict(plan=sampler.plan(3))):
            with pytest.raises(ValueError, match="leave steps and plan out"):
                sampler(2, policy=chosen, **other)
    sampler.config.exit.name, sampler.config.exit.planned.path = "planned", policy.path
    assert sampler(2).depth.mean(1).tolist() == [2, 3, 0, 5]
    with pytest.raises(ValueError, match="leave steps and plan out"):
        sampler(2, steps=3)
    content = json.loads(Path(policy.path).read_text())
    content["plan"]["layers"] = [2, 4, 6]
    (tmp_path / "foreign.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plans layers \[6\]; this model can be left at"):
        sampler(2, policy=EXIT_POLICIES["planned"](path=str(tmp_path / "foreign.json")))


def test_a_checkpoint_without_its_experiment(path, tmp_path):
    """Catches a guess where the file does not say what the network is."""
    other = tmp_path / "weights.pth"
    other.write_bytes((path / "nnet_ema.pth").read_bytes())
    with pytest.raises(ValueError, match=r"weights.pth does not say which experiment"):
        Sampler.load(other)


def test_a_threshold_never_replaces_the_policy():
    """Catches exit_threshold turning a policy without a certainty into another one without a word."""
    config = load("digits_uvit_tiny", "quick")
    config.exit.name = "full"
    assert exit_settings(config.exit, 0.9)[0] == "threshold"
    config.exit.name = "patience"
    assert exit_settings(config.exit, 0.9) == ("patience", dict(config.exit.patience) | {"certainty": 0.9})
    config.exit.name = "power"
    with pytest.raises(ValueError, match="'power', which has no certainty"):
        exit_settings(config.exit, 0.9)


def test_import_is_cheap():
    """Catches `import libs` that loads torch: commands that only read files would wait for it."""
    code = "import sys, libs; assert 'torch' not in sys.modules; libs.Sampler; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_regimes_stay_as_they_are(path):
    """Catches labels of one call that stick to the next."""
    sampler = Sampler.load(path, device="cpu")
    before = sampler.regime
    sampler(1, labels=[1], steps=1)
    assert sampler.regime is before and isinstance(before.conditions, regimes.Labels) and not before.conditions.chosen


def test_diffusers_pipeline(path, tmp_path):
    """Catches a pipeline that loses weights, config, labels or depths on the way to a folder and back."""
    from diffusers import DiffusionPipeline

    from libs.sampling.pipeline import AdaptiveDepthPipeline

    pipe = AdaptiveDepthPipeline.from_pretrained(path, device="cpu")
    assert isinstance(pipe, DiffusionPipeline) and pipe.device.type == "cpu"
    options = dict(class_labels=[2, 0, 1], num_inference_steps=3, exit_threshold=0.5)
    first = pipe(**options, generator=torch.Generator().manual_seed(5))
    assert [image.size for image in first.images] == [(8, 8)] * 3 and first.depth.shape == (3, 3)
    pipe.save_pretrained(tmp_path / "folder")
    again = AdaptiveDepthPipeline.from_pretrained(tmp_path / "folder").to("cpu")
    assert again.sampler.class_names == ("cat", "dog", "owl")
    images, depth = again(**options, generator=torch.Generator().manual_seed(5), output_type="np", return_dict=False)
    np.testing.assert_array_equal(depth, first.depth)
    np.testing.assert_array_equal((images[..., 0] * 255).round(), np.stack([np.asarray(i) for i in first.images]))
    other = pipe(**options, generator=torch.Generator().manual_seed(6)).images
    assert any(np.asarray(a).tolist() != np.asarray(b).tolist() for a, b in zip(other, first.images, strict=True))
    np.testing.assert_array_equal(pipe(**options | {"class_labels": np.array([2, 0, 1])}).depth, pipe(**options).depth)
    with pytest.raises(ValueError, match="n is 0"):
        pipe(num_images=0)
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        pipe(output_type="latent")
    tensors = pipe(**options, generator=torch.Generator().manual_seed(5), output_type="pt").images
    assert tensors.dtype == torch.float32, "as diffusers' own pipelines: (n, C, H, W) in [0, 1]"
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1), images)
    plan_beside(tmp_path / "folder", of="model-")
    again.save_pretrained(tmp_path / "second")
    planned = AdaptiveDepthPipeline.from_pretrained(tmp_path / "second", device="cpu")(num_images=2, budget=0.2)
    assert planned.depth.mean(1).tolist() == [2, 3, 0, 5], "plans travel with the weights"
    with pytest.raises(ValueError, match="beside .* there are plans for: 0.2"):
        again(budget=0.3)
