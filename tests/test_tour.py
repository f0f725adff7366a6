"""docs/tour.ipynb runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest
from test_configs import load

from libs import regimes, trainer
from libs.run import Run

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The last.ckpt of a training of the digits' quick twin: two steps."""
    workdir = tmp_path_factory.mktemp("tour")
    config = load("digits_uvit_tiny", "quick")
    trainer.fit(config, regimes.pixels(config), Run.single(workdir))
    return workdir / "last.ckpt"


@pytest.mark.slow
def test_tour(trained, tmp_path, monkeypatch):
    """Catches a notebook that went out of date with the functions it shows."""
    monkeypatch.setenv("CHECKPOINT", str(trained))
    monkeypatch.setenv("N_MEASURED", "16")
    monkeypatch.setenv("OUT", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    assert sum(cell.cell_type == "code" for cell in notebook.cells) >= 10
    assert (tmp_path / "planned.png").is_file() and (trained / "plan-budget-0.2.json").is_file()
