"""A run's directory belongs to one process, and signals end it between two items."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_configs import load
from test_killed import Job, ended, start

from configs import base
from libs import Sampler, checkpoints
from libs.models import build_model
from libs.run import Alone, Run, Stopped, Stopping, portable, precision_on

ROOT = Path(__file__).resolve().parents[1]


def test_a_signal_ends_a_job_after_the_item():
    """Catches an item that is torn in the middle, a second signal that tears the clean-up, and a wrong exit code."""
    done, stopping = [], Stopping(speaks=False)
    with pytest.raises(Stopped) as stopped, stopping:
        for item in stopping.between(range(5)):
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(item)
    assert done == [0, 1, 2] and stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers of before are back"


def test_outside_of_items_a_signal_ends_the_job_at_once():
    """Catches a Ctrl-C that waits for a loop which never asks."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGUSR1, 138)):
        with pytest.raises(Stopped) as stopped, Stopping(speaks=False):
            os.kill(os.getpid(), number)
            pytest.fail("the signal was only noted")
        assert stopped.value.code == code


def test_a_directory_is_one_process(tmp_path):
    """Two jobs in one directory would mix their files: the second is refused by name, and a dead one holds nothing."""
    code = f"from libs.run import Run; run = Run.single({str(tmp_path)!r}); print('in', flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
        Run.single(tmp_path)
    first.kill()
    first.wait()
    first.stdin.close()
    first.stdout.close()
    Run.single(tmp_path)


def test_auto_precision_is_what_the_machine_computes(monkeypatch):
    """Catches bf16 on a CPU without instructions for it: the demo took hours instead of minutes."""
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert precision_on(cpu, "auto") == "no" and Alone("cpu", "auto").precision == "no"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision_on(cpu, "auto") == "bf16"
    assert precision_on(cpu, "bf16") == "bf16"  # what was asked for by name is not changed
    with pytest.raises(ValueError, match="fp16, which runs on GPUs only"):
        precision_on(cpu, "fp16")
    with pytest.raises(ValueError, match="'half'; it must be auto, no, bf16 or fp16"):
        precision_on(cpu, "half")


def test_weights_of_a_gpu_run_on_a_cpu(tmp_path, monkeypatch):
    """Catches weights trained in fp16 that neither a command nor Python opens without a GPU, and bf16 in emulation."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load("digits_uvit_tiny", "quick")
    for trained, here in (("fp16", "auto"), ("bf16", "auto"), ("no", "no"), ("", "")):
        known = {"config": config.to_dict() | {"mixed_precision": trained}}
        checkpoints.write_weights(build_model(config).state_dict(), tmp_path / "w.safetensors", known)
        assert base.get_config(str(tmp_path / "w.safetensors")).mixed_precision == here
        found = Sampler.load(tmp_path / "w.safetensors").run.precision
        assert found == precision_on(torch.device("cpu"), here or "no")
    assert portable("fp16", "cuda:1") == "fp16"


@pytest.mark.slow
def test_a_long_job_of_one_process_does_not_end_the_run(tmp_path, monkeypatch):
    """Catches seconds, maps or grids of rank 0 that outlast the group's timeout while the others wait in a barrier.

    Five seconds stand for the ten minutes after which NCCL, left to itself, ends a run.
    """
    monkeypatch.setattr(torch.distributed.distributed_c10d, "default_pg_timeout", timedelta(seconds=5))

    def work(run):
        for wait in (lambda: run.barrier(), lambda: run.gather_list([run.rank])):
            if run.is_main:
                time.sleep(5.5)
            wait()
        assert run.all_sum(torch.ones(1)).item() == 2

    assert ended(start(Job(work), tmp_path / "run", 2)) == [0, 0]
