"""The examples in the docstrings: all of them run as they stand."""

import doctest
import importlib

import pytest
from test_sampler import checkpoint

PUBLIC = [
    "sde",
    "libs.rng",
    "libs.models.early_exit",
    "libs.models.uem",
    "libs.models.uvit",
    "libs.exits.caching",
    "libs.exits.execute",
    "libs.exits.policy",
    "libs.exits.similarity",
    "libs.exits.static",
    "libs.exits.threshold",
    "libs.exits.trace",
    "libs.sampling.denoiser",
    "libs.sampling.grids",
    "libs.sampling.images",
    "libs.sampling.pipeline",
    "libs.sampling.plans",
    "libs.sampling.sampler",
    "libs.evaluation.side_by_side",
    "libs.data.dataset",
    "libs.data.digits",
    "libs.data.images",
    "libs.data.synthetic",
    "libs.metrics.frechet",
    "libs.metrics.kernel",
    "libs.metrics.paired",
    "libs.metrics.prc",
    "libs.report.statistics",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader types: demo/last.ckpt lies there, of the digits' shape and classes."""
    path = tmp_path_factory.mktemp("doctests")
    (path / "demo").mkdir()
    checkpoint(path / "demo" / "last.ckpt", **{"nnet.num_classes": 10})
    return path


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name, folder, monkeypatch):
    """Catches an example that no longer says what happens, and a public module without one."""
    monkeypatch.chdir(folder)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted, f"{name} is public: its docstrings need an example"
    assert not result.failed
