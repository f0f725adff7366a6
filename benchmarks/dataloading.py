"""How fast training reads latents: shards against one file per image.

    python -m benchmarks.dataloading
    python -m benchmarks.dataloading --cold          # from the disk instead of the system's file cache
    python -m benchmarks.dataloading --cost 100      # also the time of a made-up training step, in milliseconds

Writes synthetic ImageNet features (moments (8, 32, 32) and mirror images) in both layouts to a temporary folder, 2.0 GB
for 20,000 images, and reads them as training does: `libs.data.batches`, shuffled, mirrored at random, by workers
(processes; threads for shards) or, for shards, by none. The layouts take turns; the medians of all rounds are compared.
`np.load` is the npy layout read as U-ViT's public code reads it, by unpickling. The growth is that of a worker's
private memory from the first batch to the last, the worst of all rounds.

Prints a table, and as the last line JSON, which also goes to benchmarks/results.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import save, table
from libs.data import Dataset, batches
from libs.data.features import LatentShards
from libs.data.features_npy import BATCH, LatentFiles, Npy
from libs.data.shards import Sharded, make_index

SHAPE, N_CLASSES = (8, 32, 32), 1000


class LatentFilesUnpickled(LatentFiles):
    """The npy layout, read as public code does."""

    def _read(self, number: int) -> tuple[np.ndarray, int]:
        return np.load(os.path.join(self.path, f"{number}.npy"), allow_pickle=True)


def write(folder: Path, n: int, shard_size: int) -> None:
    """The same synthetic images in both layouts, `folder`/sharded and `folder`/npy."""
    rng = np.random.default_rng(0)
    for layout, size in ((Sharded("<f2"), shard_size), (Npy(), BATCH)):
        out = folder / type(layout).__name__.lower()
        out.mkdir()
        labels, files = rng.integers(0, N_CLASSES, n), []
        for number, start in enumerate(range(0, n, size)):
            rows = range(start, min(start + size, n))
            moments = rng.standard_normal((len(rows), 2, *SHAPE), np.float32).astype(layout.dtype)
            names = layout.names(number, rows, True, None)
            contents = layout.files(moments, labels[start : rows.stop].tolist(), None, None)
            for name, content in zip(names, contents, strict=True):
                (out / name).write_bytes(content)
            files += [{"name": name, "images": len(rows)} for name in names]
        if isinstance(layout, Sharded):
            np.save(out / "labels.npy", labels.astype("<i4"))
            index = make_index(
                n=n,
                n_classes=N_CLASSES,
                shape=SHAPE,
                context=None,
                flips=True,
                dtype=layout.dtype,
                shard_size=size,
                files=files,
                plan={},
            )
            (out / "index.json").write_text(json.dumps(index))


def private_mb(process: int) -> float:
    """Memory of a process that it shares with no other and with no file, in MB; NaN where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    for entry in os.scandir(folder):
        file = os.open(entry.path, os.O_RDONLY)
        os.fsync(file)  # pages not yet written cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure(data: Dataset, *, batch_size: int, workers: int, seed: int, cost: float) -> tuple[float, float]:
    """One epoch, less the first batch, which starts the workers: (images per second, MB that a worker grew by)."""
    stream = batches(data, batch_size=batch_size, seed=seed, flip=True, workers=workers)
    next(stream)
    workers_memory = {child.pid: private_mb(child.pid) for child in multiprocessing.active_children()}
    before = workers_memory or {os.getpid(): private_mb(os.getpid())}
    steps = len(data) // batch_size - 1
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
        time.sleep(cost)
    seconds = time.perf_counter() - start
    return steps * batch_size / seconds, max(private_mb(process) - memory for process, memory in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", metavar="N", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--batch_size", metavar="N", type=int, default=256, help="default: 256")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="default: 5")
    parser.add_argument("--shard_size", metavar="N", type=int, default=2048, help="images per shard; default: 2048")
    parser.add_argument("--cost", metavar="MS", type=float, default=0.0, help="sleep after each batch; default: 0")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each round")
    parser.add_argument("--folder", metavar="DIR", help="where the temporary files go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.images, options.shard_size)
        files = {"path": f"{folder}/npy", "n_classes": N_CLASSES, "read_pickles": True}
        shards, many = LatentShards(path=f"{folder}/sharded"), options.workers
        readers = {
            "sharded, 0 workers": (shards, 0),
            f"sharded, {many} workers": (shards, many),
            f"npy, {many} workers": (LatentFiles(**files), many),
            f"np.load, {many} workers": (LatentFilesUnpickled(**files), many),
        }
        results = {name: [] for name in readers}
        for seed in range(options.rounds):
            for name, (data, workers) in readers.items():
                if options.cold:
                    forget(Path(data.path))
                settings = {"batch_size": options.batch_size, "workers": workers, "cost": options.cost / 1000}
                results[name].append(measure(data, seed=seed, **settings))
    summary, rows = {}, [("layout", "images/s", "lowest", "highest", "growth MB", "speed-up")]
    for name, rounds in results.items():
        speeds, memory = zip(*rounds, strict=True)
        summary[name] = {"images_per_s": statistics.median(speeds), "runs": speeds, "growth_mb": max(memory)}
    for name, row in summary.items():
        row["speed_up"] = row["images_per_s"] / summary[f"np.load, {options.workers} workers"]["images_per_s"]
        numbers = (row["images_per_s"], min(row["runs"]), max(row["runs"]), row["growth_mb"])
        rows.append((name, *(f"{number:.0f}" for number in numbers), row["speed_up"]))
    table(rows)
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "cold")}
    save("dataloading", "cpu", {"cold" if options.cold else "warm": {"layouts": summary, **settings}})


if __name__ == "__main__":
    main()
