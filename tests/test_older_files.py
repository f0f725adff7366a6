"""Files that the commit 0ceb8f3 wrote, before the rooms of today: training, evaluation, calibration, samples.

`tests/golden/README.md` has the commands that wrote `tests/golden/older`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libs import Sampler, checkpoints, regimes, trainer
from libs.checkpoints import training_state
from libs.evaluation import samples
from libs.evaluation.evaluate import evaluate
from libs.evaluation.timing import time_together
from libs.exits import EXIT_POLICIES, Trace
from libs.report.read import read_evaluations as read_report
from libs.run import Run
from tests.test_configs import load

OLDER = Path(__file__).parent / "golden" / "older"
ALIKE = 1e-5  # relative: another machine adds in another order


@pytest.fixture
def config():
    """As the flags of the recorded commands."""
    config = load("digits_uvit_tiny", "quick")
    config.nnet.update(embed_dim=8, depth=2, num_heads=2)
    config.cpu, config.mixed_precision = True, "no"
    config.sample.update(n_samples=32, sample_steps=4)
    config.eval.seeds, config.eval.thresholds = (1,), (0.5,)
    config.nnet_path = str(OLDER / "4.ckpt")
    return config


def recorded(name: str) -> list[dict]:
    return [json.loads(line) for line in (OLDER / name).read_text().splitlines()]


def test_a_training_goes_on(config, tmp_path):
    """Catches a setting, a state or a name in a checkpoint that a run of today refuses or forgets."""
    (tmp_path / "ckpts").mkdir()
    shutil.copytree(OLDER / "4.ckpt", tmp_path / "ckpts" / "4.ckpt")
    shutil.copy(OLDER / "train.jsonl", tmp_path)
    config.train.update(n_steps=6, save_interval=6, sample_interval=6, eval_interval=0)
    with pytest.raises(ValueError, match="nnet.embed_dim was 8 and is 16"):
        config.nnet.embed_dim = 16
        trainer.fit(config, regimes.of(config), Run.single(tmp_path))
    config.nnet.embed_dim = 8
    trainer.fit(config, regimes.of(config), Run.single(tmp_path))
    assert [path.name for path in training_state.found(tmp_path)] == ["4.ckpt", "6.ckpt"]
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6] and log[:4] == recorded("train.jsonl")
    old, new = (torch.load(tmp_path / f"ckpts/{n}.ckpt/optimizer.pth", weights_only=True) for n in (4, 6))
    assert training_state.one_optimizer(old)["state"].keys() == new["state"].keys()


def test_an_evaluation_finds_the_same_numbers(config, tmp_path):
    """Catches weights of then that give other images now, and a record of then taken for one of today."""
    shutil.copytree(OLDER / "eval", tmp_path, dirs_exist_ok=True)
    lines = {line["slug"]: line for line in evaluate(config, regimes.of(config), Run.single(tmp_path))}
    for old in recorded("eval/results.jsonl"):
        for name in ("fd_pixels", "psnr", "ssim", "mean_depth", "gmacs"):
            assert lines[old["slug"]]["metrics"][name] == pytest.approx(old["metrics"][name], rel=ALIKE), name
        assert lines[old["slug"]]["config_hash"] != old["config_hash"], "it was measured, not believed"


def test_a_report_reads_the_records():
    """Catches results.jsonl of then without a page of now."""
    (found,) = read_report([OLDER / "eval"])
    assert [(p.slug, p.family) for p in found.points] == [("full-depth", "full"), ("threshold-0.5", "threshold")]


@pytest.mark.parametrize("name", ["full-depth", "threshold-0.5"])
def test_a_trace_is_read(name):
    """Catches depths of then that a control (exit.matched_static.path) or an analysis cannot use any more."""
    trace = Trace.load(OLDER / "eval" / "points" / name / "trace.npz")
    assert trace.depth == 3 and trace.used.shape == (4, 1, 32)
    (mean,) = (line["metrics"]["mean_depth"] for line in recorded("eval/results.jsonl") if line["slug"] == name)
    assert trace.used.mean() == pytest.approx(mean)


def test_samples_are_the_same(config, tmp_path):
    """Catches another image for the same seed, or a folder of then that is not gone on with."""
    for name in ("sample.json", "samples.npz"):
        shutil.copy(OLDER / name, tmp_path)
    run = Run.single(tmp_path)
    samples.sample_to_folder(config, regimes.of(config), run, np.arange(4))
    samples.write_npz(tmp_path, range(4))
    with np.load(OLDER / "samples.npz") as old, np.load(tmp_path / "samples.npz") as new:
        assert set(new) == {"arr_0", "arr_1"} > set(old)  # classes came later
        assert np.abs(old["arr_0"].astype(int) - new["arr_0"]).max() <= 1
    assert np.asarray(Image.open(tmp_path / "3.png")).shape == (8, 8)


@pytest.mark.parametrize("name", ["schedule", "calibrated"])
def test_a_calibration_decides(config, name, run):
    """Catches a calibration file of then that is refused, or whose budget is not spent."""
    content = json.loads((OLDER / "calibration.json").read_text())
    sampler = Sampler.open(config, regimes.of(config), run)
    policy = EXIT_POLICIES[name](path=str(OLDER / "calibration.json"))
    (images,) = sampler.images(np.arange(16), seed=7003, plan=sampler.plan(), policy=policy, batch_size=16)
    assert images.depth.shape == (4, 16) and 1 <= images.depth.mean() < 3
    if name == "schedule":
        assert images.depth[:, 0].tolist() == content["schedule"]["layers"]


def test_an_evaluation_is_timed_again(tmp_path):
    """Catches a config of then that lacks a setting of today, and ends in an AttributeError."""
    shutil.copytree(OLDER / "eval", tmp_path, dirs_exist_ok=True)
    then = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(then | {"nnet_path": str(OLDER / "4.ckpt"), "cpu": True}))
    (seconds,) = time_together([tmp_path], 1).values()
    assert set(seconds) == {"full-depth", "threshold-0.5"}


def test_a_checkpoint_still_knows_its_experiment():
    """Catches a config of then that lacks what was added since, and ends in an AttributeError."""
    sampler = Sampler.load(OLDER / "4.ckpt", device="cpu")
    assert sampler(2, seed=0, exit_threshold=0.5, steps=3).depth.shape == (3, 2)
    assert checkpoints.about(OLDER / "4.ckpt")["config"]["nnet"]["embed_dim"] == 8
