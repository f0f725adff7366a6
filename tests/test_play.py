"""scripts.play: the comparison that it shows, and its page."""

import shutil
import sys

import numpy as np
import pytest
from test_sampler import checkpoint, plan_beside

from libs import Sampler
from libs.evaluation.side_by_side import side_by_side
from scripts import play


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = checkpoint(tmp_path_factory.mktemp("play") / "2.ckpt")
    plan_beside(folder)
    return folder


def test_side_by_side(path):
    """Catches two sides of different seeds or classes, a full side that leaves early, seconds of one side only."""
    sampler = Sampler.load(path, device="cpu")
    both = side_by_side(sampler, 4, seed=3, labels=["owl"], exit_threshold=0.5, rounds=1)
    assert both.full.labels.tolist() == both.early.labels.tolist() == [2] * 4
    assert both.full.depth.min() == sampler.model.depth > both.early.depth.mean()
    assert min(both.seconds) > 0 and both.speed_up == both.seconds[0] / both.seconds[1]
    alone = sampler(4, seed=3, labels=["owl"], exit_threshold=0.5)
    np.testing.assert_array_equal(both.early.pixels, alone.pixels)
    never = side_by_side(sampler, 4, seed=3, exit_threshold=1, rounds=1)
    np.testing.assert_array_equal(never.early.pixels, never.full.pixels)
    assert sampler.budgets == (0.2,)
    planned = side_by_side(sampler, 2, budget=0.2, rounds=1).early
    assert planned.depth.mean(1).tolist() == [2, 3, 0, 5], "calls and depths are the plan's"
    for options in ({}, {"budget": 0.2, "exit_threshold": 0.9}):
        with pytest.raises(ValueError, match="give one of them"):
            side_by_side(sampler, 2, **options)


def test_without_gradio(path, monkeypatch, capsys):
    """Catches a traceback where one line should say what to install."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        play.main([f"--nnet_path={path}", "--device=cpu"])
    assert capsys.readouterr().err == "error: scripts.play needs gradio: pip install gradio\n"


@pytest.mark.parametrize("budgets", [True, False])
def test_page(path, tmp_path, budgets):
    """Catches a page that does not build, a slider without its plans, a button that fails."""
    pytest.importorskip("gradio")
    folder = shutil.copytree(path, tmp_path / "2.ckpt")
    if not budgets:
        (folder / "plan-budget-0.2.json").unlink()
    built = play.page(Sampler.load(folder, device="cpu"), n=3)
    sliders = [block for block in built.blocks.values() if type(block).__name__ == "Slider"]
    assert [(s.minimum, s.value) for s in sliders] == [(0.2, 0.2) if budgets else (0.5, 0.98)]
    pressed = next(iter(built.fns.values())).fn
    said, full, depths, early, _ = pressed(0, "dog", sliders[0].value)
    assert ("plan of budget 0.2" in said) == budgets and len(full) == len(early) == 3
    assert [tick.get_text() for tick in depths.axes[0].get_xticklabels()] == ["0\n5.0", "1\n5.0", "2\n5.0"]
