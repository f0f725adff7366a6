"""Write images to a folder, {id}.png, from any model: pixels, latents or text-to-image.

    python -m scripts.sample --config=configs/cifar10_uvit_small.py --nnet_path=... --output=samples --npz
    python -m scripts.sample --config=configs/imagenet256_uvit_large.py --nnet_path=... --output=samples \\
        --seeds=0-31 --labels=207,360 --exit_threshold=0.95
    python -m scripts.sample --config=configs/mscoco_uvit_small.py --nnet_path=... --output=samples \\
        --seeds=0-11 --prompts=prompts.txt

Image i depends on its seed i and the settings only: these are the images of the evaluation's first noise seed
(eval.seeds). Labels and prompts are taken in turn. Without --exit_threshold the policy of config.exit decides; 1 is
full depth. A run that was killed is continued by the same command, with any number of processes (accelerate launch, or
on a CPU torchrun): batches are always the same, and what is complete is kept. --npz adds samples.npz (arr_0, uint8,
NHWC), which the evaluation suite of ADM reads. The last line is a JSON summary.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

import utils
from libs import regimes
from libs.evaluation.evaluate import load_model, weights_hash
from libs.evaluation.sweep import Point, points
from libs.files import remove_parts
from libs.regimes import Regime
from libs.run import Run, say_progress
from libs.sampling.generate import generate_batch
from libs.sampling.images import save_png

FLAGS = flags.FLAGS
WRITERS = 4  # threads that compress PNGs while the next batch is sampled


def sample(config, regime: Regime, run: Run, ids: np.ndarray) -> dict:
    """Write the images `ids` (n,) to the run's directory, or what is missing of them; returns the summary.

    A batch is done when all of its files exist; each appears complete or not at all.

    Raises:
        ValueError: the directory holds images made with other settings or weights.
    """
    started = time.perf_counter()
    model = load_model(config, run)
    point = configured(config, model, regime)
    if run.is_main:
        begin(run, made_with(config, point, run))
        remove_parts(run.dir)
    run.barrier()
    size = config.sample.mini_batch_size
    if size < 1:
        raise ValueError(f"sample.mini_batch_size is {size}; it must be at least 1")
    batches = [ids[start : start + size] for start in range(0, len(ids), size)]
    there = set(os.listdir(run.dir))
    todo = [batch for batch in batches if not all(f"{i}.png" in there for i in batch)]
    run.barrier()  # nobody may finish a batch while others still look for what is to be done
    mine = todo[run.rank :: run.world]
    run.say(f"{len(ids)} images in {len(batches)} batches, {len(batches) - len(todo)} of which are done already")
    options = dict(pred=config.pred, plan=point.plan, policy=point.policy, guidance=point.guidance, run=run)
    with ThreadPoolExecutor(WRITERS) as pool:
        writing: list = []
        for batch in say_progress(mine, len(mine), "sample", run):
            images = generate_batch(model, regime, seed=config.eval.seeds[0], ids=batch, **options)
            for future in writing:  # at most one batch waits, and errors show
                future.result()
            files = (run.dir / f"{i}.png" for i in batch)
            writing = [pool.submit(save_png, *pair) for pair in zip(files, images.pixels, strict=True)]
        for future in writing:
            future.result()
    run.barrier()
    there = set(os.listdir(run.dir))
    missing = [i for i in ids if f"{i}.png" not in there]
    if missing:
        raise ValueError(f"{run.dir} lacks {len(missing)} images (the first is {missing[0]}.png): run it again")
    return {
        "output": str(run.dir),
        "images": len(ids),
        "others": sum(name.endswith(".png") for name in there) - len(ids),  # of other seeds, in the same folder
        "sampled": sum(map(len, todo)),
        "point": point.label,
        "seconds": round(time.perf_counter() - started, 1),
    }


def configured(config, model, regime: Regime) -> Point:
    """The policy of the config at its one certainty; full depth for weights without estimators."""
    if len(config.eval.thresholds) > 1:
        raise ValueError(f"--exit_threshold has {len(config.eval.thresholds)} values; one set of images needs one")
    alone = config.copy_and_resolve_references()
    alone.eval.update(pairs=(), fixed=(), fewer_steps=(), sweep=())
    return points(alone, model, regime)[-1]


def made_with(config, point: Point, run: Run) -> dict:
    """What images depend on, besides their ids."""
    settings = config.to_dict()
    names = ("regime", "process", "pred", "nnet", "uem", "autoencoder", "clip", "sample")
    kept = {name: settings[name] for name in names}
    del kept["sample"]["n_samples"]
    kept |= {"exit": point.exit, "seed": config.eval.seeds[0], "p_uncond": config.dataset.p_uncond}
    kept["precision"] = run.accelerator.mixed_precision
    if config.regime == "text" and not config.sample.prompts:
        kept["dataset"] = settings["dataset"]
    if config.sample.prompts:
        kept["prompts"] = Path(config.sample.prompts).read_text().splitlines()
    return json.loads(json.dumps(kept | {"weights": weights_hash(config)}))


def begin(run: Run, settings: dict) -> None:
    """Keep the settings beside the images, or refuse to continue others."""
    file = run.dir / "sample.json"
    if not file.exists():
        if next(run.dir.glob("*.png"), None):
            raise ValueError(f"{run.dir} has images that do not come from this command; choose another --output")
        run.write_json(file.name, settings)
    before = json.loads(file.read_text())
    changed = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"{run.dir} has images made with other settings ({', '.join(changed)}): run the earlier command again, or "
            "choose another --output"
        )


def write_npz(folder: Path, ids: Sequence[int]) -> Path:
    """samples.npz with arr_0 (n, H, W, 3) uint8 in the order of `ids`, one image in memory at a time."""
    path, part = folder / "samples.npz", folder / "samples.npz.part"

    def read(i: int) -> np.ndarray:
        with Image.open(folder / f"{i}.png") as image:
            return np.asarray(image.convert("RGB"))

    header = {"descr": "|u1", "fortran_order": False, "shape": (len(ids), *read(ids[0]).shape)}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # without the time of day
            np.lib.format.write_array_header_1_0(file, header)
            for i in ids:
                file.write(read(i).tobytes())
    os.replace(part, path)
    return path


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """ "0-2,7" -> (0, 1, 2, 7)."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{flag}={text}: {part.strip()!r} is no number and no range such as 0-49999")
        found += range(int(first), int(last if dash else first) + 1)
    return tuple(found)


def regime(config) -> Regime:
    """The config's regime with the labels and prompts asked for."""
    if FLAGS.labels:
        if config.regime == "text":
            raise ValueError("--labels belongs to models with classes; this one takes --prompts")
        config.sample.labels = numbers(FLAGS.labels, "--labels")
    if FLAGS.prompts:
        if config.regime != "text":
            raise ValueError(f"--prompts belongs to text-to-image models; this one is of {config.regime}")
        config.sample.prompts = FLAGS.prompts
    return regimes.of(config)


def work(config, regime: Regime, run: Run) -> None:
    ids = numbers(FLAGS.seeds, "--seeds") if FLAGS.seeds else tuple(range(config.sample.n_samples))
    if len(set(ids)) < len(ids):
        raise ValueError(f"--seeds={FLAGS.seeds} has a number twice")
    summary = sample(config, regime, run, np.array(ids))
    if run.is_main:
        if FLAGS.npz:
            summary["npz"] = str(write_npz(run.dir, ids))
        print(json.dumps(summary))
    run.barrier()


if __name__ == "__main__":
    flags.DEFINE_string("seeds", None, "Images to make: 0-49999, or 3,5,8-12. Default: sample.n_samples of them.")
    flags.DEFINE_string("labels", None, "Their classes, in turn: 207,360 or 0-999. Default: drawn.")
    flags.DEFINE_string("prompts", None, "File with a prompt per line, taken in turn. Default: captions, drawn.")
    flags.DEFINE_bool("npz", False, "Also write samples.npz.")
    utils.launch(work, regime, "sample")
