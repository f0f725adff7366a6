"""A run: its directory, its processes, what it prints and what it logs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class Run:
    """Wraps an `Accelerator`; with one process everything below is local."""

    def __init__(self, directory: str | Path, accelerator: Accelerator):
        self.dir, self.accelerator = Path(directory), accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        asked = int(os.environ.get("WORLD_SIZE", 1))
        if asked != self.world:
            raise ValueError(
                f"WORLD_SIZE is {asked} but accelerate started {self.world} process(es): the launcher and accelerate "
                "disagree. On a CPU, launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N, or set "
                "--config.cpu=True"
            )
        if self.is_main:
            make_writable(self.dir)
        self.barrier()
        self.started = time.perf_counter()

    @classmethod
    def single(cls, directory: str | Path) -> Run:
        """One CPU process: for tests and tools."""
        return cls(directory, Accelerator(cpu=True))

    def say(self, text: str) -> None:
        """For people: the main process, on stderr."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def log(self, step: int, **values: float) -> None:
        """One line of train.jsonl, and the trackers."""
        values = {name: float(value) for name, value in values.items()}
        self.append("train.jsonl", {"step": step, "seconds": round(time.perf_counter() - self.started, 3), **values})
        self.accelerator.log(values, step=step)

    def append(self, name: str, record: dict) -> None:
        """One JSON line, complete or absent: written with a single call and flushed."""
        if self.is_main:
            with open(self.dir / name, "a") as file:
                file.write(json.dumps(record) + "\n")

    def write_json(self, name: str, value) -> None:
        if self.is_main:
            part = self.dir / f"{name}.part"
            part.write_text(json.dumps(value, indent=1) + "\n")
            os.replace(part, self.dir / name)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in the tensor's own precision."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows of all processes in rank order; their numbers may differ."""
        return np.concatenate(gather_object([rows])) if self.world > 1 else rows

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def make_writable(directory: Path) -> None:
    """Create `directory`, or say why nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"workdir {directory} cannot be written: {error.strerror}") from error


def say_progress(iterable, total: int, label: str, run: Run, done: int = 0):
    """A progress bar over what is left of `total` items, on the main process's stderr."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 15  # seconds: a log file needs no animation
    return tqdm(
        iterable, total=total, initial=done, desc=label, disable=not run.is_main, file=sys.stderr, mininterval=interval
    )


def describe_machine() -> dict:
    """What a result depends on besides the code: device, threads, versions and commit."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU"
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "accelerate")}
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or "unknown",
    }
