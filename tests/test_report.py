"""The report: one self-contained page, true numbers on it, files of earlier versions, and honest errors."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libs import report
from libs.report import figures, page
from libs.report.read import Exits, Uncertainty, tiles
from libs.report.statistics import Estimate
from libs.report.text import decibels, family_name, sig, signed, speedup_text
from libs.sampling.images import save_grid
from scripts import report as command

RECORDED = Path(__file__).parent / "golden" / "evaluation"  # written by the evaluation before this page existed

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
        f"{KEY}_selection": quality,
        "psnr": 100.0 if family == "full" else 20 + 3 * mean_depth,
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
    """A complete evaluation directory with plausible contents; the recommended point is `threshold 0.95`."""
    rng = np.random.default_rng(1)
    records = [record(*row) for row in SWEEP]
    write_results(directory, records)
    (directory / "config.json").write_text(json.dumps({"nnet": {"note": "<b>&"}, "eval": {"tolerance": 0.1}}))
    (directory / "reference.json").write_text(json.dumps({f"{KEY}_real_halves": 4.65, "n_real": 1797}))
    y, x = np.mgrid[:size, :size] / size - 0.5
    rings = np.stack([np.exp(-((np.hypot(x - a, y - b) - 0.25) ** 2) / 0.008) for a, b in rng.normal(0, 0.12, (64, 2))])
    for r in records:
        folder = directory / "points" / r["slug"]
        folder.mkdir(parents=True)
        noise = 0.004 * max(0.0, r["metrics"][KEY] - 26)
        pixels = 255 * np.clip(rings + noise * rng.normal(size=rings.shape), 0, 1)
        save_grid(folder / "grid.png", torch.tensor(pixels[:, None].astype(np.uint8)))
        t, used = exits(branches=branches)
        used = used if r["family"] in ("threshold", "calibrated") else np.full_like(used, r["metrics"]["mean_depth"])
        np.savez(folder / "trace.npz", t=t, used=used, depth=DEPTH, asked=[1, 3], ids=np.arange(used.shape[2]))
    t, k, n = np.linspace(1, 0.05, 8), np.arange(1, DEPTH + 1), 3
    error = np.abs(rng.normal(size=(8, len(k), n, size, size))) / k[None, :, None, None, None]
    error[:, -1] = 0
    x0 = (255 * rng.random((8, n, 1, size, size))).astype(np.uint8)
    np.savez(directory / "umaps.npz", t=t, k=k, u=np.tanh(error), error=error, x0=x0, ids=np.arange(n))
    with open(directory / "train.jsonl", "w") as file:
        for step in range(10, 1510, 10):
            down = 0.08 + 0.5 * np.exp(-step / 200)
            row = {"step": step, "seconds": 0.17 * step, "loss": 3 * down, "simple": down, "uem": 0.0}
            row |= {f"err_{i}": down * (1 + 0.3 / i) for i in range(1, DEPTH + 1)}
            file.write(json.dumps(row) + "\n")
    return directory


def html_of(*directories, output=None) -> str:
    return (
        report.load_report(directories)
        .write(output or Path(directories[0]) / "report.html")
        .read_text(encoding="utf-8")
    )


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> str:
    """The page on one complete directory, written by the command."""
    directory = evaluation(tmp_path_factory.mktemp("run") / "digits-tiny")
    command.main([str(directory)])
    return (directory / "report.html").read_text(encoding="utf-8")


def parse(html: str) -> ElementTree.Element:
    doctype, _, body = html.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(body)


def text_of(html: str) -> str:
    body = parse(html).find("body")
    return re.sub(
        r"\s+", " ", " ".join(t for e in body.iter() if e.tag != "script" for t in (e.text or "", e.tail or ""))
    )


# ---- the page ------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_fetches_nothing(complete):
    """Catches an unclosed tag, an unescaped label or config, and anything that a reader's browser would fetch."""
    root = parse(complete)
    tags = [element.tag for element in root.iter()]
    assert not set(tags) & {"link", "iframe", "object", "video"} and tags.count("script") == 1
    assert len(root.find(".//script").text.splitlines()) < 70
    for element in root.iter():
        for name in ("src", "srcset", "href"):
            value = element.get(name, "#")
            assert value.startswith(("#", "data:image/")), f"{element.tag} fetches {value[:60]}"
    assert not re.search(r"url\(|@import|@font-face|https?://", complete)


def test_pictures_come_first_then_the_claim_then_one_plot(complete):
    """Catches a page that opens with tables: what a reader sees unfolded, in order, and what only opens."""
    main = parse(complete).find("body/main")
    assert [child.get("id") for child in main if child.tag == "section"] == ["pictures", "claim", "frontier"]
    assert [child.tag for child in main][:4] == ["header", "section", "section", "section"]
    assert {child.tag for child in list(main)[4:]} == {"details"}
    claim = main.find("section[@id='claim']")
    assert len([p for p in claim.findall("p") if p.get("class") != "small"]) == 2
    assert len(main.findall("section[@id='frontier']//svg[@role='img']")) == 1


def test_every_point_is_there_without_script(complete):
    """Catches a point that only the slider can show, or whose images or depths are another point's."""
    root = parse(complete)
    looks = {look.get("data-name"): look for look in root.iter("section") if look.get("class") == "look"}
    assert set(looks) == {label for _, label, *_ in SWEEP} - {"full depth"}
    assert [name for name, look in looks.items() if look.get("data-chosen")] == ["threshold 0.95"]
    for name, look in looks.items():
        images, depths = list(look.iter("img")), [caption.text for caption in look.iter("figcaption")]
        assert len(images) == len(depths) == page.SHOWN and look.find(".//svg/title").text.startswith(name), name
    assert {caption.text for caption in looks["fixed layer 3"].iter("figcaption")} == {"3.00"}
    assert len(set(c.text for c in looks["threshold 0.95"].iter("figcaption"))) > 1


def test_the_plot_names_what_it_shows(complete):
    """Catches a family without a legend, a mark without a name, a label that is drawn over another one."""
    figure = parse(complete).find(".//section[@id='frontier']/figure")
    legend = " ".join(" ".join(item.itertext()) for item in figure.iter("li"))
    for family, label, *_ in SWEEP:
        assert family_name(family) in legend
        assert any(title.text.startswith(label) for title in figure.iter("title")), label
    at = [float(text.get("x")) for text in figure.iter("text") if text.get("text-anchor") == "middle"]
    assert len(at) >= 3 and min(b - a for a, b in zip(at, at[1:], strict=False)) > 60  # 25 units high on a phone
    assert "var(--" in complete and "prefers-color-scheme: dark" in complete and "width=device-width" in complete


def test_table_has_the_speed_up_second_and_sorts(complete):
    """Catches a speed-up that is cut off on a phone, and cells that a script would sort as text."""
    table = next(t for t in parse(complete).iter("table") if t.get("class") == "sortable")
    assert [head.text for head in table.find("thead/tr")][:3] == ["point", "speed-up", "against full depth"]
    rows = {row.find("th").text: row.findall("td") for row in table.find("tbody")}
    assert set(rows) == {label for _, label, *_ in SWEEP}
    assert float(rows["threshold 0.95"][0].get("data-value")) == pytest.approx(3.58 / 1.8, rel=0.02)
    assert rows["full depth"][9].text == "identical" and "100" not in rows["full depth"][9].text


def test_page_states_conventions_and_provenance(complete):
    """Catches a reader who cannot tell MACs from FLOPs, the noise end from the data end, or how a number was made."""
    text = text_of(complete)
    for needed in (
        "multiply-accumulates", "CPU, 2 cores", "0f1e2d3c", "torch 2.9.0", "[1, 2, 3]", "t: noise", "0 to 100 %",
        "Time explains", "95 % intervals over 3 noise seeds of one training", "evenly spaced calls",
    ):  # fmt: skip
        assert needed in text, needed
    assert "stricter bar" not in text and "floor" in text


def test_two_halves_of_the_real_images_are_no_floor(complete):
    """Catches a "floor" that lies above full depth, as its numbers of images are others."""
    text = text_of(complete)
    assert "between two halves of the real images (898 each): 4.65" in text
    assert "no floor for the distances above, of 2048 images" in text


def test_files_of_earlier_versions_are_read():
    """Catches a directory that the evaluation wrote before grids of calls were recorded, and is refused or misread."""
    (found,) = report.read_evaluations([RECORDED])
    assert len(found.points) == 9 and found.tolerance == 0.05
    entries, notes = report.entries([found], [None])
    head = report.headline(entries, found.tolerance)
    assert head["setting"]["label"] == "threshold 0.98" and head["uniform"]["label"] == "full depth"
    assert head["speedup_over_uniform"] == pytest.approx(2.67, abs=0.01)
    assert notes == [] and all(entry.evenly_spaced for entry in entries)


def test_recorded_pictures(tmp_path):
    """Catches images that are cut at the wrong place of a recorded grid."""
    root = parse(html_of(RECORDED, output=tmp_path / "page.html"))
    names = [look.get("data-name") for look in root.iter("section") if look.get("class") == "look"]
    assert names == ["threshold 0.98", "full depth 10 steps"]
    images = report.read_evaluations([RECORDED])[0].images(report.read_evaluations([RECORDED])[0].points[0], 8)
    assert [image.size for image in images] == [(48, 48)] * 8
    assert all(np.asarray(image)[0, 0].max() < 250 for image in images), "a white frame was cut along"


@pytest.mark.parametrize(("n", "size"), [(64, 8), (64, 32), (5, 8), (16, 28), (64, 100), (1, 16)])
def test_grids_are_cut_as_they_were_laid(n, size, tmp_path):
    """Catches another number of columns, a frame of another width, or images that change places."""
    pixels = torch.randint(0, 250, (n, 3, size, size), dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", pixels)
    with Image.open(tmp_path / "grid.png") as file:
        found = tiles(file.convert("RGB"), 8)
    assert len(found) == min(n, 8)
    for image, expected in zip(found, pixels, strict=False):
        scale = image.size[0] // size
        assert (np.asarray(image)[::scale, ::scale] == expected.permute(1, 2, 0).numpy()).all()


def test_labels_cannot_close_their_tag(tmp_path):
    """Catches a label that is pasted into HTML without escaping."""
    odd = record("threshold", '<u> & "0.9"', 4, 20, 2, 26) | {"slug": "odd"}
    assert '<u> & "0.9"' in text_of(html_of(write_results(tmp_path, [record(*SWEEP[0]), odd])))


def test_missing_pieces_become_sentences(tmp_path):
    """Catches a crash, or silence, where an evaluation has no traces, grids, maps, log, times or seeds."""
    bare = record(*SWEEP[0])
    bare["metrics"] = {KEY: 25.9}
    for key in ("versions", "device", "threads", "seeds", "guidance", "sampler", "batch_size", "commit"):
        del bare[key]
    text = text_of(html_of(write_results(tmp_path / "bare", [bare])))
    for needed in (
        "No early-exit policy was evaluated", "No images or traces were saved", "No point reports seconds or GMACs",
        "No config.json", "not recorded", "noise is unknown", "lack a selection seed",
    ):  # fmt: skip
        assert needed in text, needed
    text = text_of(html_of(write_results(tmp_path / "alone", [record(*SWEEP[2])])))
    assert "No full-depth point was evaluated" in text


def test_guidance_shows_both_branches(tmp_path):
    """Catches averaging or dropping the null branch, which may exit elsewhere."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2])]
    folder = write_results(tmp_path, rows) / "points" / rows[1]["slug"]
    folder.mkdir(parents=True)
    t, used = exits(branches=2)
    np.savez(folder / "trace.npz", t=t, used=used, depth=DEPTH)
    text = text_of(html_of(tmp_path))
    assert "conditional branch: images that left" in text and "null branch: images that left" in text
    assert "of the conditional branch" in text and "Guidance pairs: free" in text


def test_maps_have_one_scale_and_no_last_layer():
    """Catches u and truth in two scales, and rows of the last layer, where both are zero."""
    rng = np.random.default_rng(0)
    u, error = rng.random((4, 3, 1, 8, 8)), 4 * rng.random((4, 3, 1, 8, 8))
    u[:, -1], error[:, -1] = 99, 99
    maps = Uncertainty(
        np.linspace(1, 0, 4), np.arange(1, 4), u, error, np.zeros((4, 1, 1, 8, 8), np.uint8), np.arange(1)
    )
    found = figures.uncertainty(maps, 0)
    assert found["rows"] == ["image", "u after 1", "true", "u after 2", "true"]
    assert float(found["most"]) == pytest.approx(error[:, :2].max(), rel=0.01)


def test_exit_sentence_by_hand():
    """Catches time and image exchanged: the question whether exits are only a schedule."""

    def said(used):
        return page.exit_sentence(Exits(np.linspace(1, 0, len(used)), np.array(used, np.uint8)[:, None], 7))

    by_time = [[1, 1, 1], [3, 3, 3], [5, 5, 5]]  # (calls, n)
    assert "Time explains 100\u00a0%" in said(by_time) and "the image 0\u00a0%" in said(by_time)
    assert "the image 100\u00a0%" in said(np.array(by_time).T)
    mixed = said([[1, 2], [3, 4]])  # total 1.25, calls 1, images 0.25
    assert "explains 80\u00a0%" in mixed and "image 20\u00a0%" in mixed
    assert said([[3, 3], [3, 3]]) == "Every image leaves after layer 3 at every call."


def test_exit_shares_count_layers_not_images():
    """Catches a map whose columns are not shares of the same images, or that is off by one layer."""
    used = np.array([[[1, 1, 7, 3]], [[7, 7, 7, 7]]], np.uint8)  # (calls, branches, n)
    shares = figures.exit_shares(Exits(np.array([1.0, 0.0]), used, 7), 0)
    assert shares.shape == (8, 2)
    assert shares[[1, 3, 7], 0] == pytest.approx([0.5, 0.25, 0.25]) and shares[7, 1] == 1
    assert shares.sum(axis=0) == pytest.approx(1)


@pytest.mark.parametrize(("low", "high"), [(0, 1.04), (5.4, 8.3), (0.07, 2.0), (22, 220), (2.5, 2.6), (0.9, 4000)])
def test_axes_have_few_round_ticks(low, high):
    """Catches ticks that collide on a phone, and axes with one tick or none."""
    for log in (False, True)[: 1 + (low > 0)]:
        ticks = figures.Axis(low, high, 72, 704, log).ticks()
        assert 2 <= len(ticks) <= 7, (log, ticks)
        assert all(72 <= place <= 704 for place, _ in ticks) and len({text for _, text in ticks}) == len(ticks)


def test_numbers_as_text():
    """Catches exponents, spurious digits, hyphens for minus signs, and PSNR of identical images."""
    assert [sig(x) for x in (0.00123, 0.9996, 25.94, 999.6, 12345.6, -3, 0, None)] == [
        "0.00123", "1.00", "25.9", "1\u202f000", "12\u202f346", "−3.00", "0", "–",
    ]  # fmt: skip
    assert signed(Estimate(0.041, -0.02, 0.102, 3)) == "+4.1\u00a0% [−2.0, +10]" and signed(None) == "–"
    assert speedup_text(Estimate(2.5)) == "2.50×" and speedup_text(Estimate(2.5, 2.31, 2.7, 3)) == "2.50× [2.31, 2.70]"
    assert (
        decibels(100.0) == decibels(None, 1.0) == "identical"
        and decibels(None) == "–"
        and decibels(45.66) == "45.7\u00a0dB"
    )


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
        report.read_evaluations([write_results(tmp_path, [record(*SWEEP[0]), row])])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.jsonl", "", "empty"),
        ("results.jsonl", '{"slug": "full"', "line 1: not JSON"),
        ("results.jsonl", "\n[1]\n", "line 2: a JSON object is needed"),
        ("config.json", "{", "cannot be read as JSON"),
        ("reference.json", "[]", "holds a list, not a dict"),
        ("train.jsonl", '{"step": 1, "loss": 2}\n{"loss": 2}\n', "train.jsonl, line 2"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    """A parse error without the file it came from."""
    write_results(tmp_path, [record(*SWEEP[0])])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        report.read_evaluations([tmp_path])
    assert says in str(caught.value)


def test_bad_arrays_and_grids_are_named(tmp_path):
    """A broadcasting error, or a broken picture in the page."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2])]
    folder = write_results(tmp_path, rows) / "points" / rows[1]["slug"]
    folder.mkdir(parents=True)
    run = report.read_evaluations([tmp_path])[0]
    np.savez(folder / "trace.npz", t=np.ones(3), used=np.ones((4, 1, 5)), depth=7)
    with pytest.raises(ValueError, match="trace.npz.*calls"):
        run.exits(run.points[1])
    np.savez(folder / "trace.npz", t=np.ones(4), used=np.full((4, 1, 5), 9), depth=7)
    with pytest.raises(ValueError, match="trace.npz.*9 layers"):
        run.exits(run.points[1])
    (folder / "grid.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="grid.png.*not a readable PNG"):
        run.images(run.points[1], 8)
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
        report.read_evaluations([first, second])
    with pytest.raises(ValueError, match="given twice"):
        report.read_evaluations([first, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match="no such file"):
        report.read_evaluations([tmp_path / "none"])


def test_command_ends_with_usage_and_leaves_no_report(tmp_path, capsys):
    """A traceback at the user, or half a page that looks like a report."""
    write_results(tmp_path, [broken("nfe", 0)])
    with pytest.raises(SystemExit) as caught:
        command.main([str(tmp_path)])
    assert caught.value.code == 2 and "results.jsonl, line 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*report*"))


def test_a_point_evaluated_twice_counts_once(tmp_path):
    """The stale line of a restarted sweep drawn beside the new one."""
    rows = [record(*SWEEP[0]), record(*SWEEP[2]), record("threshold", "threshold 0.98", 4, 20, 2, 30.0)]
    run = report.read_evaluations([write_results(tmp_path, rows)])[0]
    assert [point.quality for point in run.points] == [25.9, 30.0]
    assert "threshold-0.98" in run.notes[0]
