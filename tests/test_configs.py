"""Every experiment file: it builds, its small twin trains and evaluates, and a mistyped setting is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from libs import evaluator, regimes, trainer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))


def load(name: str, arg: str = ""):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


@pytest.mark.parametrize("name", CONFIGS)
def test_quick_twin(name, run):
    """Catches an experiment that cannot train, save, load, sample or be evaluated."""
    config = load(name, "quick")
    trainer.fit(config, regimes.pixels(config), run)
    config.nnet_path = str(run.dir / "last.ckpt")
    records = evaluator.evaluate(config, regimes.pixels(config), run)
    assert records[0]["family"] == "full" and records[0]["metrics"]["mean_depth"] == records[0]["depth"]
    saved = [json.loads(line) for line in (run.dir / "results.jsonl").read_text().splitlines()]
    assert [line["slug"] for line in saved] == [record["slug"] for record in records]


@pytest.mark.parametrize("name", CONFIGS)
def test_has_shell_scripts(name):
    """Catches an experiment that cannot be started from scripts/."""
    text = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    assert f"configs/{name}.py" in text or f"configs/{name}.py" in (ROOT / "configs" / f"{name}.py").read_text()


def test_unknown_settings_are_refused():
    """Catches a config that takes a typing error for a new setting."""
    config = load("digits_uvit_tiny")
    with pytest.raises(AttributeError):
        config.train.batchsize = 3
    with pytest.raises(ValueError, match="quick"):
        load("digits_uvit_tiny", "quik")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("process", "vp", "process is 'vp'"),
        ("pred", "epsilon", "epsilon"),
        ("dataset.name", "mnist", "dataset.name is 'mnist'"),
        ("dataset.p_uncond", 1.5, "dataset.p_uncond is 1.5"),
        ("dataset.p_uncond", 0.1, "nnet.num_classes"),
        ("exit.name", "treshold", "exit.name is 'treshold'"),
        ("uem.name", "cubic", "uem.name is 'cubic'"),
        ("uem.linear.output", "vector", "vector"),
        ("sample.algorithm", "euler", "sample.algorithm is 'euler'"),
        ("sample.sample_steps", 0, "steps"),
        ("sample.mini_batch_size", 0, "sample.mini_batch_size is 0"),
        ("optimizer.name", "sgd", "optimizer.name is 'sgd'"),
        ("lr_scheduler.name", "step", "lr_scheduler.name is 'step'"),
        ("nnet.depth", 5, "nnet.depth is 5"),
        ("nnet.patch_size", 3, "nnet.patch_size 3"),
        ("nnet.num_heads", 5, "nnet.num_heads 5"),
        ("nnet.heads", "private", "nnet.heads is 'private'"),
        ("nnet.points", (3, 2), "nnet.points is"),
        ("nnet.img_size", 16, "nnet.img_size"),
        ("train.accumulate", 3, "train.batch_size 8"),
        ("loss.target", "gap", "loss.target is 'gap'"),
        ("eval.extractor", "vgg", "vgg"),
        ("eval.fixed", (9,), "exit.fixed.layer is 9"),
    ],
)
def test_bad_values_are_named(setting, value, message, run):
    """Each message names the setting and the value; nothing is silently replaced."""
    config = load("digits_uvit_tiny", "quick")
    node = config
    *path, last = setting.split(".")
    for key in path:
        node = node[key]
    node[last] = value
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        trainer.fit(config, regimes.pixels(config), run)
        config.nnet_path = str(run.dir / "last.ckpt")
        evaluator.evaluate(config, regimes.pixels(config), run)


def test_cifar10_is_the_published_experiment():
    """Catches settings that drifted from the released recipe."""
    c = load("cifar10_uvit_small")
    assert (c.nnet.embed_dim, c.nnet.depth, c.nnet.num_heads, c.nnet.patch_size) == (512, 12, 8, 2)
    assert (c.train.n_steps, c.train.batch_size, c.train.ema_rate) == (500_000, 128, 0.9999)
    assert (c.optimizer.lr, c.optimizer.betas, c.optimizer.weight_decay) == (2e-4, (0.99, 0.999), 0.03)
    assert (c.sample.algorithm, c.sample.sample_steps, c.sample.n_samples) == ("euler_maruyama_sde", 1000, 50_000)
