"""What an evaluation says about its points: keys, lines of results.jsonl, the recommended point, the last lines."""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from libs import checkpoints, report
from libs.evaluation.sweep import Point
from libs.files import file_hash, write_file
from libs.metrics.cost import CONVENTION
from libs.report.verdict import Claim, claim
from libs.run import Run, tf32
from libs.sampling.sampler import Sampler


def config_hash(sampler: Sampler) -> str:
    """Identifies a config together with its weights, wherever these lie."""
    settings = sampler.config.to_dict() | {"nnet_path": ""}
    text = json.dumps(settings, sort_keys=True, default=str) + sampler.weights
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def images_key(point: Point) -> str:
    """Identifies the images of a point, whatever is measured of them."""
    return key_of(point, point.sampler.config.sample.n_samples)


def key_of(point: Point, *more) -> str:
    """Identifies how a point samples, and `more`."""
    parts = [image_settings(point), asdict(point.sampler.guidance), *more]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(point.plan.t.numpy().tobytes() + point.plan.table.numpy().tobytes())
    return digest.hexdigest()[:16]


def image_settings(point: Point) -> dict:
    """What the images of a point depend on, besides the noise seed and their ids; JSON."""
    config = point.sampler.config
    settings = config.to_dict()
    kept = {
        name: settings[name] for name in ("regime", "process", "pred", "nnet", "uem", "autoencoder", "clip", "sample")
    }
    for key in ("n_samples", "path"):
        kept["sample"].pop(key, None)
    kept |= {"exit": point.exit, "p_uncond": config.dataset.p_uncond, "precision": point.sampler.run.precision}
    if path := point.exit.get("path"):  # of a plan or a checkpoint, what the file holds
        kept["exit"] = point.exit | {"path": file_hash(checkpoints.file_of(path))}
    if Path(config.sample.grid).is_file():  # likewise
        kept["sample"]["grid"] = point.plan.t.tolist()
    if tf32():
        kept["tf32"] = True
    if config.regime == "text" and not config.sample.prompts:
        kept["dataset"] = settings["dataset"]
    if config.sample.prompts:
        kept["prompts"] = Path(config.sample.prompts).read_text().splitlines()
    return json.loads(json.dumps(kept | {"weights": point.sampler.weights}))


def point_key(point: Point, reference: str) -> str:
    """Identifies what the measured quality and cost of a point depend on, and nothing else.

    Neither other points nor timing, tolerance, training or the place of files are part of it. A calibration, a trace or
    a plan counts by what it says. `reference` stands for the real images and their features.
    """
    config = point.sampler.config
    measured = {name: config.eval.to_dict()[name] for name in ("seeds", "selection_seed", "paired", "metrics", "clip")}
    return key_of(point, measured, config.sample.n_samples, reference)


def finite(value: float | None) -> float | None:
    """A number that JSON knows, or None."""
    return value if value is not None and math.isfinite(value) else None


def result_line(point: Point, measured: dict, seconds: list[float], machine: dict) -> dict:
    """One line of results.jsonl."""
    config, quality_key, median = point.sampler.config, measured["quality_key"], statistics.median(seconds)
    return {
        "slug": point.slug,
        "family": point.family,
        "label": point.label,
        "exit": point.exit,
        "sampler": point.solver,
        "nfe": point.plan.nfe,
        "seeds": list(config.eval.seeds),
        "selection_seed": config.eval.selection_seed,
        "n_images": config.sample.n_samples,
        "batch_size": config.eval.timing_batch,
        "guidance": asdict(point.sampler.guidance),
        "precision": point.sampler.run.precision,
        "quality_key": quality_key,
        "metrics": {
            quality_key: statistics.fmean(measured["per_seed"]),
            f"{quality_key}_per_seed": measured["per_seed"],
            f"{quality_key}_selection": measured["selection"],
            "psnr": measured["psnr"],
            "ssim": measured["ssim"],
            **measured["more"],
            "mean_depth": measured["mean_depth"],
            "gmacs": measured["gmacs"],
            "gmacs_convention": CONVENTION,
            "seconds_per_image": median,
            "seconds_per_image_runs": seconds,
            "images_per_s": 1 / median,
        },
        "depth": point.sampler.model.depth,
        "recommended": False,
        "config_hash": measured["key"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine,
    }


def claim_of(records: list[dict], run: Run) -> Claim:
    """What the report says of the run's directory, its recommended point marked in the records."""
    found = report.load_report([run.dir])
    said = claim(found.entries, found.tolerance)
    for line in records:
        line["recommended"] = said.chosen is not None and line["slug"] == said.chosen.first.slug
    return said


def summary_lines(records: list[dict], said: Claim) -> str:
    """Full depth and the recommended point, a line each, and what the report says first."""
    key = records[0]["quality_key"]
    lines = []
    for line in (records[0], *(r for r in records if r["recommended"])):
        m, full = line["metrics"], line is records[0]
        text = f"{line['label']}: " if full else f"recommended ({line['label']}): "
        text += f"{m['images_per_s']:.1f} images/s, {m['mean_depth']:.2f} of {line['depth']} layers, "
        text += f"{m['gmacs']:.4f} GMACs per image, {key} {m[key]:.2f}"
        if not full and m["ssim"] is not None:
            text += ", images identical to full depth" if m["ssim"] == 1 else f", PSNR to full depth {m['psnr']:.1f} dB"
        lines.append(text)
    return "\n".join((*lines, *said.sentences))


def write_results(records: list[dict], run: Run) -> None:
    """results.jsonl."""
    write_file(run.dir / "results.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in records))


def training_of(config) -> dict[str, str]:
    """training.json and train.jsonl, as far as they are known: config and log of the run that made the weights.

    Read when the weights are: a training that goes on removes old checkpoints.
    """
    found = {}
    if known := checkpoints.about(config.nnet_path).get("config"):
        found["training.json"] = json.dumps(known, indent=1) + "\n"
        log = (
            checkpoints.file_of(config.nnet_path).resolve().parent / "../../train.jsonl"
        )  # <workdir>/ckpts/<step>.ckpt
        if log.is_file():
            found["train.jsonl"] = log.read_text()
    return found


def keep_training(found: dict[str, str], run: Run) -> None:
    """Write what `training_of` found, and nothing else, unless the directory is a training's own."""
    own = (run.dir / "ckpts").is_dir()  # its log goes on
    for name in ("training.json",) if own else ("training.json", "train.jsonl"):
        if name in found:
            write_file(run.dir / name, found[name])
        else:
            (run.dir / name).unlink(missing_ok=True)  # of other weights
