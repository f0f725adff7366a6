"""What an evaluation keeps, measures again and says: nothing stale, the same records for any number of processes."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import exit_codes, forked, plan_file
from PIL import Image
from test_configs import load

from libs import regimes
from libs.checkpoints import settled
from libs.evaluation import measure, records
from libs.evaluation.evaluate import evaluate
from libs.evaluation.monitor import Monitor
from libs.files import file_hash, read_json
from libs.metrics import Moments, build_extractor
from libs.models import build_model
from libs.run import PROCESS_TIMEOUT, Run


@pytest.fixture
def config(tmp_path):
    """The digits' quick twin with untrained weights, 12 images in batches of 4."""
    config = load("digits_uvit_tiny", "quick")
    torch.manual_seed(0)
    torch.save(build_model(config).state_dict(), tmp_path / "nnet.pth")
    config.nnet_path = str(tmp_path / "nnet.pth")
    config.mixed_precision = "no"
    config.sample.update(n_samples=12, mini_batch_size=4, sample_steps=3)
    config.eval.update(thresholds=(0.6,), seeds=(1, 2), paired=6)
    return config


def run_it(config, directory) -> list[dict]:
    return evaluate(config, regimes.of(config), Run.single(directory))


def changed(config, **settings):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return config


def images(folder, shade: int):
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(shade, shade + 60, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


def measured_points(monkeypatch) -> list[tuple[str, int]]:
    """(point, seed) of every sampling from now on."""
    seen, sample = [], measure.Bench.sample

    def counted(bench, point, seed, *rest):
        seen.append((point.slug, seed))
        return sample(bench, point, seed, *rest)

    monkeypatch.setattr(measure.Bench, "sample", counted)
    return seen


def test_a_point_depends_on_what_it_depends_on(config, tmp_path, monkeypatch):
    """Catches one more threshold, or other timing, that measures every point again; and weights that do not."""
    seen = measured_points(monkeypatch)
    run_it(config, tmp_path / "out")
    seen.clear()
    more = changed(config, eval__thresholds=(0.6, 0.5), eval__timing_runs=2, eval__tolerance=0.1, eval__fixed=(2,))
    assert len(run_it(more, tmp_path / "out")) == 4
    assert {slug for slug, _ in seen} == {"threshold-0.5", "fixed-layer-2"}
    for setting in (dict(eval__paired=5), dict(sample__n_samples=11), dict(eval__seeds=(1, 3)), dict(pred="noise")):
        seen.clear()
        run_it(changed(config, **setting), tmp_path / "out")
        assert {slug for slug, _ in seen} == {"full-depth", "threshold-0.6"}, setting


def test_a_damaged_result_is_measured_again(config, tmp_path, monkeypatch):
    """Catches a traceback, or a value out of nowhere, where quality.json or the full-depth images are damaged."""
    (wanted, early) = run_it(config, tmp_path / "out")
    points = tmp_path / "out" / "points"
    (points / "threshold-0.6" / "quality.json").write_text('{"key": ')
    for file in (points / "full-depth").glob("baseline-*"):
        file.write_bytes(file.read_bytes()[:50])
    seen = measured_points(monkeypatch)
    found = run_it(config, tmp_path / "out")
    assert {slug for slug, _ in seen} == {"threshold-0.6"}
    assert [line["metrics"]["psnr"] for line in found] == [wanted["metrics"]["psnr"], early["metrics"]["psnr"]]


def test_the_reference_is_that_of_the_data(config, tmp_path):
    """Catches statistics of data A that judge data B, in an evaluation and in a training's monitor."""
    dark, bright = images(tmp_path / "dark", 0), images(tmp_path / "bright", 180)
    key = "fd_pixels"
    values = {}
    for name, folder in (("dark", dark), ("bright", bright)):
        alone = run_it(changed(config, eval__real=folder), tmp_path / f"eval-{name}")
        shared = run_it(changed(config, eval__real=folder), tmp_path / "shared")
        assert shared[0]["metrics"][key] == alone[0]["metrics"][key]
        values[name] = alone[0]["metrics"][key]
    assert values["dark"] != values["bright"]
    watched = []
    for folder in (dark, bright):
        one = changed(config, eval__real=folder, train__monitor_samples=8, train__monitor_steps=2)
        model = build_model(one).eval()
        torch.manual_seed(0)
        watched.append(Monitor.open(one, regimes.of(one), Run.single(tmp_path / "training")).quality(model)[key])
    assert watched[0] != watched[1]


def test_a_reference_of_nans_is_refused(config, tmp_path):
    """Catches NaN in results.jsonl, which is not JSON."""
    extractor = build_extractor("pixels", (1, 8, 8), "cpu")
    moments = Moments(extractor.n_features)
    moments.add(torch.rand(9, extractor.n_features))
    statistics = moments.statistics(extractor)
    statistics.sigma[3, 4] = float("nan")
    statistics.save(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match=r"nan.npz has values that are not finite"):
        run_it(changed(config, eval__reference=str(tmp_path / "nan.npz")), tmp_path / "out")


def test_images_are_kept_where_asked(config, tmp_path):
    """Catches sample.path that keeps nothing, or nothing of points measured before."""
    run_it(config, tmp_path / "out")
    kept = tmp_path / "images"
    run_it(changed(config, sample__path=str(kept)), tmp_path / "out")
    assert len(list(kept.glob("*/seed-*/*.png"))) == 2 * 3 * 12
    shown = np.asarray(Image.open(kept / "full-depth" / "seed-1" / "0.png"))
    tile = np.asarray(Image.open(tmp_path / "out" / "points" / "full-depth" / "grid.png").convert("L"))
    assert shown.shape == (8, 8) and (tile[6, 6] == shown[0, 0] or tile[7, 7] == shown[0, 0])


def comparable(directory: Path) -> list[dict]:
    lines = [json.loads(line)["metrics"] for line in (directory / "results.jsonl").read_text().splitlines()]
    timed = ("seconds_per_image", "seconds_per_image_runs", "images_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.slow
def test_records_are_the_same_for_any_number_of_processes(config, tmp_path):
    """Catches processes without a batch or a paired image that crash, and records that depend on their number."""
    cases = [(4, 2), (12, 6), (6, 0), (12, 12)]  # images, of which are compared
    configs = [changed(config, sample__n_samples=n, eval__paired=m, eval__metrics=("kid",)) for n, m in cases]

    def work(processes: int) -> None:
        accelerator = Accelerator(cpu=True, kwargs_handlers=[PROCESS_TIMEOUT])
        for number, config in enumerate(configs):
            evaluate(config, regimes.of(config), Run(tmp_path / f"{processes}-{number}", accelerator))

    log = tmp_path / "log"
    for processes in (1, 2, 3):
        assert exit_codes(forked(partial(work, processes), processes, log)) == [0] * processes, log.read_text()[-3000:]
    for number in range(len(cases)):
        one, *others = (comparable(tmp_path / f"{processes}-{number}") for processes in (1, 2, 3))
        for mine, theirs in ((mine, theirs) for other in others for mine, theirs in zip(one, other, strict=True)):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-9)), key


# ---- records -------------------------------------------------------------------------------------------------------


def line(family, label, seconds, distance, ssim=0.9, **sampler):
    metrics = {"fd_x": distance, "fd_x_selection": distance, "seconds_per_image": seconds, "images_per_s": 1 / seconds}
    metrics |= {"mean_depth": 3.0, "gmacs": 0.1, "psnr": 100.0 if ssim == 1 else 30.0, "ssim": ssim}
    metrics |= {"fd_x_per_seed": [distance] * 3, "seconds_per_image_runs": [seconds] * 3}
    sampler = {"name": "dpm_solver_pp_2m", "steps": 20, "grid": ""} | sampler
    found = dict(family=family, label=label, slug=label.replace(" ", "-"), quality_key="fd_x", depth=7, nfe=20)
    return found | dict(seeds=[1, 2, 3], n_images=64, recommended=False, metrics=metrics, sampler=sampler, exit={})


def said_of(lines, folder):
    run = Run.single(folder)
    run.write_json("config.json", {"eval": {"tolerance": 0.05}})
    records.write_results(lines, run)
    return records.summary_lines(lines, records.claim_of(lines, run))


def test_recommended_is_faster_than_full_depth(tmp_path):
    """Catches a recommendation that costs more than what it replaces."""
    lines = [line("full", "full depth", 1.0, 5.0), line("threshold", "threshold 0.9", 1.1, 5.0)]
    said = said_of(lines, tmp_path)
    assert not lines[1]["recommended"]
    assert "No early exit is both faster than full depth and at most 5 % worse." in said.replace("\xa0", " ")
    lines.append(line("threshold", "threshold 0.8", 0.9, 5.2, ssim=1))
    said = said_of(lines, tmp_path)
    assert lines[2]["recommended"] and "identical to full depth" in said and "100.0 dB" not in said


def test_the_command_recommends_what_the_report_does(tmp_path):
    """Catches two rules: the fastest of all by the command, the most times as fast as its rival by the report."""
    lines = [
        line("full", "full depth", 1.0, 5.0),
        line("steps", "full depth, 5 steps", 0.30, 5.1, steps=5, grid="power:2"),
        line("steps", "full depth, 8 steps", 0.50, 4.0, steps=8, grid="power:2"),
        line("planned", "planned 0.25", 0.29, 5.1),
        line("planned", "planned 0.3", 0.31, 4.0),
    ]
    said = said_of(lines, tmp_path)
    assert [r["label"] for r in lines if r["recommended"]] == ["planned 0.3"]
    assert "recommended (planned 0.3): " in said and "The best plain sampling of that quality is full depth, 8" in said


def test_results_are_json(tmp_path):
    """Catches NaN in a file that is called JSON."""
    assert records.finite(float("nan")) is None and records.finite(1.5) == 1.5
    with pytest.raises(ValueError, match="JSON"):
        records.write_results([{"value": float("inf")}], Run.single(tmp_path))
    assert not (tmp_path / "results.jsonl").exists()


def test_the_reference_says_what_it_compared(config, tmp_path):
    """Catches a distance of halves whose number of images is nowhere."""
    run_it(config, tmp_path / "out")
    found = read_json(tmp_path / "out" / "reference.json", "reference")
    assert found["n_half"] == found["n_real"] // 2 and found["fd_pixels_real_halves"] > 0 and found["key"]


def checkpoints_of_a_run(config, tmp_path) -> Path:
    """run/last.ckpt, which points at the first of two checkpoints of other weights."""
    for step in (1, 2):
        folder = tmp_path / "run" / "ckpts" / f"{step}.ckpt"
        folder.mkdir(parents=True)
        torch.manual_seed(step)
        torch.save(build_model(config).state_dict(), folder / "nnet_ema.pth")
    (tmp_path / "run" / "last.ckpt").symlink_to("ckpts/1.ckpt")
    return tmp_path / "run" / "last.ckpt"


def test_last_moves_on_while_it_is_evaluated(config, tmp_path, monkeypatch):
    """Catches results of one checkpoint that count as those of the next, to which last.ckpt points meanwhile."""
    last = checkpoints_of_a_run(config, tmp_path)
    assert settled(last) == str(tmp_path / "run" / "ckpts" / "1.ckpt") == settled(last.parent)
    assert settled(last / "nnet_ema.pth") == str(tmp_path / "run" / "ckpts" / "1.ckpt" / "nnet_ema.pth")
    (tmp_path / "newest").symlink_to("run/last.ckpt")
    assert settled(tmp_path / "newest") == settled(last)
    first = changed(config, nnet_path=settled(last))
    wanted = file_hash(tmp_path / "run" / "ckpts" / "1.ckpt" / "nnet_ema.pth")
    sample = measure.Bench.sample

    def moves(*arguments):
        (last.parent / "new").symlink_to("ckpts/2.ckpt")
        (last.parent / "new").replace(last)
        shutil.rmtree(last.parent / "ckpts" / "1.ckpt")  # as a training removes all but the newest
        monkeypatch.setattr(measure.Bench, "sample", sample)
        return sample(*arguments)

    monkeypatch.setattr(measure.Bench, "sample", moves)
    before = run_it(first, tmp_path / "out")
    after = run_it(changed(config, nnet_path=settled(last)), tmp_path / "out")
    alone = run_it(changed(config, nnet_path=str(tmp_path / "run" / "ckpts" / "2.ckpt")), tmp_path / "alone")
    assert {line["weights"] for line in before} == {wanted} and after[0]["weights"] != wanted
    assert [line["metrics"]["fd_pixels"] for line in after] == [line["metrics"]["fd_pixels"] for line in alone]


def test_images_of_two_evaluations_are_not_mixed(config, tmp_path):
    """Catches a folder that is said to hold the images of A, complete, and holds those of B."""
    config.sample.path = str(tmp_path / "images")
    run_it(config, tmp_path / "a")
    with pytest.raises(ValueError, match="holds the images of another evaluation"):
        run_it(changed(config, sample__n_samples=10), tmp_path / "b")
    run_it(changed(config, eval__paired=3), tmp_path / "a")  # what is measured of them is another matter


def test_the_log_is_that_of_the_weights(config, tmp_path):
    """Catches curves of one training on the page of weights that have none."""
    last = checkpoints_of_a_run(config, tmp_path)
    (last / "meta.json").write_text(json.dumps({"config": config.to_dict()}))
    (last.parent / "train.jsonl").write_text('{"step": 777}\n')
    run_it(changed(config, nnet_path=str(last)), tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").is_file() and (tmp_path / "out" / "training.json").is_file()
    run_it(config, tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists() and not (tmp_path / "out" / "training.json").exists()


def test_a_killed_evaluation_leaves_the_old_settings(config, tmp_path, monkeypatch):
    """Catches config.json of a new evaluation beside the results of the old one, to be timed together."""
    run_it(config, tmp_path / "out")
    before = read_json(tmp_path / "out" / "config.json", "then")
    monkeypatch.setattr(measure.Bench, "sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_it(changed(config, sample__sample_steps=4), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json", "now") == before


def test_noise_that_chose_a_plan_is_not_reported(config, tmp_path):
    """Catches selection that leaks into the reported seeds."""
    points = tuple(build_model(config).points)
    plan = json.loads(Path(plan_file(points)).read_text())
    plan["plan"]["layers"] = [1, 2, points[-1]]
    for seeds, refused in (({"learned": [7], "selected": 2}, True), ({"learned": 7, "reported": 2}, False)):
        (tmp_path / "plan.json").write_text(json.dumps(plan | {"seeds": seeds}))
        with pytest.raises(ValueError, match=r"eval.seeds has \[2\], with which") if refused else nullcontext():
            run_it(changed(config, eval__sweep=(f"plan={tmp_path / 'plan.json'}",)), tmp_path / "out")
