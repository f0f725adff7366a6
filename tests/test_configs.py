"""Every experiment file: it builds, its small twin trains and evaluates, and a mistyped setting is refused."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from configs import base
from libs import regimes, trainer
from libs.evaluation import evaluate as evaluator
from libs.models import build_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))


def load(name: str, arg: str = ""):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


# One experiment of each quick twin: some differ in sizes only, which the twin has not.
TWINS = sorted({repr(load(name, "quick")): name for name in reversed(CONFIGS)}.values())


@pytest.mark.parametrize("name", TWINS)
def test_quick_twin(name, run):
    """Catches an experiment that cannot train, save, load, sample or be evaluated."""
    config = load(name, "quick")
    trainer.fit(config, regimes.of(config), run)
    config.nnet_path = str(run.dir / "last.ckpt")
    records = evaluator.evaluate(config, regimes.of(config), run)
    assert records[0]["family"] == "full" and records[0]["metrics"]["mean_depth"] == records[0]["depth"]
    saved = [json.loads(line) for line in (run.dir / "results.jsonl").read_text().splitlines()]
    assert [line["slug"] for line in saved] == [record["slug"] for record in records]


BOTH = [("digits_uvit_tiny", preset) for preset in base.PRESETS]
BOTH += [("digits_unet_tiny", preset) for preset in ("frozen", "small")]  # losses are the same for all networks
BOTH += [("digits_dit_tiny", preset) for preset in ("calm", "frozen", "small")]


@pytest.mark.parametrize(("name", "preset"), BOTH)
def test_preset(name, preset, run):
    """Catches a competitor that cannot be trained or evaluated, or that is the experiment itself."""
    plain, config = load(name, "quick"), load(name, f"quick,{preset}")
    assert plain.to_dict() != config.to_dict()
    trainer.fit(config, regimes.of(config), run)
    config.nnet_path = str(run.dir / "last.ckpt")
    assert evaluator.evaluate(config, regimes.of(config), run)[0]["family"] == "full"


def test_presets_change_what_they_say():
    """Catches a small model of the same size, and a control that still learns from its exits."""
    assert (
        load("cifar10_uvit_small", "small").nnet.depth == 6 and load("digits_uvit_tiny", "small,quick").nnet.depth == 2
    )
    for name in ("cifar10_unet", "digits_unet_tiny", "cifar10_uvit_small", "digits_uvit_tiny"):
        with torch.device("meta"):
            small, full = (build_model(load(name, preset)) for preset in ("small", ""))
        assert 0.4 < small.macs().at(small.depth) / full.macs().at(full.depth) < 0.6
    for preset in ("small", "plain"):
        config = load("cifar10_adadiff_small", preset)
        assert config.loss.lambda_u == config.loss.lambda_layers == 0 and config.exit.name == "full"
    assert load("imagenet64_uvit_mid", "calm").exit.name == "similarity"


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
    for arg in ("quik", "quick,", "small,papre"):
        with pytest.raises(ValueError, match=f"'{arg}'.*quick, paper"):
            load("digits_uvit_tiny", arg)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("process", "vp", "process is 'vp'"),
        ("pred", "epsilon", "epsilon"),
        ("dataset.name", "mnist", "dataset.name is 'mnist'"),
        ("dataset.path", "photos", "dataset.path is 'photos', which dataset.name=synthetic does not take; images, "),
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
        ("nnet.in_chans", -1, "nnet.in_chans is -1; it must be at least 1"),
        ("nnet.mlp_ratio", 0.0, "nnet.mlp_ratio is 0.0; it must be at least"),
        ("nnet.clip_dim", -1, "nnet.clip_dim is -1; it must be at least 0"),
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


# U-ViT's configs and AdaDiff's differences from them. Parameters and GMACs were counted from the released networks.
EM, FAST, PP = ("vp_linear", "euler_maruyama_sde", 1000), ("vp_linear", "dpm_solver", 50), ("sd", "dpm_solver_pp", 50)
B = (0.99, 0.99)
RECIPES = {
    # parameters, GMACs, steps, batch, lr, betas, warm-up, (process, solver, NFE), images, guidance, dropped conditions
    "cifar10_uvit_small": (44_255_328, 12.201, 500_000, 128, 2e-4, (0.99, 0.999), 2_500, *EM, 50_000, 0, 0),
    "celeba64_uvit_small": (44_292_228, 12.211, 500_000, 128, 2e-4, B, 5_000, *EM, 50_000, 0, 0),
    "imagenet64_uvit_mid": (130_940_292, 35.236, 300_000, 1024, 3e-4, B, 5_000, *FAST, 50_000, 0, 0),
    "imagenet64_uvit_large": (286_827_652, 76.473, 300_000, 1024, 3e-4, B, 5_000, *FAST, 50_000, 0, 0),
    "imagenet256_uvit_large": (286_763_172, 76.456, 300_000, 1024, 2e-4, B, 5_000, *FAST, 50_000, 0.4, 0.15),
    "imagenet256_uvit_huge": (500_832_016, 133.197, 500_000, 1024, 2e-4, B, 5_000, *PP, 50_000, 0.4, 0.1),
    "imagenet512_uvit_large": (286_861_524, 76.482, 500_000, 1024, 2e-4, B, 5_000, *FAST, 50_000, 0.7, 0.15),
    "imagenet512_uvit_huge": (500_942_656, 133.225, 500_000, 1024, 2e-4, B, 5_000, *PP, 50_000, 0.7, 0.1),
    "mscoco_uvit_small": (44_692_644, 16.230, 1_000_000, 256, 2e-4, (0.9, 0.9), 5_000, *PP, 30_000, 1.0, 0.1),
    "mscoco_uvit_small_deep": (58_345_636, 21.240, 1_000_000, 256, 2e-4, (0.9, 0.9), 5_000, *PP, 30_000, 1.0, 0.1),
    "cifar10_adadiff_small": (44_255_328, 12.201, 200_000, 512, 4e-4, (0.99, 0.999), 2_500, *EM, 50_000, 0, 0),
    "celeba64_adadiff_small": (44_292_228, 12.211, 200_000, 1024, 8e-4, B, 5_000, *EM, 50_000, 0, 0),
    "imagenet256_adadiff_large": (286_763_172, 76.456, 300_000, 1024, 2e-4, B, 5_000, *FAST, 50_000, 0.4, 0.15),
    "mscoco_adadiff_small": (44_692_644, 16.230, 1_000_000, 256, 2e-4, (0.9, 0.9), 5_000, *PP, 50_000, 1.0, 0.1),
}


OTHERS = {"digits_uvit_tiny", "digits_unet_tiny", "digits_dit_tiny", "cifar10_unet", "cifar10_uva_small"}
OTHERS |= {"digits_uvit_deep", "digits_levels_tiny", "cifar10_levels"}
OTHERS |= {"fashion_uvit_small", "cifar10_uvit_tiny", "images_uvit_tiny"}
DIT_RECIPES = {
    # parameters (the public codes', without memory), published Gflops (multiply-adds), steps, process, pred, sampler
    "imagenet256_dit_xl": (675_129_632, 118.64, 7_000_000, "ddpm", "noise", "ddpm"),
    "imagenet512_dit_xl": (676_014_368, 524.60, 3_000_000, "ddpm", "noise", "ddpm"),
    "imagenet256_sit_xl": (675_129_632, 118.64, 7_000_000, "flow", "velocity", "euler_maruyama_ode"),
}


@pytest.mark.parametrize("name", DIT_RECIPES)
def test_published_dit_experiments(name):
    """Catches settings that drifted from the released recipe, and a network that is not the released one."""
    c = load(name)
    with torch.device("meta"):
        model = build_model(c)
    parameters, gmacs, *recipe = DIT_RECIPES[name]
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == parameters
    assert model.macs().at(model.depth) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert [c.train.n_steps, c.process, c.pred, c.sample.algorithm] == recipe
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.train.batch_size, c.train.ema_rate) == (1e-4, 0, 256, 0.9999)
    assert (c.sample.scale, c.sample.guided_channels, c.sample.sample_steps, c.dataset.p_uncond) == (0.5, 3, 250, 0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_published_experiments(name):
    """Catches settings that drifted from the released recipe, and a network that is not the released one."""
    c = load(name)
    with torch.device("meta"):
        model = build_model(c)
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    gmacs = model.macs().at(model.depth) / 1e9
    train, rate, sample = c.train, c.optimizer, c.sample
    found = (train.n_steps, train.batch_size, rate.lr, tuple(rate.betas), c.lr_scheduler.warmup_steps, c.process)
    found += (sample.algorithm, sample.sample_steps, sample.n_samples, sample.scale, c.dataset.p_uncond)
    assert (parameters, *found) == (RECIPES[name][0], *RECIPES[name][2:])
    assert gmacs == pytest.approx(RECIPES[name][1], abs=2e-3)  # theirs decodes the text tokens too
    assert (c.optimizer.weight_decay, c.train.ema_rate, c.lr_scheduler.name) == (0.03, 0.9999, "customized")
    assert c.pred == "noise" and c.seed == 1234
    if "adadiff" in name:
        assert c.uem.name == "linear" and not c.uem.linear.norm and c.nnet.heads == "shared"
        assert c.exit.name == "released_batch_mean" and c.train.save_interval >= 5_000


def test_every_experiment_has_a_recipe():
    """Catches a published experiment that the table above forgets."""
    assert set(CONFIGS) - set(RECIPES) - set(DIT_RECIPES) == OTHERS


@pytest.mark.parametrize(
    ("name", "channels", "size", "steps"),
    [("fashion_uvit_small", 1, (3, 128), 4_400), ("cifar10_uvit_tiny", 3, (3, 128), 4_000)],
)
def test_small_experiments_with_classes(name, channels, size, steps):
    """Catches a network whose classes are not the data's and one for none, and a training that takes longer than said:
    140 images a second on one core."""
    c = load(name)
    with torch.device("meta"):
        model = build_model(c)
    assert (model.depth, c.nnet.embed_dim, c.nnet.patch_size, c.nnet.in_chans) == (*size, 4, channels)
    assert regimes.of(c).conditions.n_classes == 10 and c.dataset.p_uncond == 0.1 and c.mixed_precision == "auto"
    assert c.train.n_steps == steps and c.optimizer.name == "muon" and c.dataset.random_flip == (channels == 3)
    assert c.train.n_steps * c.train.batch_size / 140 < 75 * 60


def test_latents_are_scaled_as_published():
    """Catches MS-COCO decoded with ImageNet's factor, as the public sampling script does, and a wrong autoencoder."""
    for name in CONFIGS:
        if load(name).regime != "pixels":
            autoencoder = load(name).autoencoder
            assert autoencoder.scale == (0.23010 if "mscoco" in name else 0.18215)
            assert autoencoder.path.endswith("_kl_ema.pth" if name.endswith(("huge", "_xl")) else "_kl.pth")
