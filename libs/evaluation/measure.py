"""Quality, fidelity and cost of one point, over the selection seed and the reported seeds."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from libs.evaluation.records import finite, images_key, point_key
from libs.evaluation.reference import more_metrics, open_reference
from libs.evaluation.sweep import Point
from libs.exits import Trace
from libs.files import atomic_write, read_json, write_file
from libs.metrics.cost import macs_per_image
from libs.metrics.extractors import Extractor, build_extractor
from libs.metrics.frechet import Frechet, Statistics
from libs.metrics.paired import Paired
from libs.run import Run
from libs.sampling.images import Images, save_grid, save_png
from libs.sampling.sampler import Sampler

TRACED = 4096  # images whose depths are kept
GRID_IMAGES = 64  # images of a point's grid


@dataclass(frozen=True)
class Bench:
    """What all points are measured with."""

    run: Run
    config: object
    extractor: Extractor
    reference: Statistics
    more: Callable[[int], list]  # seed -> the metrics of eval.metrics

    @classmethod
    def open(cls, sampler: Sampler) -> Bench:
        """Everything that any point will need, so that what is missing is found before the first image."""
        config, regime, run = sampler.config, sampler.regime, sampler.run
        extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
        more = more_metrics(config, regime, extractor, run)
        regime.conditions.for_ids(config.eval.selection_seed, np.arange(1))  # opens captions or the text encoder
        return cls(run, config, extractor, open_reference(config, regime, extractor, run), more)

    @property
    def quality_key(self) -> str:
        return Frechet.key_of(self.extractor)

    def key(self, point: Point) -> str:
        """Identifies what the result of `point` depends on."""
        real = self.reference
        described = repr((real.extractor, real.preprocessing, real.resolution, real.n)).encode()
        digest = hashlib.sha256(described + real.mu.round(6).tobytes() + self.config.eval.real.encode())
        return point_key(point, digest.hexdigest())

    def sample(self, point: Point, seed: int, metrics: Sequence, keep: int = 0) -> list[Images]:
        """Sample this process's share once; the batches come back with the pixels of ids below `keep` alone."""
        ids, sampling = np.arange(self.config.sample.n_samples), self.config.sample
        folder = image_folder(self.config, point, seed)
        parts = []
        for images in point.images(ids, seed=seed, batch_size=sampling.mini_batch_size, inflight=sampling.inflight):
            for metric in metrics:
                metric.update(images)
            if folder:
                for i, pixels in zip(images.ids, images.pixels, strict=True):
                    save_png(folder / f"{i}.png", pixels)
            pixels = images.pixels[torch.from_numpy(images.ids < keep)].clone()
            parts.append(Images(pixels, images.ids, images.labels, images.trace))
        return parts

    def distance(self, frechet: Frechet, point: Point, seed: int) -> float:
        value = frechet.compute(self.run)[self.quality_key]
        if not math.isfinite(value):
            raise ValueError(f"{self.quality_key} of {point.label}, noise seed {seed}, is {value}: no finite number")
        return value


def image_folder(config, point: Point, seed: int) -> Path | None:
    """Where `sample.path` keeps the images of a point and a noise seed; None where they are not kept."""
    path = config.sample.path
    return Path(path) / point.slug / f"seed-{seed}" if path else None


class FullDepth:
    """The full-depth images of the first reported seed that the other points are compared with (PSNR, SSIM).

    Kept as a file per batch, so that an interrupted evaluation goes on with any number of processes; a file that is
    lost or damaged is made again.
    """

    def __init__(self, point: Point, folder: Path, key: str):
        config = point.sampler.config
        self.point, self.folder, self.key = point, folder, key
        self.seed, self.n = config.eval.seeds[0], min(config.eval.paired, config.sample.n_samples)

    def path(self, ids: np.ndarray) -> Path:
        return self.folder / f"baseline-{self.key}-{ids[0]}.npz"

    def keep(self, images: Images) -> None:
        if len(images.pixels):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path(images.ids)) as file:
                np.savez_compressed(file, pixels=images.pixels.numpy(), ids=images.ids[: len(images.pixels)])

    def of(self, ids: np.ndarray) -> torch.Tensor:
        """(m, C, H, W) uint8 of the images of a batch `ids` that are compared."""
        wanted = ids[ids < self.n]
        try:
            with np.load(self.path(ids)) as data:
                pixels = torch.from_numpy(data["pixels"])
                if np.array_equal(data["ids"], wanted) and pixels.dtype == torch.uint8:
                    return pixels
        except Exception:  # absent, or damaged in one of many ways: the images can be made again
            pass
        images = self.point.sampler.batch(ids, seed=self.seed, plan=self.point.plan, policy=self.point.policy)
        images.pixels = images.pixels[: len(wanted)]
        self.keep(images)
        return images.pixels

    def fidelity(self, parts: Sequence[Images], run: Run) -> dict[str, float | None]:
        """PSNR and SSIM of another point's batches, over the first `eval.paired` images."""
        if not self.n:
            return {"psnr": None, "ssim": None}
        parts = [part for part in parts if len(part.pixels)]
        base = [self.of(part.ids) for part in parts]
        ids = [part.ids[: len(part.pixels)] for part in parts]
        pixels = torch.cat(base) if base else torch.zeros(0)  # a process may have none of these images
        paired = Paired(Images(pixels, np.concatenate([np.zeros(0, int), *ids]), None, Trace(0)))
        for part, own in zip(parts, ids, strict=True):
            paired.update(Images(part.pixels, own, None, part.trace))
        return paired.compute(run)


def measure_point(point: Point, bench: Bench, full: FullDepth, folder: Path) -> dict:
    """The point's result, measured or, where an earlier evaluation finished it, read."""
    key, run = bench.key(point), bench.run
    done = finished(point, bench, folder, key)
    run.barrier()  # nobody may write while others still look
    if done:
        return done
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for images in image_folders(point):
            images.mkdir(parents=True, exist_ok=True)
            write_file(owner(images), images_key(point))
    run.barrier()
    config = bench.config
    frechet = Frechet(bench.extractor, bench.reference)
    bench.sample(point, config.eval.selection_seed, [frechet])
    result: dict = {"key": key, "quality_key": bench.quality_key}
    result["selection"] = bench.distance(frechet, point, config.eval.selection_seed)

    distances, depths, costs, others = [], [], [], []
    for number, seed in enumerate(config.eval.seeds):
        frechet, more = Frechet(bench.extractor, bench.reference), bench.more(seed)
        keep = max(full.n, GRID_IMAGES) if number == 0 else 0
        parts = bench.sample(point, seed, [frechet, *more], keep)
        distances.append(bench.distance(frechet, point, seed))
        others.append({name: value for metric in more for name, value in metric.compute(run).items()})
        depth, gmacs = spent(parts, point, run)
        depths.append(depth)
        costs.append(gmacs)
        if number == 0:
            keep_examples(parts, folder, run)
            result |= compare(parts, point, full, run)
    result["per_seed"] = distances
    result["more"] = {name: finite(statistics.fmean(found[name] for found in others)) for name in others[0]}
    result["mean_depth"], result["gmacs"] = statistics.fmean(depths), statistics.fmean(costs)
    run.write_json(str((folder / "quality.json").relative_to(run.dir)), result)
    run.barrier()
    return result


def finished(point: Point, bench: Bench, folder: Path, key: str) -> dict | None:
    """What an earlier evaluation measured of this very point, unless it is damaged or lacks images."""
    path = folder / "quality.json"
    if not path.exists():
        return None
    try:
        found = read_json(path, "the kept result of a point")
    except ValueError as error:
        bench.run.say(f"note: {error}; the point is measured again")
        return None
    wanted = {"quality_key", "selection", "per_seed", "psnr", "ssim", "more", "mean_depth", "gmacs"}
    if found.get("key") != key or not wanted <= found.keys():
        return None
    for kept in image_folders(point):
        if not all((kept / f"{i}.png").exists() for i in range(bench.config.sample.n_samples)):
            return None
    return found


def image_folders(point: Point) -> list[Path]:
    config = point.sampler.config
    seeds = (config.eval.selection_seed, *config.eval.seeds)
    return [folder for seed in seeds if (folder := image_folder(config, point, seed))]


def owner(folder: Path) -> Path:
    """The file that says whose images are in the folder beside it; earlier versions wrote none."""
    return folder.with_name(f"{folder.name}.key")


def check_images_are_ours(point: Point) -> None:
    """ValueError where a folder of the point's images holds those of other settings or weights, as far as it says."""
    for folder in image_folders(point):
        if owner(folder).is_file() and owner(folder).read_text() != images_key(point):
            raise ValueError(
                f"{folder} holds the images of another evaluation (other settings, weights or numbers of images): "
                "remove it, or set another sample.path"
            )


def compare(parts: list[Images], point: Point, full: FullDepth, run: Run) -> dict[str, float | None]:
    """PSNR and SSIM to full depth; full depth's own images become what the others are compared with."""
    parts = [Images(p.pixels[: int((p.ids < full.n).sum())], p.ids, p.labels, p.trace) for p in parts]
    if point.family == "full":
        for part in parts:
            full.keep(part)
    return full.fidelity(parts, run)


def spent(parts: list[Images], point: Point, run: Run) -> tuple[float, float]:
    """Mean layers per call and GMACs per image; the same for any number of processes."""
    macs = point.sampler.model.macs()
    calls = point.plan.computed.numpy()  # a forecast is no call
    rows = [(p.ids[0], macs_per_image(p.trace, macs), p.trace.used[calls].mean(axis=(0, 1))) for p in parts]
    rows = sorted(run.gather_list(rows), key=lambda row: row[0])
    cost, depth = (np.concatenate([row[column] for row in rows]) for column in (1, 2))
    return float(depth.mean()), float(cost.mean()) / 1e9


def keep_examples(parts: list[Images], folder: Path, run: Run) -> None:
    """The first images as a grid, and the depths of the first images as a trace."""
    rows = [
        (p.ids[0], p.ids, p.trace, p.pixels[: int((p.ids < GRID_IMAGES).sum())]) for p in parts if p.ids[0] < TRACED
    ]
    rows = sorted(run.gather_list(rows), key=lambda row: row[0])
    if run.is_main:
        ids, trace = np.concatenate([row[1] for row in rows]), Trace.concatenate(row[2] for row in rows)
        trace.first(TRACED).save(folder / "trace.npz", ids[:TRACED])
        save_grid(folder / "grid.png", torch.cat([row[3] for row in rows]))
