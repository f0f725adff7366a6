"""Items read ahead by worker processes, in order, with errors that a person can act on."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from libs import rng

SHARED = "/dev/shm"  # where worker processes hand over their tensors
AHEAD = 2  # items that each worker keeps ready
WORKER_TIMEOUT = 300.0  # seconds without an item from any worker: a stuck disk, or a hand-over that failed
WORKER_REMEDY = (
    "set --config.dataset.workers=0 (or --workers 0) or a smaller number; give more shared memory (docker run "
    "--shm-size=8g) or file descriptors (ulimit -n 65536); or look whether the disk answers"
)


def read_in_workers(
    read: Callable[[Any], Any], rows: Iterable, workers: int, *, item_bytes: int = 0, seed: int = 0
) -> Iterator:
    """read(row) of every row, in the order of the rows.

    Args:
        workers: processes that read ahead; 0 reads in this one.
        item_bytes: of the tensors of one item, to see at once whether shared memory suffices.
        seed: of the workers' random numbers; nothing here draws from the global generator.

    Raises:
        ValueError: at the call, shared memory does not suffice. While reading, what `read` raised, with its own message
            alone; a worker died, or none has answered for `WORKER_TIMEOUT` seconds.
    """
    if not workers:
        return map(read, rows)
    free = free_bytes(SHARED)
    if free is not None and free < (needed := AHEAD * workers * item_bytes):
        raise ValueError(
            f"{workers} worker processes would keep {needed / 1e6:.0f} MB of batches ready in {SHARED}, which has "
            f"{free / 1e6:.0f} MB free: {WORKER_REMEDY}."
        )
    loader = DataLoader(
        _Items(read),
        sampler=rows,
        batch_size=None,  # one item is one row, read by one worker
        num_workers=workers,
        prefetch_factor=AHEAD,
        timeout=WORKER_TIMEOUT,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        generator=rng.stream(seed, "workers"),  # else starting the workers would draw from the global generator
    )
    return _checked(loader, workers)


def _checked(loader: DataLoader, workers: int) -> Iterator:
    items = None
    while True:
        try:
            items = iter(loader) if items is None else items
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:  # torch: a time-out, a dead worker, no more file descriptors
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Reading data with {workers} worker processes failed ({reason}): {WORKER_REMEDY}."
            ) from error
        if isinstance(item, Failure):
            raise ValueError(item.text)
        yield item


class Failure:
    """An error on its way out of a worker: torch would wrap its message in a traceback."""

    def __init__(self, text: str):
        self.text = text


class _Items:
    """What a DataLoader can index: the rows themselves."""

    def __init__(self, read: Callable[[Any], Any]):
        self.read = read

    def __getitem__(self, row):
        try:
            return self.read(row)
        except (ValueError, OSError) as error:
            return Failure(str(error))


def leave_signals_to_the_parent(worker: int) -> None:
    """A terminal or a scheduler signals all processes of a job; workers go on until their parent ends them.

    The second SIGTERM ends a worker: the first may be the scheduler's, then comes the parent's.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def told(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, told)


def free_bytes(folder: str) -> int | None:
    """Free space of the file system of `folder`; None where there is no such folder."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
