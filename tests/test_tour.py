"""docs/tour.ipynb runs from its first cell to its last."""

import json
import sys
from pathlib import Path

import pytest
from test_configs import load

from libs import regimes, trainer
from libs.analysis import budget
from libs.run import Run

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_tour(tmp_path, monkeypatch):
    """Catches a notebook that went out of date with the functions it shows.

    Its cells run here, one after another: a kernel of its own would be seconds of imports and the same lines.
    """
    config = load("digits_uvit_tiny", "quick")
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    trained, shown = tmp_path / "last.ckpt", []
    for name, value in {"CHECKPOINT": str(trained), "N_MEASURED": "16", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(TOUR.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(budget, "FINE", 8)
    cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {"display": lambda *them: shown.extend(them)}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"cell {number} of the tour", "exec"), names)
    assert len(cells) >= 10 and len(shown) == 4
    assert (tmp_path / "planned.png").is_file() and (trained / "plan-budget-0.12.json").is_file()
