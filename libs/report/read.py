"""What an evaluation directory holds, checked on the way in: every malformed piece is a ValueError naming its place."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from PIL import Image

from libs.files import read_json, read_npz, read_text

# Every figure and sentence reads quality as a distance: smaller is better.
HIGHER_IS_BETTER = ("psnr", "ssim", "clip_score", "precision", "recall", "density", "coverage", "inception_score")
UMAP_ARRAYS = ("t", "k", "u", "error", "x0", "ids")


@dataclass(frozen=True)
class Result:
    """One evaluated point: a line of `results.jsonl`. None marks what was not measured."""

    dir: Path
    slug: str
    family: str  # "full", "fixed", "steps" … (libs/report/families.py) or the name of an exit policy
    label: str
    nfe: int
    depth: int  # K, layers of the full network
    quality_key: str
    quality: float  # a distance: smaller is better
    quality_per_seed: tuple[float, ...]
    mean_depth: float | None  # layers per network call
    gmacs: float | None  # 1e9 multiply-accumulates per image, whole sampling
    seconds: float | None  # per image, median over runs
    seconds_runs: tuple[float, ...]
    timed_with: str  # points of one name were timed in turn, so that run i of both saw the same machine
    record: dict[str, Any] = field(repr=False)

    @property
    def pace(self) -> float | None:
        """Seconds per image for ratios: geometric mean over timing runs, so that ratios of paces are mean ratios."""
        return geometric_mean(self.seconds_runs) if self.seconds_runs else self.seconds

    def metric(self, key: str) -> float | None:
        value = self.record["metrics"].get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Uncertainty:
    """Maps of n images at T times and E exits: u and the true |eps_k - eps_K| (T, E, n, H, W), x0 (T, n, C, H, W)."""

    t: np.ndarray  # (T,) 1 = noise
    k: np.ndarray  # (E,) layers used at the exit
    u: np.ndarray
    error: np.ndarray
    x0: np.ndarray  # uint8
    ids: np.ndarray  # (n,)


@dataclass(frozen=True)
class Exits:
    """Layers used: `used` (calls, branches, n), at times `t` (calls,), by a network of `depth` layers."""

    t: np.ndarray
    used: np.ndarray
    depth: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation directory, read and checked."""

    name: str
    dir: Path
    points: tuple[Result, ...]
    config: dict[str, Any] | None
    reference: dict[str, Any]
    train: tuple[dict[str, float], ...]
    notes: tuple[str, ...]  # what a reader must know about the files themselves

    @property
    def tolerance(self) -> float | None:
        """How much worse than full depth the recommended point may be: `eval.tolerance` of the evaluation."""
        return number((self.config or {}).get("eval") or {}, "tolerance", self.dir / "config.json")

    def images(self, point: Result, most: int) -> list[Image.Image] | None:
        """The first images of the point's first reported seed, cut from its grid; None where none was saved."""
        path = self.dir / "points" / point.slug / "grid.png"
        if not path.is_file():
            return None
        try:
            with Image.open(path, formats=("PNG",)) as file:
                grid = file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path}: not a readable PNG file. Evaluate the point {point.slug} again or remove the file."
            ) from error
        return tiles(grid, most)

    def exits(self, point: Result) -> Exits | None:
        path = self.dir / "points" / point.slug / "trace.npz"
        if not path.is_file():
            return None
        arrays = read_npz(path, "the trace", ("t", "used", "depth"), optional=("computed",))
        t, used, depth = np.asarray(arrays["t"], float), arrays["used"], int(arrays["depth"])
        if used.ndim != 3 or used.shape[0] != len(t) or used.shape[1] not in (1, 2) or used.size == 0:
            raise ValueError(
                f"{path}: `used` has shape {used.shape} and `t` {t.shape}; expected (calls, 1 or 2 branches, images) "
                "and (calls,), none of them empty."
            )
        if used.max() > depth:
            raise ValueError(f"{path}: `used` reaches {used.max()} layers, more than its `depth` of {depth}.")
        computed = arrays.get("computed", np.ones(len(t))).astype(bool)  # of earlier versions: unknown
        return Exits(t[computed], used[computed], depth)

    def uncertainty(self) -> Uncertainty | None:
        path = self.dir / "umaps.npz"
        if not path.is_file():
            return None
        maps = Uncertainty(**read_npz(path, "the uncertainty maps", UMAP_ARRAYS))
        shape = (len(maps.t), len(maps.k), len(maps.ids))
        if maps.u.ndim != 5 or maps.u.shape[:3] != shape or maps.error.shape != maps.u.shape or maps.u.size == 0:
            raise ValueError(
                f"{path}: `u` {maps.u.shape} and `error` {maps.error.shape} must both be (times, exits, images, H, W), "
                f"here {shape} + (H, W), none of them empty."
            )
        if maps.x0.ndim != 5 or maps.x0.shape[:2] != (shape[0], shape[2]) or maps.x0.shape[2] not in (1, 3):
            raise ValueError(
                f"{path}: `x0` has shape {maps.x0.shape}; expected (times, images, 1 or 3 channels, H, W)."
            )
        return maps


def tiles(grid: Image.Image, most: int, columns: int = 8) -> list[Image.Image]:
    """The first images of a grid as `libs.sampling.images.save_grid` lays it out, at their own size.

    There images are enlarged `scale` times and stand in at most 8 columns with a white frame around each; they come
    back enlarged. A grid of another layout comes back as the one image that it is.
    """
    found = []  # (columns, rows, tile, frame)
    for size in range(1, max(grid.size) + 1):
        scale = max(1, 48 // size)
        frame, tile = max(1, scale // 2), size * scale
        shape = [(side - frame) / (tile + frame) for side in grid.size]
        if all(n == int(n) and n >= 1 for n in shape) and shape[0] <= columns:
            found.append((int(shape[0]), int(shape[1]), tile, frame))
    if not found:
        return [grid]
    wide, high, tile, frame = max(found)
    if np.asarray(grid)[:frame].min() < 255:  # no frame: torchvision gives a single image none
        return [grid]
    places = [(frame + x * (tile + frame), frame + y * (tile + frame)) for y in range(high) for x in range(wide)]
    return [grid.crop((x, y, x + tile, y + tile)) for x, y in places[:most]]


def read_evaluations(directories: Sequence[str | Path]) -> list[Evaluation]:
    """Evaluation directories, in order; all must report the same quality metric, or their points cannot be compared."""
    if not directories:
        raise ValueError("No evaluation directory was given; at least one is needed.")
    paths = [Path(directory) for directory in directories]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"The same evaluation directory was given twice: {', '.join(map(str, paths))}.")
    names = [path.resolve().name for path in paths]
    evaluations = [
        read_directory(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]
    keys = {evaluation.points[0].quality_key: evaluation for evaluation in evaluations}
    if len(keys) > 1:
        used = ", ".join(f"{key} in {evaluation.dir / 'results.jsonl'}" for key, evaluation in keys.items())
        raise ValueError(f"The directories report different quality metrics ({used}); a report compares only one.")
    return evaluations


def read_directory(path: Path, name: str) -> Evaluation:
    results = path / "results.jsonl"
    if not results.is_file():
        raise ValueError(f"{results}: no such file. Give a directory that an evaluation has written.")
    lines = json_lines(results)
    if not lines:
        raise ValueError(f"{results}: empty, no point was evaluated. Run the evaluation first.")
    points: dict[str, Result] = {}
    replaced: list[str] = []
    for line, record in lines:
        point = read_point(record, f"{results}, line {line}", path)
        if points.pop(point.slug, None) is not None:
            replaced.append(point.slug)
        points[point.slug] = point
    keys = {point.quality_key for point in points.values()}
    if len(keys) > 1:
        raise ValueError(f"{results}: quality_key differs between lines ({', '.join(sorted(keys))}); one is allowed.")
    notes = []
    if replaced:
        notes.append(
            f"{results.name} holds some points twice; the last line counts: {', '.join(sorted(set(replaced)))}."
        )
    config, reference = json_object(path / "config.json"), json_object(path / "reference.json")
    train = path / "train.jsonl"
    rows = tuple(train_row(record, f"{train}, line {line}") for line, record in json_lines(train))
    return Evaluation(name, path, tuple(points.values()), config, reference or {}, rows, tuple(notes))


# What a line must hold beside its metrics' values, and the word for it.
KIND_WORDS = {str: "a non-empty string", int: "a whole number of at least 1", dict: "an object of numbers"}
FIELDS = {"metrics": dict, "slug": str, "quality_key": str, "family": str, "label": str, "nfe": int, "depth": int}


def read_point(record: dict[str, Any], where: str, directory: Path) -> Result:
    for key, kind in FIELDS.items():
        value = record.get(key)
        if type(value) is not kind or not value or (kind is int and value < 1):
            raise ValueError(f"{where}: `{key}` is {value!r}; {KIND_WORDS[kind]} is needed.")
    metrics, slug, key = record["metrics"], record["slug"], record["quality_key"]
    if Path(slug).name != slug or slug == "..":
        raise ValueError(f"{where}: `slug` is {slug!r}; it names a folder, so it must be a single path component.")
    if key.startswith(HIGHER_IS_BETTER):
        raise ValueError(f"{where}: `quality_key` is {key!r}, where larger is better; the report needs a distance.")
    quality = number(metrics, key, where)
    if quality is None:
        raise ValueError(f"{where}: `metrics` has no {key!r}, which `quality_key` names.")
    seconds = number(metrics, "seconds_per_image", where)
    if seconds is not None and seconds <= 0:
        raise ValueError(f"{where}: `seconds_per_image` is {seconds}; it must be positive.")
    for name, kind, what in (("seeds", list, "a list"), ("exit", dict, "an object"), ("n_images", int, "a number")):
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f"{where}: `{name}` is {record[name]!r}; {what} is needed.")
    return Result(
        dir=directory,
        **{name: record[name] for name in FIELDS if name != "metrics"},
        quality=quality,
        quality_per_seed=metric_numbers(metrics, f"{key}_per_seed", where),
        mean_depth=number(metrics, "mean_depth", where),
        gmacs=number(metrics, "gmacs", where),
        seconds=seconds,
        seconds_runs=positive(metrics, "seconds_per_image_runs", where),
        timed_with=str(directory),
        record=record,
    )


def number(values: dict[str, Any], key: str, where: str | Path) -> float | None:
    """A finite number, or None where the key is missing or null."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: `{key}` is {value!r}; a finite number is needed.")
    return float(value)


def metric_numbers(values: dict[str, Any], key: str, where: str | Path) -> tuple[float, ...]:
    many = values.get(key)
    if many is None:
        return ()
    if not isinstance(many, list) or any(number({key: value}, key, where) is None for value in many):
        raise ValueError(f"{where}: `{key}` is {many!r}; a list of finite numbers is needed.")
    return tuple(float(value) for value in many)


def positive(values: dict[str, Any], key: str, where: str | Path) -> tuple[float, ...]:
    """Seconds: ratios and geometric means are taken of them."""
    found = metric_numbers(values, key, where)
    if any(value <= 0 for value in found):
        raise ValueError(f"{where}: `{key}` is {list(found)}; they must be positive.")
    return found


def train_row(record: dict[str, Any], where: str) -> dict[str, float]:
    """The numeric columns of a training line; a loss that was not finite stays a gap in the curve."""
    if number(record, "step", where) is None:
        raise ValueError(f"{where}: no `step`; every line of a training log needs one.")
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float)}


def json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file; none where the file is missing."""
    if not path.is_file():
        return []
    found = []
    for line, text in enumerate(read_text(path, path.name).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise ValueError(f"{path}, line {line}: not JSON ({str(error)[:120]}).") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {line}: a JSON object is needed, not {type(record).__name__}.")
        found.append((line, record))
    return found


def json_object(path: Path) -> dict[str, Any] | None:
    return read_json(path, path.name) if path.is_file() else None
