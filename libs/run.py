"""A run: its directory, its processes, what it prints and what it logs."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from libs import files

# How long processes wait for one another before the job counts as stuck. NCCL's own 10 minutes would end a run while
# one process computes a reference or its larger share; a process that died is noticed by the launcher at once.
PROCESS_TIMEOUT = InitProcessGroupKwargs(timeout=timedelta(hours=24))
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """The job was told to stop and has; the exit code is 128 + the signal's number (143, 130, 138)."""

    def __init__(self, number: int, note: str = ""):
        super().__init__(128 + number)
        self.note = f"stopped by {signal.Signals(number).name}: {note or 'the same command goes on from here'}"


class Stopping:
    """What SIGTERM, SIGINT and SIGUSR1 do to a job: end it cleanly, after the item at hand where that is asked for.

    The program that owns the process switches it on; everything else is called from its loops:

        with run.stopping:                              # utils.launch does this; the line about the end comes from here
            for batch in run.stopping.between(batches): # a signal inside the body takes effect after it
                keep(work(batch))

    Outside `between` and `deferred` a signal raises `Stopped` where the program stands, as KeyboardInterrupt would, so
    what is written there must be complete or absent (libs/files.py). A second Ctrl-C, a second or more after the first,
    does not wait for the item. Processes stop on their own: an item of `between` may not need the others, who may have
    stopped already. Loops whose steps all processes take together ask `agreed` instead.
    """

    def __init__(self, world: int = 1, speaks: bool = True):
        """`world`: the number of processes that call `agreed`; `speaks`: whether this one prints the line."""
        self.world, self.speaks = world, speaks
        self.signal: int | None = None  # the first that came
        self._held, self._came, self._handlers = 0, 0.0, {}
        self._group = self._asked = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and self.speaks:
            print(error.note, file=sys.stderr, flush=True)

    def _on_signal(self, number: int, frame) -> None:
        impatient = number == signal.SIGINT and self._held and time.monotonic() - self._came > 1
        if self.signal is not None and not impatient:
            return  # launchers and terminals send the same signal twice
        self.signal, self._came = self.signal or number, time.monotonic()
        if not self._held or impatient:
            raise Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal is only noted; it takes effect at the block's end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signal and not self._held:
            raise Stopped(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`: a signal in this block, or one that came before it, takes effect in it."""
        held, self._held = self._held, 0
        try:
            if self.signal:
                raise Stopped(self.signal)
            yield
        except Exception as error:
            if self.signal:  # such as a collective that another process, told before, has left
                raise Stopped(self.signal) from error
            raise
        finally:
            self._held = held

    def between(self, items: Iterable) -> Iterator:
        """The items; a signal takes effect when the body of the loop is done with one."""
        for item in items:
            with self.deferred():
                yield item

    def agreed(self) -> bool:
        """Whether to stop: the same answer in all processes, whichever of them was told, and whenever.

        All processes call it once per step. One process answers at once. Of several, the flags of a step are combined
        (gloo, on the CPU) while the next step runs, so the answer comes one step late and nobody waits for it.
        """
        if self.world == 1:
            return self.signal is not None
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT.timeout)
        before, flag = self._asked, torch.tensor([self.signal or 0])
        maximum = torch.distributed.ReduceOp.MAX
        self._asked = flag, torch.distributed.all_reduce(flag, maximum, group=self._group, async_op=True)
        if before is None:
            return False
        flag, work = before
        work.wait()
        self.signal = int(flag) or self.signal
        return bool(flag)


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
        self.stopping, self.said = Stopping(self.world, speaks=self.is_main), set()
        if self.is_main:
            make_writable(self.dir)
            self.lock = hold(self.dir)
            files.remove_parts(self.dir)  # of a job that was killed
        self.barrier()
        self.started = time.perf_counter()

    @classmethod
    def single(cls, directory: str | Path) -> Run:
        """One CPU process: for tests and tools."""
        return cls(directory, Accelerator(cpu=True))

    def say(self, text: str, once: bool = False) -> None:
        """For people: the main process, on stderr; `once`: not what was said before."""
        if self.is_main and not (once and text in self.said):
            self.said.add(text)
            tqdm.write(text, file=sys.stderr)  # above a progress bar, if there is one
            sys.stderr.flush()

    def log(self, step: int, **values: float) -> None:
        """One line of train.jsonl, seven digits, and the trackers. What is not finite is null: JSON has no infinity."""
        rounded = {name: float(f"{value:.7g}") if math.isfinite(value) else None for name, value in values.items()}
        self.append("train.jsonl", {"step": step, "seconds": round(time.perf_counter() - self.started, 3), **rounded})
        self.accelerator.log({name: value for name, value in rounded.items() if value is not None}, step=step)

    def append(self, name: str, record: dict) -> None:
        """One JSON line, complete or absent: written with a single call and flushed."""
        if self.is_main:
            with open(self.dir / name, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def write_json(self, name: str, value) -> None:
        """A JSON file in the run's directory, complete or absent."""
        if self.is_main:
            files.write_json(self.dir / name, value)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in the tensor's own precision."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows of all processes in rank order; their numbers may differ."""
        return np.concatenate(gather_object([rows])) if self.world > 1 else rows

    def gather_list(self, items: list) -> list:
        """Items of all processes in rank order; some may have none."""
        return gather_object(items) if self.world > 1 else items

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def put(self, tensor: Tensor | None) -> Tensor | None:
        """`tensor` on the device; the host does not wait for the copy, which is fast from page-locked memory."""
        if tensor is None:
            return None
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()  # torch keeps such memory until the copy has read it
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        """The context in which networks run in the chosen precision."""
        return self.accelerator.autocast()

    @property
    def precision(self) -> str:
        """ "no" (float32), "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of matrix products below float32; None for float32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)


def precision_on(device: torch.device, precision: str) -> str:
    """The number format behind a setting: "auto" is "bf16" where the device multiplies in it, else "no" (float32).

    A CPU without such instructions emulates bf16 at a fraction of float32's speed (1/40 was measured).

    Raises:
        ValueError: an unknown format, or fp16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
            native = device.type == "cpu" and any(ask() for ask in asks if ask)
        return "bf16" if native else "no"
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision is {precision!r}; it must be auto, no, bf16 or fp16")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision is fp16, which runs on GPUs only; on a CPU set --config.mixed_precision=auto")
    return precision


def portable(precision: str, device: str | None = None) -> str:
    """What weights of a training in `precision` run in here: "auto" where this machine, or `device`, may lack it."""
    gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return "auto" if precision == "bf16" or (precision == "fp16" and not gpu) else precision


class Alone(Run):
    """One process that writes nothing: no directory, no log, no other processes.

    Args:
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU where there is one.
        precision: "no" (float32), "bf16", "fp16", or "auto" (see `precision_on`).
    """

    rank, world, is_main, dir, accelerator, precision = 0, 1, True, None, None, "no"

    def __init__(self, device: str | torch.device | None = None, precision: str = "no"):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision, self.started = precision_on(self.device, precision), time.perf_counter()
        self.stopping, self.said = Stopping(), set()

    def barrier(self) -> None:
        pass

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None)


def make_writable(directory: Path) -> None:
    """Create `directory`, or say why nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"workdir {directory} cannot be written: {error.strerror}") from error


def hold(directory: Path) -> FileLock:
    """Lock `directory` for this process until it ends, however it ends: two jobs would mix their files.

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(directory / ".lock", timeout=0, is_singleton=True)  # one process may open a directory twice
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{directory} is in use by another process: wait for it to end, or name another directory with --workdir "
            "(training) or --output (everything else)"
        ) from None
    except (OSError, NotImplementedError) as error:
        print(f"note: {directory} cannot be locked ({error}): start no second job there", file=sys.stderr)
    return lock


def say_progress(iterable, total: int, label: str, run: Run, done: int = 0, lines: bool = False):
    """A progress bar over what is left of `total` items, on the main process's stderr.

    `lines`: the loop prints lines of its own, so that a log file, unlike a terminal, needs no bar.
    """
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 15  # seconds: a log file needs no animation
    hidden = not run.is_main or lines and not terminal
    return tqdm(iterable, total=total, initial=done, desc=label, disable=hidden, file=sys.stderr, mininterval=interval)


def set_tf32(on: bool) -> None:
    """Whether GPUs multiply float32 as TF32: matrices, and convolutions, where torch allows it unasked."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def describe_machine() -> dict:
    """What a result depends on besides the code: device, threads, versions and commit."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU"
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "accelerate")}
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),  # "highest", or "high": TF32 on GPUs
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or "unknown",
    }
