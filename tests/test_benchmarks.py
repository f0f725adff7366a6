"""The benchmarks measure the published networks, and start where optional packages are missing."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, mfu
from libs.models import build_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"tiny": "digits_uvit_deep", "S/2": "cifar10_uvit_small", "L/2": "imagenet256_uvit_large"}


@pytest.mark.parametrize("size", CONFIGS)
def test_networks_are_those_of_the_experiments(size):
    """Catches a benchmark that times another network than the config it is named after."""
    config = importlib.import_module(f"configs.{CONFIGS[size]}").get_config()
    with torch.device("meta"):
        wanted = build_model(config)
        found = common.make_trainable(size, "meta")
    shapes = [{name: p.shape for name, p in model.backbone.named_parameters()} for model in (wanted, found)]
    assert shapes[0] == shapes[1]
    assert found.backbone.blocks[0].attn.num_heads == wanted.backbone.blocks[0].attn.num_heads


@pytest.mark.parametrize("benchmark", ["attention", "compiled"])
def test_a_format_that_is_not_used_is_refused(benchmark, monkeypatch, capsys):
    """Catches results of all number formats under a flag that asks for one."""
    monkeypatch.setattr(sys, "argv", [benchmark, "--dtype=bf16"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{benchmark}").main()
    assert "unrecognized arguments: --dtype=bf16" in capsys.readouterr().err


def test_the_peak_is_checked_before_anything_is_measured(monkeypatch):
    """Catches an hour of benchmarks that ends in a missing PEAK, and a card taken for another of a similar name."""
    assert mfu.peak_of("cpu", "bf16", 2.0) == 2.0
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--peak"):
            mfu.peak_of("cpu", "bf16", wrong)
    with pytest.raises(ValueError, match="PEAK"):
        mfu.peak_of("cpu", "bf16", None)
    for name, peak in (("H100 PCIe", 756), ("H100 80GB HBM3", 989), ("A100-SXM4-80GB", 312), ("L4", 121)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: f"NVIDIA {name}")
        assert mfu.peak_of("cuda", "bf16", None) == peak
    for name in ("L40", "A10G", "H20"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: f"NVIDIA {name}")
        with pytest.raises(ValueError, match=f"the peak of NVIDIA {name} in bf16 is not known"):
            mfu.peak_of("cuda", "bf16", None)


@pytest.mark.parametrize(
    "arguments, says",
    [(["nonsense"], "no part nonsense"), (["--device", "tpu"], "must be cuda or cpu"), ([], "no CUDA device")],
)
def test_gpu_script_refuses_before_work(arguments, says):
    """Catches a script that starts measuring with settings that cannot work."""
    environment = os.environ | {"PYTHON": "false"}  # asked for a CUDA device, it says no
    command = ["bash", "benchmarks/gpu.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr


@pytest.mark.slow
def test_parts_run_without_optional_packages(tmp_path):
    """Catches an import of ml_collections, diffusers, wandb or pytorch-fid on the way to a benchmark or a GPU test."""
    names = ("ml_collections", "diffusers", "wandb", "pytorch_fid", "absl", "gdown")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", "smoke", "--device", "cpu", "mfu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed: ml_collections" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mfu-cpu.json"]
    modules = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.append('tests'); import {', '.join(modules)}, test_gpu, conftest",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
