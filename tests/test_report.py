"""The report: right sentences on constructed points, honest errors, and one self-contained page."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libs import report
from libs.report import panels, plots, verdict
from libs.report.read import Exits, Uncertainty
from libs.report.text import duration, family_name, plus_minus, sig

DEPTH, STEPS, KEY = 7, 20, "fd_digits_cnn"

# family, label, mean depth, steps, seconds per 1000 images, quality: in the shape a small network on digits gives
SWEEP = (
    ("full", "full depth", 7.0, 20, 3.58, 25.9),
    ("threshold", "threshold 0.99", 5.2, 20, 2.73, 25.8),
    ("threshold", "threshold 0.98", 4.1, 20, 2.13, 26.0),
    ("threshold", "threshold 0.95", 3.4, 20, 1.80, 27.4),
    ("threshold", "threshold 0.90", 2.5, 20, 1.44, 41.5),
    ("calibrated", "calibrated 60 %", 4.2, 20, 2.06, 26.4),
    ("calibrated", "calibrated 40 %", 2.9, 20, 1.57, 38.0),
    ("fixed", "fixed layer 6", 6.0, 20, 2.96, 26.1),
    ("fixed", "fixed layer 4", 4.0, 20, 2.40, 26.0),
    ("fixed", "fixed layer 3", 3.0, 20, 1.82, 39.0),
    ("fixed", "fixed layer 2", 2.0, 20, 1.23, 92.0),
    ("fixed", "fixed layer 1", 1.0, 20, 0.69, 185.0),
    ("steps", "15 steps", 7.0, 15, 2.42, 40.5),
    ("steps", "10 steps", 7.0, 10, 1.79, 57.0),
    ("steps", "8 steps", 7.0, 8, 1.43, 77.0),
    ("steps", "6 steps", 7.0, 6, 1.07, 230.0),
)


def rotated(values: list, turn: int) -> list:
    return values[turn % len(values) :] + values[: turn % len(values)]


def record(family, label, mean_depth, steps, ms, quality, spread=0.4, timing=0.02, recommended=False, **more) -> dict:
    """One line of results.jsonl, as the evaluation writes it."""
    turn = sum(map(ord, label))  # noise that differs between points: seeds and runs do not move in step
    runs = rotated([ms * 1e-3 * (1 + timing * offset) for offset in (-1, -0.4, 0, 0.5, 1)], turn)
    metrics = {
        KEY: quality,
        f"{KEY}_per_seed": rotated([quality - spread, quality, quality + spread], turn),
        "psnr": 60.0 if family == "full" else 20 + 3 * mean_depth,
        "ssim": 1.0 if family == "full" else 1 - 1 / (1 + 8 * mean_depth),
        "mean_depth": mean_depth,
        "gmacs": 0.021 * steps * (0.15 + mean_depth),
        "seconds_per_image": ms * 1e-3,
        "seconds_per_image_runs": runs,
        "images_per_s": 1e3 / ms,
    }
    return {
        "slug": label.replace(" ", "-").replace("%", "percent"),
        "family": family,
        "label": label,
        "exit": {"name": family},
        "sampler": {"name": "dpm_solver_pp_2m", "steps": steps},
        "nfe": steps,
        "seeds": [1, 2, 3],
        "n_images": 2048,
        "batch_size": 256,
        "guidance": {"scale": 0.0, "pair": "free"},
        "quality_key": KEY,
        "metrics": metrics,
        "depth": DEPTH,
        "recommended": recommended,
        "config_hash": "5d3f0c1a",
        "commit": "0f1e2d3c",
        "versions": {"python": "3.11.2", "torch": "2.9.0"},
        "device": "CPU, 2 cores",
        "threads": 2,
        "time": "2025-01-01T12:00:00",
    } | more


def exits(n: int = 600, branches: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """t (calls,) and used (calls, branches, n): deep near the data, and a little deeper for some images."""
    rng = np.random.default_rng(seed)
    t = np.linspace(1, 1e-3, STEPS)
    mean = 1.6 + 5.2 / (1 + np.exp(9 * (t - 0.42)))  # (calls,)
    noise = rng.normal(0, 0.45, (STEPS, branches, n)) + rng.normal(0, 0.3, (1, branches, n))
    return t, np.clip(np.rint(mean[:, None, None] + noise), 1, DEPTH).astype(np.uint8)


def write_results(directory: Path, records: list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def evaluation(directory: Path, branches: int = 1, size: int = 12) -> Path:
    """A complete evaluation directory with plausible contents; the recommended point is `threshold 0.98`."""
    rng = np.random.default_rng(1)
    records = [record(*row, recommended=row[1] == "threshold 0.98") for row in SWEEP]
    write_results(directory, records)
    (directory / "config.json").write_text(json.dumps({"nnet": {"depth": 6, "note": "<b>&"}, "seed": 1234}))
    (directory / "reference.json").write_text(json.dumps({f"{KEY}_real_halves": 4.65, "n_real": 1797}))
    y, x = np.mgrid[:size, :size] / size - 0.5
    rings = [np.exp(-((np.hypot(x - a, y - b) - 0.25) ** 2) / 0.008) for a, b in rng.normal(0, 0.12, (64, 2))]
    for r in records:
        folder = directory / "points" / r["slug"]
        folder.mkdir(parents=True)
        noise = 0.004 * max(0.0, r["metrics"][KEY] - 26)
        tiles = [np.clip(ring + noise * rng.normal(size=ring.shape), 0, 1) for ring in rings]
        grid = np.block([[tiles[8 * i + j] for j in range(8)] for i in range(8)])
        Image.fromarray((255 * grid).astype(np.uint8)).save(folder / "grid.png")
        if r["family"] in ("threshold", "calibrated"):
            t, used = exits(branches=branches)
            np.savez(folder / "trace.npz", t=t, used=used, depth=DEPTH, asked=[1, 3], ids=np.arange(used.shape[2]))
    t, k, n = np.linspace(1, 0.05, 8), np.arange(1, DEPTH), 3
    sharp = np.stack(rings[:n])  # (n, H, W)
    clean = (1 - t)[:, None, None, None] * sharp + t[:, None, None, None] * rng.uniform(0, 1, (8, n, size, size))
    fall = (0.15 + t)[:, None, None, None, None] / k[None, :, None, None, None]
    error = fall * (0.2 + sharp) * rng.uniform(0.6, 1.4, (8, len(k), n, size, size))
    u = np.tanh(fall * (0.25 + sharp)) * rng.uniform(0.9, 1.1, error.shape)
    x0 = (255 * clean[:, :, None]).astype(np.uint8)  # (T, n, 1, H, W)
    np.savez(directory / "umaps.npz", t=t, k=k, u=u, error=error, x0=x0, ids=np.arange(n))
    with open(directory / "train.jsonl", "w") as file:
        for step in range(10, 1510, 10):
            down = 0.08 + 0.5 * np.exp(-step / 200) + 0.004 * rng.normal()
            row = {
                "step": step,
                "seconds": 0.17 * step,
                "loss": 3 * down,
                "simple": down,
                "uem": down / 2,
                "layers": 2 * down,
            }
            row |= {f"err_{i}": down * (1 + 0.3 / i) for i in range(1, DEPTH + 1)}
            row |= {f"u_{i}": 0.9 * down * (1 + 0.3 / i) for i in range(1, DEPTH + 1)}
            file.write(json.dumps(row | {"lr": 1e-3, "grad_norm": 1.0}) + "\n")
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report on one complete directory, written by the command."""
    directory = evaluation(tmp_path_factory.mktemp("run") / "digits-tiny")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.report", str(directory)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = directory / "report.html"
    assert json.loads(done.stdout)["report"] == str(path)
    return path.read_text(encoding="utf-8")


def parse(html: str) -> ElementTree.Element:
    doctype, _, body = html.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(body)


def text_of(html: str) -> str:
    body = parse(html).find("body")
    return re.sub(r"\s+", " ", " ".join(body.itertext()))


def svgs(html: str) -> list[str]:
    return [base64.b64decode(d).decode() for d in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)]


def sentences(records: list[dict], tmp_path: Path, floor: float | None = None) -> list[verdict.Verdict]:
    points = report.read([write_results(tmp_path, records)])[0].points
    return verdict.verdicts(points, floor)


# ---- the page ------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(page):
    """An unclosed tag, an unescaped label or config, a script, or anything that a reader's browser would fetch."""
    root = parse(page)
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "link", "iframe", "object", "video"}
    for element in root.iter():
        for name in ("src", "srcset", "href"):
            value = element.get(name, "#")
            assert value.startswith(("#", "data:image/")), f"{element.tag} fetches {value[:60]}"
    style = root.find("head/style").text
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    for svg in svgs(page):
        ElementTree.fromstring(svg)
        assert "http" not in re.sub(
            r'(xmlns(:\w+)?|rdf:resource)="[^"]*"|<!DOCTYPE[^>]*>|"http://www.w3[^"]*"', "", svg
        )


def test_page_names_every_point_and_every_family_in_every_plot(page):
    """A point or family that is dropped from the table, or a series without its direct label."""
    text = text_of(page)
    for family, label, *_ in SWEEP:
        assert label in text, label
        assert family_name(family) in text, family
    frontiers = [svg for svg in svgs(page) if "smaller is better" in svg]
    assert len(frontiers) == 3 * 4
    for svg in frontiers:
        for name in (
            "threshold",
            "calibrated",
            "fixed layer",
            "fewer steps, full depth",
            "full depth",
            "real-halves floor",
        ):
            assert f">{name}" in svg, name


def test_page_serves_both_themes_and_both_widths(page):
    """A plot whose dark or narrow rendering is missing, or is the light or wide one under another name."""
    pictures = list(parse(page).iter("picture"))
    assert len(pictures) >= 8
    for picture in pictures:
        media = [source.get("media") for source in picture.iter("source")]
        assert media == [
            "(max-width: 640px) and (prefers-color-scheme: dark)", "(max-width: 640px)", "(prefers-color-scheme: dark)",
        ]  # fmt: skip
        images = [source.get("srcset") for source in picture.iter("source")] + [picture.find("img").get("src")]
        assert len(set(images)) == 4
        assert picture.find("img").get("alt")
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page


def test_page_states_conventions_ends_of_time_and_provenance(page):
    """A reader who cannot tell MACs from FLOPs, the noise end from the data end, or how a number was made."""
    text = text_of(page)
    for needed in (
        "multiply-accumulates", "attention products", "uncertainty estimators", "images/s", "CPU, 2 cores", "0f1e2d3c",
        "torch 2.9.0", "halves of 1797 real images", "[1, 2, 3]", "256", "time / MACs saved", "Time alone explains",
    ):  # fmt: skip
        assert needed in text, needed
    drawn = "".join(svgs(page))
    for needed in ("noise end", "data end", "share of images", "mean depth of one image", "predicted uncertainty u"):
        assert needed in drawn, needed


def test_grids_are_embedded_unchanged_and_cannot_close_their_tag(page, tmp_path):
    """A re-encoded sample grid, or a label that is pasted into HTML without escaping."""
    uris = re.findall(r'class="pixels" src="data:image/png;base64,([^"]+)"', page)
    assert len(uris) == len(SWEEP)
    assert all(base64.b64decode(uri).startswith(b"\x89PNG") for uri in uris)
    odd = record("threshold", '<u> & "0.9"', 4, 20, 2, 26) | {"slug": "odd"}
    html = report.render(report.read([write_results(tmp_path, [record(*SWEEP[0]), odd])]))
    assert '<u> & "0.9"' in text_of(html)


def test_missing_pieces_become_sentences(tmp_path):
    """A crash, or silence, where an evaluation was run without traces, grids, maps, floor, log, times or seeds."""
    bare = record(*SWEEP[0])
    bare["metrics"] = {KEY: 25.9}
    for key in ("versions", "device", "threads", "seeds", "guidance", "sampler", "batch_size", "commit"):
        del bare[key]
    text = text_of(report.render(report.read([write_results(tmp_path / "bare", [bare])])))
    for needed in (
        "No early-exit policy was evaluated", "No point reports its measured time", "No point reports its arithmetic",
        "The real-halves floor was not measured", "No sample grid was saved", "No uncertainty maps were saved",
        "No training log", "No config.json", "not recorded", "no point can be called faster",
    ):  # fmt: skip
        assert needed in text, needed
    alone = write_results(tmp_path / "alone", [record(*SWEEP[2])])
    text = text_of(report.render(report.read([alone])))
    assert "No full-depth point was evaluated" in text and "No trace was saved for threshold 0.98" in text


def test_guidance_shows_both_branches(tmp_path):
    """Averaging or dropping the null branch, which may exit elsewhere."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2])]
    folder = write_results(tmp_path, rows) / "points" / rows[1]["slug"]
    folder.mkdir(parents=True)
    t, used = exits(branches=2)
    np.savez(folder / "trace.npz", t=t, used=used, depth=DEPTH)
    html = report.render(report.read([tmp_path]))
    assert "conditional branch" in "".join(svgs(html)) and "null branch" in "".join(svgs(html))
    assert "of the conditional branch" in text_of(html) and "pairing: free" in text_of(html)


def test_two_directories_share_the_plots_and_name_their_run(tmp_path):
    """Points of two runs that cannot be told apart, or a later run taken as the reference."""
    first = write_results(tmp_path / "base", [record(*row) for row in SWEEP[:3]])
    second = write_results(tmp_path / "small", [record("full", "full depth", 5, 20, 2.0, 26.2)])
    html = report.render(report.read([first, second]))
    text = text_of(html)
    assert "threshold · base" in text and "full depth · small" in text
    assert "Early exit loses" in text and "the fastest without early exit is full depth · small" in text
    assert "26.2 against 25.9" in text
    assert "Where images leave · small" in text


# ---- verdicts ------------------------------------------------------------------------------------------------------


def test_verdict_early_exit_wins(tmp_path):
    """A winner read off the wrong column, family or bar: 0.90 is faster but too bad, layer 6 is good but slower."""
    first, second, *rest = sentences([record(*row, spread=0.2) for row in SWEEP], tmp_path, floor=4.65)
    assert (first.lead, first.tone) == ("Early exit wins.", "good")
    assert "fastest early exit is threshold 0.95 (1.80\u00a0ms per image)" in first.text
    assert "without early exit is fixed layer 4 (2.40\u00a0ms per image): early exit has 1.33× the speed" in first.text
    assert "27.4 against 26.0 (+5\u00a0%, outside the noise over 3 seeds)" in first.text
    assert "All timing runs agree." in first.text
    assert second.lead == "At a stricter bar, early exit wins." and "calibrated 60 %" in second.text
    by_lead = {found.lead: found.text for found in rest}
    assert "15 steps, is at 40.5 against 25.9 (+56\u00a0%" in by_lead["Fewer steps, full depth."]
    assert by_lead["Fewer steps, full depth."].startswith("No point within")
    assert "5.6 times that" in by_lead["The floor."]


def test_verdict_early_exit_loses_to_a_fixed_layer(tmp_path):
    """A report that praises early exit by comparing it only with full depth."""
    rows = [record(*SWEEP[0]), record("threshold", "threshold 0.98", 4.1, 20, 2.6, 26.0), record(*SWEEP[8])]
    first, second, *rest = sentences(rows, tmp_path)
    assert (first.lead, first.tone) == ("Early exit loses.", "bad")
    assert "fastest without early exit is fixed layer 4" in first.text and "0.923× the speed" in first.text
    assert second.lead == "At a stricter bar, early exit loses."
    equal = next(found for found in rest if found.lead == "At equal time.")
    assert "fixed layer 4 reaches 26.0 against 26.0" in equal.text


def test_verdict_early_exit_loses_when_it_is_slower_than_full_depth(tmp_path):
    """Overhead of exits on a small network hidden behind a fall in GMACs."""
    rows = [record(*SWEEP[0]), record("threshold", "threshold 0.98", 4.1, 20, 4.2, 26.0)]
    first, *_ = sentences(rows, tmp_path)
    assert first.lead == "Early exit loses." and "fastest without early exit is full depth" in first.text
    assert "no evidence for early exit" in first.text


def test_verdict_early_exit_loses_when_nothing_passes_the_bar(tmp_path):
    """The least bad point presented as good enough."""
    first, *_ = sentences([record(*SWEEP[0]), record(*SWEEP[4]), record(*SWEEP[8])], tmp_path)
    assert first.lead == "Early exit loses."
    assert "None of its points is within 10\u00a0% of full-depth quality, while fixed layer 4 is" in first.text
    first, *_ = sentences([record(*SWEEP[0]), record(*SWEEP[4])], tmp_path / "alone")
    assert "nothing else is faster than full depth" in first.text


def test_verdict_overlapping_timings_are_a_tie(tmp_path):
    """A win by less than the noise of the clock."""
    rows = [record(*SWEEP[0]), record(*SWEEP[8]), record("threshold", "threshold 0.98", 4.1, 20, 2.38, 26.0)]
    first, *_ = sentences(rows, tmp_path)
    assert (first.lead, first.tone) == ("A tie.", "even")


def test_verdict_without_times_does_not_speak_of_speed(tmp_path):
    """GMACs sold as a speed-up."""
    rows = [record(*row) for row in SWEEP]
    for row in rows:
        for key in ("seconds_per_image", "seconds_per_image_runs", "images_per_s"):
            del row["metrics"][key]
    found = sentences(rows, tmp_path)
    assert "GMACs are not a speed-up" in found[0].text
    assert not any("the speed" in each.text.replace("a speed-up", "") for each in found)


def test_noise_is_that_of_the_difference(tmp_path):
    """One seed called certain; a spread that both points share called noise; another seed's noise taken for shared."""
    per_seed = {"full": [25.5, 26.0, 26.5], "shared": [26.0, 26.4, 27.1], "own": [27.1, 25.9, 26.5], "one": [30.0]}
    rows = [record("full" if label == "full" else "threshold", label, 4, 20, 2, 26.5) for label in per_seed]
    rows += [record("threshold", label, 4, 20, 2, quality) for label, quality in (("other", 27.3), ("far", 27.5))]
    for row, values in zip(rows, per_seed.values(), strict=False):
        row["metrics"][f"{KEY}_per_seed"], row["metrics"][KEY] = values, sum(values) / len(values)
    for row in rows[4:]:
        row["seeds"] = [4, 5, 6]
        row["metrics"][f"{KEY}_per_seed"] = [row["metrics"][KEY] + offset for offset in (-0.5, 0, 0.5)]
    full, shared, own, one, other, far = report.read([write_results(tmp_path, rows)])[0].points
    # differences 0.5, 0.4, 0.6: mean 0.5, standard error 0.058; then 1.6, -0.1, 0: mean 0.5, standard error 0.55
    assert [verdict.outside_noise(p, full) for p in (shared, own, one)] == [True, False, None]
    # other seeds: the limit is 2 sqrt(0.25 + 0.25) = 1.414
    assert [verdict.outside_noise(p, full) for p in (other, far)] == [False, True]
    assert "noise is unknown" in verdict.against(one, full)


def test_timings_are_compared_run_by_run(tmp_path):
    """A slow minute of the machine that hits both points in turn is no tie; one lost run is."""
    rows = [record("full", label, 7, 20, 3, 26.0) for label in "abc"]
    for row, runs in zip(rows, ([1.0, 2.0, 3.0], [1.1, 2.2, 3.3], [0.9, 2.1, 3.2]), strict=True):
        row["metrics"]["seconds_per_image_runs"] = runs
    a, b, c = report.read([write_results(tmp_path, rows)])[0].points
    assert [verdict.timings_overlap(a, p) for p in (b, c)] == [False, True]


def test_points_that_cannot_be_compared_are_flagged(tmp_path):
    """Distances from different numbers of images, or times from different machines, in one ranking."""
    other = record(*SWEEP[2], n_images=512, device="another machine")
    found = [each for each in sentences([record(*SWEEP[0]), other], tmp_path) if each.lead == "Careful."]
    assert [each.text.split(" (")[0] for each in found] == ["Points differ in n_images", "Points differ in device"]


def test_recommended_point_and_fixed_layer_use_the_same_bar(tmp_path):
    """A fixed layer chosen to look bad, or a recommendation that ignores the mark in the results."""
    points = report.read([write_results(tmp_path / "a", [record(*row) for row in SWEEP])])[0].points
    full = verdict.full_depth(points)
    assert verdict.recommend(points, full)[0].label == "threshold 0.95"
    assert verdict.best_fixed(points, full).label == "fixed layer 4"
    marked = [record(*row, recommended=row[1] == "threshold 0.99") for row in SWEEP]
    points = report.read([write_results(tmp_path / "b", marked)])[0].points
    assert verdict.recommend(points, full)[0].label == "threshold 0.99"


def test_saving_ratio_by_hand(tmp_path):
    """The ratio upside down, or of what remains instead of what is saved."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2])]
    rows[0]["metrics"] |= {"gmacs": 4.0, "seconds_per_image": 2.0}
    rows[1]["metrics"] |= {"gmacs": 2.0, "seconds_per_image": 1.2}
    full, point = report.read([write_results(tmp_path, rows)])[0].points
    assert verdict.saving_ratio(point, full) == pytest.approx(0.4 / 0.5)
    assert verdict.saving_ratio(full, full) is None


def test_variance_shares_by_hand():
    """Time and image exchanged, or an interaction counted as time: the question whether exits are only a schedule."""
    by_time = np.array([[1, 1, 1], [3, 3, 3], [5, 5, 5]])  # (calls, n)
    shares = verdict.variance_shares(by_time)
    assert (shares.time, shares.image, shares.both) == pytest.approx((1, 0, 0))
    assert verdict.variance_shares(by_time.T).image == pytest.approx(1)
    assert verdict.variance_shares(np.array([[1, 3], [3, 1]])).both == pytest.approx(1)
    mixed = verdict.variance_shares(np.array([[1, 2], [3, 4]]))  # total 1.25, calls 1, images 0.25
    assert (mixed.time, mixed.image) == pytest.approx((0.8, 0.2))
    same = Exits(np.array([1.0, 0.5]), np.full((2, 1, 4), 3, np.uint8), 7)
    assert verdict.exit_sentence(same).startswith("Every image leaves after layer 3")


def test_exit_shares_count_layers_not_images():
    """A heat map whose columns are not shares of the same images, or that is off by one layer."""
    used = np.array([[[1, 1, 7, 3]], [[7, 7, 7, 7]]], np.uint8)  # (calls, branches, n)
    shares = panels.exit_shares(Exits(np.array([1.0, 0.0]), used, 7), 0)
    assert shares.shape == (8, 2)
    assert shares[[1, 3, 7], 0] == pytest.approx([0.5, 0.25, 0.25]) and shares[7, 1] == 1
    assert shares.sum(axis=0) == pytest.approx(1)


def test_correlation_within_cells_ignores_what_time_explains():
    """u that only knows the time called a good estimator of the error in a pixel."""
    rng = np.random.default_rng(0)
    t = np.linspace(1, 0.1, 6)[:, None, None, None, None]
    error, u = t + 0.05 * rng.random((6, 2, 3, 8, 8)), t + 0.05 * rng.random((6, 2, 3, 8, 8))
    maps = Uncertainty(t.ravel(), np.arange(2), u, error, np.zeros(1), np.arange(3))
    every, within = verdict.correlations(maps)
    assert every > 0.9 and abs(within) < 0.2
    assert verdict.spearman(np.array([1, 2, 3.0]), np.array([1, 8, 27.0])) == pytest.approx(1)
    assert verdict.spearman(np.ones(3), np.arange(3.0)) is None


# ---- files that are wrong ------------------------------------------------------------------------------------------


def broken(field: str, value) -> dict:
    row = record(*SWEEP[2])
    if field in row:
        row[field] = value
    else:
        row["metrics"][field] = value
    return row


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (broken("slug", ""), "`slug`"),
        (broken("slug", "../elsewhere"), "single path component"),
        (broken("nfe", 0), "`nfe`"),
        (broken("depth", "7"), "`depth`"),
        (broken("metrics", None), "`metrics`"),
        (broken("quality_key", "fd_other"), "fd_other"),
        (broken("quality_key", "psnr"), "larger is better"),
        (broken(KEY, float("nan")), "finite"),
        (broken("seconds_per_image", -1), "positive"),
        (broken(f"{KEY}_per_seed", "25"), "list"),
        (broken("gmacs", "many"), "`gmacs`"),
    ],
)
def test_bad_records_name_file_line_and_field(tmp_path, row, says):
    """A traceback from deep inside a plot, or a point that is silently left out."""
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: ") as caught:
        report.read([write_results(tmp_path, [record(*SWEEP[0]), row])])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.jsonl", "", "empty"),
        ("results.jsonl", '{"slug": "full"', "line 1: not JSON"),
        ("results.jsonl", "\n[1]\n", "line 2: a JSON object is needed"),
        ("config.json", "{", "config.json, line 1"),
        ("reference.json", "[]", "JSON object"),
        ("train.jsonl", '{"step": 1, "loss": 2}\n{"loss": 2}\n', "train.jsonl, line 2"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    """A parse error without the file it came from."""
    write_results(tmp_path, [record(*SWEEP[0])])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        report.read([tmp_path])
    assert says in str(caught.value)


def test_bad_arrays_and_grids_are_named(tmp_path):
    """A broadcasting error, or a broken picture in the page."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2])]
    folder = write_results(tmp_path, rows) / "points" / rows[1]["slug"]
    folder.mkdir(parents=True)
    run = report.read([tmp_path])[0]
    np.savez(folder / "trace.npz", t=np.ones(3), used=np.ones((4, 1, 5)), depth=7)
    with pytest.raises(ValueError, match="trace.npz.*calls"):
        run.exits(run.points[1])
    np.savez(folder / "trace.npz", t=np.ones(4), used=np.full((4, 1, 5), 9), depth=7)
    with pytest.raises(ValueError, match="trace.npz.*9 layers"):
        run.exits(run.points[1])
    (folder / "grid.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="grid.png.*not a PNG"):
        run.grid(run.points[1])
    (tmp_path / "umaps.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="umaps.npz"):
        run.uncertainty()
    np.savez(tmp_path / "umaps.npz", t=np.ones(2))
    with pytest.raises(ValueError, match="lacks the arrays k, u, error, x0, ids"):
        run.uncertainty()


def test_directories_must_exist_differ_and_agree(tmp_path):
    """Two metrics on one axis, or one run compared with itself."""
    first = write_results(tmp_path / "a", [record(*SWEEP[0])])
    row = record(*SWEEP[0])
    row["quality_key"], row["metrics"] = "fid", {"fid": 3.0}
    second = write_results(tmp_path / "b", [row])
    with pytest.raises(ValueError, match="different quality metrics"):
        report.read([first, second])
    with pytest.raises(ValueError, match="given twice"):
        report.read([first, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match="no such file"):
        report.read([tmp_path / "none"])


def test_command_ends_with_usage_and_leaves_no_report(tmp_path, capsys):
    """A traceback at the user, or half a page that looks like a report."""
    from scripts.report import main

    write_results(tmp_path, [broken("nfe", 0)])
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2 and "results.jsonl, line 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*report*"))


def test_a_point_evaluated_twice_counts_once(tmp_path):
    """The stale line of a restarted sweep drawn beside the new one."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2]), record("threshold", "threshold 0.98", 4, 20, 2, 30.0)]
    run = report.read([write_results(tmp_path, rows)])[0]
    assert [point.quality for point in run.points] == [25.9, 30.0]
    assert "threshold-0.98" in run.notes[0]


def test_numbers_as_text():
    """Exponents, spurious digits and hyphens for minus signs in a table."""
    assert [sig(x) for x in (0.00123, 0.9996, 25.94, 999.6, 12345.6, -3, 0, None)] == [
        "0.00123", "1.00", "25.9", "1\u202f000", "12\u202f346", "−3.00", "0", "–",
    ]  # fmt: skip
    assert [duration(x) for x in (0.69e-3, 2.5, 40e-6)] == ["0.690\u00a0ms", "2.50\u00a0s", "40.0\u00a0µs"]
    assert plus_minus(25.94, 0.42) == "25.94\u00a0±\u00a00.42" and plus_minus(185.3, 1.9) == "185.3\u00a0±\u00a01.9"
    assert plots.family_order([])[:3] == ["threshold", "fixed", "steps"]
