"""Images in a folder, {id}.png, that a killed job goes on with: what scripts.sample does."""

import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from libs.evaluation.records import image_settings
from libs.evaluation.sweep import Point, points
from libs.files import atomic_write, read_json
from libs.regimes import Regime
from libs.run import Run, say_progress
from libs.sampling.images import Images, save_png
from libs.sampling.sampler import Sampler, split

WRITERS = 4  # threads that compress PNGs while the next batch is sampled


def sample_to_folder(config, regime: Regime, run: Run, ids: np.ndarray) -> dict:
    """Write the images `ids` (n,) to the run's directory, or what is missing of them; returns the summary.

    A batch is done when all of its files exist; else it is sampled as a whole, as a decision may depend on all of it,
    and what is missing is written. A file appears complete or not at all, with its class and mean depth as text in the
    PNG. sample.json holds the settings, and the class and depth of every image.

    Raises:
        ValueError: the directory holds images made with other settings or weights.
    """
    started = time.perf_counter()
    point = configured(config, Sampler.open(config, regime, run))
    batches, seed = split(ids, config.sample.mini_batch_size), config.eval.seeds[0]
    regime.conditions.for_ids(seed, ids[:1])  # opens captions or the text encoder before anything is written
    if run.is_main:
        begin(run, image_settings(point) | {"seed": seed})
    run.barrier()
    there = set(os.listdir(run.dir))
    todo = [batch for batch in batches if not all(f"{i}.png" in there for i in batch)]
    run.barrier()  # nobody may finish a batch while others still look for what is to be done
    mine = todo[run.rank :: run.world]
    run.say(
        f"{len(ids)} images of {point.plan.nfe} calls, {point.solver['name']}: {len(batches)} batches, "
        f"{len(batches) - len(todo)} of which are done already"
    )
    with ThreadPoolExecutor(WRITERS) as pool:
        writing: list = []
        for batch in run.stopping.between(say_progress(mine, len(mine), "sample", run)):
            images = point.sampler.batch(batch, seed=seed, plan=point.plan, policy=point.policy)
            for future in writing:  # at most one batch waits, and errors show
                future.result()
            rows = [row for row, i in enumerate(images.ids) if f"{i}.png" not in there]
            writing = [pool.submit(save_images, run.dir, images, row) for row in rows]
        for future in writing:
            future.result()
    run.barrier()
    there = set(os.listdir(run.dir))
    missing = [i for i in ids if f"{i}.png" not in there]
    if missing:
        raise ValueError(f"{run.dir} lacks {len(missing)} images (the first is {missing[0]}.png): run it again")
    if run.is_main:
        note(run, ids)
    return {
        "output": str(run.dir),
        "images": len(ids),
        "others": sum(name.endswith(".png") for name in there) - len(ids),  # of other seeds, in the same folder
        "sampled": sum(map(len, todo)),
        "point": point.label,
        "seconds": round(time.perf_counter() - started, 1),
    }


def configured(config, sampler: Sampler) -> Point:
    """The policy of the config at its one certainty; full depth for weights without estimators."""
    if len(config.eval.thresholds) > 1:
        raise ValueError(f"--exit_threshold has {len(config.eval.thresholds)} values; one set of images needs one")
    alone = config.copy_and_resolve_references()
    alone.eval.update(pairs=(), fixed=(), fewer_steps=(), sweep=())
    return points(replace(sampler, config=alone))[-1]


def begin(run: Run, settings: dict) -> None:
    """Keep the settings beside the images, or refuse to continue others; without images they count for nothing."""
    file, images = run.dir / "sample.json", next(run.dir.glob("*.png"), None)
    if images is None:
        run.write_json(file.name, settings)
        return
    if not file.exists():
        raise ValueError(f"{run.dir} has images that do not come from this command; choose another --output")
    before = read_json(file, "the settings of the images")
    before.pop("images", None)
    changed = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"{run.dir} has images made with other settings ({', '.join(changed)}): run the earlier command again, or "
            "choose another --output"
        )


def save_images(folder: Path, images: Images, row: int) -> None:
    text = {"depth": f"{images.mean_depth[row]:.4f}"}
    if images.labels is not None:
        text["label"] = str(images.labels[row])
    save_png(folder / f"{images.ids[row]}.png", images.pixels[row], text)


def read_note(path: Path) -> dict[str, float]:
    """Class and mean depth of an image that `save_images` wrote; images of earlier versions have neither."""
    with Image.open(path, formats=["PNG"]) as image:
        text = image.text
    return {name: kind(text[name]) for name, kind in (("label", int), ("depth", float)) if name in text}


def note(run: Run, ids: Sequence[int]) -> None:
    """Add class and depth of every image to sample.json."""
    settings = read_json(run.dir / "sample.json", "the settings of the images")
    known = settings.get("images", {})
    for i in ids:
        known[str(i)] = read_note(run.dir / f"{i}.png")
    run.write_json("sample.json", settings | {"images": dict(sorted(known.items(), key=lambda item: int(item[0])))})


def write_npz(folder: Path, ids: Sequence[int]) -> Path:
    """samples.npz: arr_0 (n, H, W, 3) uint8 in the order of `ids`, and arr_1 (n,) int64 classes where all have one.

    As ADM's evaluation reads it; one image is in memory at a time.
    """
    path = folder / "samples.npz"

    def read(i: int) -> np.ndarray:
        with Image.open(folder / f"{i}.png", formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))

    labels = [read_note(folder / f"{i}.png").get("label") for i in ids]
    with atomic_write(path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(ids), *read(ids[0]).shape)}
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # without the time of day
            np.lib.format.write_array_header_1_0(file, header)
            for i in ids:
                file.write(read(i).tobytes())
        if None not in labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.array(labels, np.int64))
    return path
