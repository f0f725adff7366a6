"""Files that runs made and people edit: calibrations, traces, records, logs, training states, damaged at random."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from libs.checkpoints import training_state
from libs.exits import EXIT_POLICIES, Trace
from libs.report.read import read_evaluations as read_report
from libs.trainer import make_lr_scheduler, make_optimizer
from tests.test_configs import load
from tests.test_readers import campaign

RECORDED = Path(__file__).parent / "golden" / "evaluation"
CALIBRATION = {
    "points": [1, 2, 3, 4, 5, 6, 7],
    "thresholds": {"edges": [0.5], "max_u": [[0.5] * 6, [0.4] * 6]},
    "schedule": {"t": [0.1, 0.9], "layers": [7, 3]},
    "plan": {
        "layers": [3, 7],
        "max_u": [0.0, 0.0],
        "nodes": [1.0, 0.4, 0.001],
        "computed": [True, True],
        "order": 1,
        "lower_order_final": True,
    },
}


def use(name: str):
    """Reads the file as the policy `name` does, and decides one call with it."""

    def read(folder: Path) -> None:
        (path,) = folder.iterdir()
        policy = EXIT_POLICIES[name](path=str(path)).bind(0, np.arange(2)).at_call(0)
        policy.asked(tuple(range(1, 8)))
        policy.start(2, 7, torch.full((2,), 0.3, dtype=torch.float64))

    return read


def trace(folder: Path) -> bytes:
    found = Trace(7, (1, 2))
    for t in (0.9, 0.3):
        found.add(t, np.array([[3, 7]]))
    found.save(folder / "trace.npz", np.arange(2))
    data = (folder / "trace.npz").read_bytes()
    (folder / "trace.npz").unlink()
    return data


def fresh_state() -> training_state.TrainState:
    config, model = load("digits_uvit_tiny", "quick"), tiny(spread=False)
    optimizer = make_optimizer(config.optimizer, model)
    scheduler = make_lr_scheduler(config.lr_scheduler, optimizer, 10)
    return training_state.TrainState(model, tiny(spread=False), optimizer, scheduler, None)


def run_files(folder: Path) -> dict[str, bytes]:
    """A run's newest checkpoint and its log."""
    run = folder / "example"
    run.mkdir()
    meta = {"config": load("digits_uvit_tiny", "quick").to_dict(), "changes": []}
    training_state.save_state(fresh_state(), run, meta, keep=1)
    files = {f"run/{p.relative_to(run)}": p.read_bytes() for p in run.glob("ckpts/0.ckpt/*")}
    return files | {"run/train.jsonl": b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'}


def resume(folder: Path) -> None:
    run = folder / "run"
    training_state.read_meta(run)
    training_state.resume(fresh_state(), run)
    if not (run / "train.jsonl").is_file():  # a named pipe
        training_state.truncate_log(run / "train.jsonl", fresh_state())
    (folder / "copy").mkdir()
    copy = folder / "copy" / "train.jsonl"
    copy.write_bytes((run / "train.jsonl").read_bytes())  # the log is cut in place: that is what it is for
    try:
        training_state.truncate_log(copy, fresh_state())
    finally:
        copy.unlink()
        copy.parent.rmdir()


def results(folder: Path) -> dict[str, bytes]:
    return {f"eval/{p.relative_to(RECORDED)}": p.read_bytes() for p in RECORDED.rglob("*") if p.is_file()}


def examples(folder: Path):
    calibration = json.dumps(CALIBRATION).encode()
    return [
        ({"c.json": calibration}, use("schedule")),
        ({"c.json": calibration}, use("calibrated")),
        ({"c.json": calibration}, use("planned")),
        ({"trace.npz": trace(folder)}, use("matched_static")),
        ({"trace.npz": trace(folder)}, use("matched_random")),
        (run_files(folder), resume),
        (results(folder), lambda folder: read_report([folder / "eval"])),
    ]


def test_damaged_results_are_refused_by_name(tmp_path, monkeypatch):
    """Catches a calibration, a trace, a log or a training state whose damage is a traceback, or is used in silence."""
    campaign(examples(tmp_path), tmp_path, monkeypatch)


@pytest.mark.parametrize("number", range(7))
def test_undamaged_results_are_read(tmp_path, number):
    """Catches examples that are refused for another reason than their damage."""
    files, read = examples(tmp_path)[number]
    for path, data in files.items():
        (tmp_path / "whole" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "whole" / path).write_bytes(data)
    read(tmp_path / "whole")
