"""Evaluation: quality, cost and seconds of full depth, early exits and their competitors, from the same seeds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from libs import checkpoints, rng
from libs.evaluation.families import BASELINES
from libs.evaluation.reference import more_metrics, real_images
from libs.evaluation.sweep import Point, points
from libs.exits import EXIT_POLICIES, Trace
from libs.metrics.cost import CONVENTION, macs_per_image
from libs.metrics.extractors import Extractor, build_extractor, extract
from libs.metrics.frechet import Frechet, Moments, Statistics, real_halves
from libs.metrics.paired import Paired
from libs.models import EarlyExitModel, Missing
from libs.models.build import build_model
from libs.regimes import Regime
from libs.run import Run, describe_machine, say_progress
from libs.sampling.denoiser import Guidance
from libs.sampling.generate import generate, generate_batch, make_plan
from libs.sampling.images import Images, save_grid
from libs.sampling.inflight import BATCHES as IN_FLIGHT
from libs.sampling.inflight import suits
from libs.sampling.plans import sample


def load_model(config, run: Run) -> EarlyExitModel:
    """The network with the weights of config.nnet_path, ready to sample.

    A file of a network without exits is taken where no thresholds are asked for: nothing leaves early then.
    """
    if not config.nnet_path:
        raise ValueError("nnet_path is not set: give the weights to evaluate with --nnet_path=FILE")
    checkpoints.check_config(config.nnet_path, config)
    model = build_model(config)
    run.say(checkpoints.load(model, config.nnet_path, full_depth=not config.eval.thresholds))
    return model.to(run.device).eval().requires_grad_(False)


def guidance(config) -> Guidance:
    return Guidance(config.sample.scale, config.sample.pair)


def evaluate(config, regime: Regime, run: Run) -> list[dict]:
    """Measure every point; write results.jsonl, grids, traces and uncertainty maps to the run's directory.

    Points that an interrupted evaluation with the same config finished are not measured again. Seconds are measured at
    the end, all points in turn, so that a drift of the machine's speed hits all of them alike.
    """
    model = load_model(config, run)
    todo = points(config, model, regime)
    lockstep = [point.label for point in todo if not suits(model, point.policy, point.guidance)]
    if config.sample.inflight and lockstep:
        run.say(f"note: sample.inflight has no effect on {', '.join(lockstep)}: these run in lockstep")
    extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
    reference = open_reference(config, regime, extractor, run)
    more = more_metrics(config, regime, extractor, run)
    key = config_hash(config)
    run.write_json("config.json", config.to_dict())
    save_training_config(config, run)
    if run.is_main:
        (run.dir / "points").mkdir(exist_ok=True)
    run.barrier()

    measured = [
        measure_point(point, model, config, regime, extractor, reference, more, key, run)
        for point in say_progress(todo, len(todo), "evaluate", run)
    ]
    records = []
    if run.is_main:
        machine = describe_machine() | {"weights": weights_hash(config)}
        seconds = time_points(todo, model, config, regime, run)
        records = [record(p, config, model, m, s, machine) for p, m, s in zip(todo, measured, seconds, strict=True)]
        recommend(records, config.eval.tolerance)
        part = run.dir / "results.jsonl.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in records))
        os.replace(part, run.dir / "results.jsonl")
        (run.dir / "timing.json").unlink(missing_ok=True)  # of scripts.time_together, for older results
        save_uncertainty_maps(model, config, regime, run)
        run.say(headline(records))
    run.barrier()
    return records


def measure_point(point, model, config, regime, extractor, reference, more, key, run) -> dict:
    """Quality, fidelity and cost of one point over the selection seed and the reported seeds."""
    folder = run.dir / "points" / point.slug
    if path := point.exit.get("path"):  # a calibration or a trace: what it says counts, not what it is called
        key = hashlib.sha256(key.encode() + Path(path).read_bytes()).hexdigest()[:16]
    done = folder / "quality.json"
    if done.exists() and (found := json.loads(done.read_text()))["key"] == key:
        return found
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    run.barrier()

    macs = model.macs()
    quality_key = Frechet.key_of(extractor)
    result: dict = {"key": key, "quality_key": quality_key}
    seeds = (config.eval.selection_seed, *config.eval.seeds)
    distances, depths, costs = [], [], []
    others: list[dict[str, float]] = []
    for number, seed in enumerate(seeds):
        frechet = Frechet(extractor, reference)
        metrics = more(seed) if number else []
        kept: list[Images] = []
        for images in generate(
            model,
            regime,
            pred=config.pred,
            plan=point.plan,
            policy=point.policy,
            guidance=point.guidance,
            seed=seed,
            ids=np.arange(config.sample.n_samples),
            batch_size=config.sample.mini_batch_size,
            run=run,
            inflight=config.sample.inflight,
        ):
            for metric in (frechet, *metrics):
                metric.update(images)
            kept.append(images if number == 1 and images.ids[0] < config.eval.paired else dropped(images))
        distances.append(frechet.compute(run)[quality_key])
        trace = Trace.concatenate([images.trace for images in kept])
        images_macs = run.gather(macs_per_image(trace, macs))
        depth = run.gather(trace.used.mean(axis=(0, 1)))
        if number:
            others.append({key: value for metric in metrics for key, value in metric.compute(run).items()})
            costs.append(float(images_macs.mean()) / 1e9)
            depths.append(float(depth.mean()))
        if number == 1:
            result |= paired_fidelity(kept, run.dir / "points" / "full-depth", point, config, run)
            keep_examples(kept, trace, folder, run)
    result["more"] = {name: statistics.fmean(found[name] for found in others) for name in others[0]}
    result["selection"] = distances[0]
    result["per_seed"] = distances[1:]
    result["mean_depth"], result["gmacs"] = statistics.fmean(depths), statistics.fmean(costs)
    run.write_json(str(done.relative_to(run.dir)), result)
    run.barrier()
    return result


def paired_fidelity(kept: list[Images], full: Path, point: Point, config, run: Run) -> dict:
    """PSNR and SSIM to the full-depth images of the same seed, over the first config.eval.paired ids."""
    kept = [images for images in kept if len(images.pixels)]
    pixels = torch.cat([images.pixels for images in kept])
    ids = np.concatenate([images.ids for images in kept])
    path = full / f"baseline-{run.rank}-of-{run.world}.npz"
    if point.family == "full":
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, pixels=pixels.numpy(), ids=ids)
        os.replace(part, path)
    with np.load(path) as data:
        paired = Paired(Images(torch.from_numpy(data["pixels"]), data["ids"], None, Trace(0)))
    for images in kept:
        paired.update(images)
    return paired.compute(run)


def dropped(images: Images) -> Images:
    """Without the pixels, which nobody looks at any more."""
    return Images(images.pixels[:0], images.ids, images.labels, images.trace)


def keep_examples(kept: list[Images], trace: Trace, folder: Path, run: Run) -> None:
    """The first images as a grid and the trace of up to 4,096 images, with the ids they belong to."""
    n = max(1, 4096 // run.world)
    used = run.gather(trace.used.transpose(2, 0, 1)[:n]).transpose(1, 2, 0)
    ids = run.gather(np.concatenate([images.ids for images in kept])[:n])
    if run.is_main:
        order = np.argsort(ids)
        calls = list(zip(trace.t.tolist(), used[:, :, order], strict=True))
        Trace(trace.depth, trace.asked, calls, trace.costs).save(folder / "trace.npz", ids[order])
        save_grid(folder / "grid.png", kept[0].pixels[:64])


def time_points(todo: list[Point], model, config, regime, run: Run) -> list[list[float]]:
    """Seconds per image of every point, `eval.timing_runs` times."""
    jobs = [timing_job(point, model, config, regime, run) for point in todo]
    return time_in_turn(jobs, config.eval.timing_runs, run)


def timing_job(point: Point, model, config, regime: Regime, run: Run) -> Callable[[], float]:
    """Generates a batch of `eval.timing_batch` images; returns the seconds per image.

    With `sample.inflight`, which is for more images than a batch, it is as many batches as are on their way at once.
    """
    n = config.eval.timing_batch * (IN_FLIGHT if config.sample.inflight else 1)
    options = dict(pred=config.pred, guidance=point.guidance, seed=config.eval.selection_seed, run=run)
    options |= dict(ids=np.arange(n), batch_size=config.eval.timing_batch, inflight=config.sample.inflight)

    def job() -> float:
        start = time.perf_counter()
        batches = list(generate(model, regime, plan=point.plan, policy=point.policy, **options))  # copied to the CPU
        return (time.perf_counter() - start) / sum(len(images.ids) for images in batches)

    return job


def time_in_turn(jobs: Sequence[Callable[[], float]], n_runs: int, run: Run) -> list[list[float]]:
    """One warm-up each, then `n_runs` rounds through all jobs: what slows the machine for a while hits all alike."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in say_progress(range(n_runs + 1), n_runs + 1, "seconds", run):
        for job, runs in zip(jobs, seconds, strict=True):
            spent = job()
            if number:
                runs.append(spent)
    return seconds


def record(point: Point, config, model, measured: dict, seconds: list[float], machine: dict) -> dict:
    """One line of results.jsonl."""
    quality_key = measured["quality_key"]
    median = statistics.median(seconds)
    return {
        "slug": point.slug,
        "family": point.family,
        "label": point.label,
        "exit": point.exit,
        "sampler": {"name": point.sampler, "steps": point.steps},
        "nfe": point.plan.nfe,
        "seeds": list(config.eval.seeds),
        "selection_seed": config.eval.selection_seed,
        "n_images": config.sample.n_samples,
        "batch_size": config.eval.timing_batch,
        "guidance": asdict(point.guidance),
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
        "depth": model.depth,
        "recommended": False,
        "config_hash": measured["key"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine,
    }


def headline(records: list[dict]) -> str:
    """Full depth, the recommended point and the fixed layer that the same rule picks, a line each."""
    key = records[0]["quality_key"]
    chosen = {"full depth": records[0], "recommended": next((r for r in records if r["recommended"]), None)}
    chosen["fixed layer"] = next((r for r in records if r.get("recommended_fixed")), None)
    lines = []
    for name, line in chosen.items():
        if line is None:
            lines.append(f"{name}: none is close enough to full depth")
            continue
        m = line["metrics"]
        label = "" if name == "full depth" else f" ({line['label']})"
        lines.append(
            f"{name}{label}: {m['images_per_s']:.1f} images/s, {m['mean_depth']:.2f} of {line['depth']} layers, "
            f"{m['gmacs']:.4f} GMACs per image, {key} {m[key]:.2f}, PSNR to full depth {m['psnr']:.1f} dB"
        )
    return "\n".join(lines)


def recommend(records: list[dict], tolerance: float) -> None:
    """Mark the fastest early-exit point whose distance on the selection seed is at most 1 + tolerance of full depth's.

    The best fixed layer is marked by the same rule. The reported seeds take no part in the choice.
    """
    full = records[0]
    key = f"{full['quality_key']}_selection"
    limit = (1 + tolerance) * full["metrics"][key]
    good = [r for r in records if r["metrics"][key] <= limit]
    exits = [r for r in good if r["family"] not in BASELINES]
    for mark, able in (("recommended", exits), ("recommended_fixed", [r for r in good if r["family"] == "fixed"])):
        if able:
            min(able, key=lambda r: r["metrics"]["seconds_per_image"])[mark] = True


def open_reference(config, regime: Regime, extractor: Extractor, run: Run) -> Statistics:
    """The statistics of config.eval.reference, or those of the training data, computed once and kept in the run."""
    if config.eval.reference:
        return Statistics.load(config.eval.reference, extractor)
    path = run.dir / "reference.npz"
    if run.is_main and not path.exists():
        dataset = real_images(config, regime)
        chunks = (range(start, min(start + 256, len(dataset))) for start in range(0, len(dataset), 256))
        features = extract(extractor, (torch.stack([dataset.pixels(i) for i in chunk]) for chunk in chunks))
        moments = Moments(extractor.n_features)
        moments.add(torch.from_numpy(features))
        floor = {f"{Frechet.key_of(extractor)}_real_halves": real_halves(features, extractor), "n_real": len(dataset)}
        run.write_json("reference.json", floor)
        moments.statistics(extractor).save(path)
    run.barrier()
    return Statistics.load(path, extractor)


@torch.inference_mode()
def save_uncertainty_maps(model, config, regime: Regime, run: Run, n: int = 4, times: int = 6) -> None:
    """umaps.npz: u and the true |eps_k - eps_K| of every exit along full-depth trajectories of `n` images."""
    if isinstance(model.uem, Missing):
        return
    plan = make_plan(regime.process, config.sample)
    wanted = set(np.linspace(0, plan.nfe - 1, times).round().astype(int).tolist())
    rows: dict[str, list] = {"t": [], "u": [], "error": [], "x0": []}
    ids = np.arange(n)
    cond = regime.conditions.for_ids(config.eval.seeds[0], ids)
    cond = None if cond is None else cond.to(run.device)
    calls = 0

    def eps_fn(x, t):
        nonlocal calls
        moved = t.to(x.device, x.dtype)
        exits = model(x, regime.process.network_time(t).to(x.device, torch.float32), cond)
        eps = torch.stack([regime.process.eps(config.pred, out, x, moved) for out in exits.out])  # (E, n, C, H, W)
        if calls in wanted:
            u = exits.u if exits.u.dim() > 2 else exits.u[..., None, None, None].expand_as(eps)
            rows["t"].append(float(t[0]))
            rows["u"].append(u.mean(2).cpu().numpy())
            rows["error"].append((eps - eps[-1]).abs().mean(2).cpu().numpy())
            rows["x0"].append(regime.codec.decode(regime.process.x0(eps[-1], x, moved)).cpu().numpy())
        calls += 1
        return eps[-1]

    noise = rng.SeededNoise(config.eval.seeds[0], ids, regime.shape)
    sample(plan, noise.draw().to(run.device), eps_fn, noise if plan.stochastic else None)
    part = run.dir / "umaps.part.npz"
    np.savez_compressed(
        part, k=np.array(model.points), ids=ids, **{name: np.stack(value) for name, value in rows.items()}
    )
    os.replace(part, run.dir / "umaps.npz")


def monitor(model, config, regime: Regime, run: Run) -> dict[str, float]:
    """Full-depth quality during training: fewer images and steps than an evaluation, no guidance. For comparison."""
    extractor = build_extractor(config.eval.extractor, regime.image_shape, run.device)
    frechet = Frechet(extractor, open_reference(config, regime, extractor, run))
    options = dict(pred=config.pred, guidance=Guidance(), seed=config.eval.selection_seed, run=run)
    for images in generate(
        model,
        regime,
        plan=make_plan(regime.process, config.sample, config.train.monitor_steps),
        policy=EXIT_POLICIES["full"](),
        ids=np.arange(config.train.monitor_samples),
        batch_size=config.sample.mini_batch_size,
        **options,
    ):
        frechet.update(images)
    return frechet.compute(run)


def save_samples(model, config, regime: Regime, run: Run, path: Path) -> None:
    """A grid of 64 full-depth samples."""
    if run.is_main:
        path.parent.mkdir(exist_ok=True)
        images = generate_batch(
            model,
            regime,
            pred=config.pred,
            plan=make_plan(regime.process, config.sample, config.train.monitor_steps),
            policy=EXIT_POLICIES["full"](),
            guidance=Guidance(),
            seed=config.eval.selection_seed,
            ids=np.arange(64),
            run=run,
        )
        save_grid(path, images.pixels)
    run.barrier()


def config_hash(config) -> str:
    """Identifies what a measured point depends on: the whole config and the weights' content."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str) + weights_hash(config)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(config) -> str:
    """Identifies a training run's result, wherever its file lies."""
    return hashlib.sha256(checkpoints.file_of(config.nnet_path).read_bytes()).hexdigest()[:16]


def save_training_config(config, run: Run) -> None:
    """training.json and train.jsonl: config and log of the run that made the weights, where they lie in its workdir."""
    weights_file = checkpoints.file_of(config.nnet_path).resolve()  # <workdir>/ckpts/<step>.ckpt/nnet_ema.pth
    meta, log = weights_file.with_name("meta.json"), weights_file.parents[2] / "train.jsonl"
    if meta.is_file() and run.is_main:
        run.write_json("training.json", json.loads(meta.read_text())["config"])
        if log.is_file() and log.parent != run.dir.resolve():
            shutil.copy(log, run.dir / "train.jsonl")
