"""Comparisons on constructed evaluations: a win, a tie, a loss of early exit, and seconds that must not be mixed."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from test_points import quick
from test_report import KEY, record

from libs import comparison
from libs.comparison.entries import STUDENT, difference
from libs.comparison.findings import fastest_within, worth_of_looking
from libs.evaluation import evaluate as evaluator
from libs.report.verdict import BASELINES
from scripts import compare, time_together

# family, label, mean depth, steps, milliseconds, quality
POINTS = (
    ("full", "full depth", 7.0, 20, 10.0, 26.0),
    ("residual", "threshold 0.98, residual, refresh 4", 2.8, 20, 4.0, 26.5),
    ("residual", "threshold 0.99, residual, refresh 2", 4.1, 20, 6.0, 26.2),
    ("threshold", "threshold 0.98", 2.8, 20, 4.0, 31.0),
    ("fixed", "fixed layer 3", 3.0, 20, 4.0, 33.0),
    ("steps", "full depth 8 steps", 7.0, 8, 4.0, 70.0),
    ("reuse", "reuse every 2", 3.5, 20, 5.0, 30.0),
)


def evaluation(
    folder, points=POINTS, seed=0, model="a", noise=0.2, common=0.0, n_seeds=3, slower=1.0, mac=1.0, **changes
) -> str:
    """A directory of evaluated points: `noise` of each point's own, `common` to all points of a noise seed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shared, lines = common * rng.standard_normal(n_seeds), []
    for family, label, depth, steps, ms, quality in points:
        values = (quality + shared + noise * rng.standard_normal(n_seeds)).tolist()
        line = record(family, label, depth, steps, ms * slower, float(np.mean(values)))
        line["metrics"] |= {f"{KEY}_per_seed": values, f"{KEY}_selection": quality}
        line["metrics"]["gmacs"] *= mac
        line |= {"seeds": list(range(1, n_seeds + 1)), "weights": f"{model}{seed}"} | changes
        lines.append(json.dumps(line) + "\n")
    (folder / "results.jsonl").write_text("".join(lines))
    trained = {"seed": seed, "loss": {"name": model}, "eval": {"seeds": 1}, "nnet_path": str(folder)}
    (folder / "training.json").write_text(json.dumps(trained))
    return str(folder)


def replicas(tmp_path, n=3, name="a", **options) -> list[str]:
    return [evaluation(tmp_path / f"{name}{seed}", seed=seed, model=name, **options) for seed in range(n)]


def changed(qualities: dict[str, float]) -> tuple:
    return tuple((f, label, d, s, ms, qualities.get(f, q)) for f, label, d, s, ms, q in POINTS)


def at(verdicts, budget):
    return next(verdict for verdict in verdicts if verdict.budget == budget)


def test_early_exit_wins(tmp_path):
    """Catches a wrong order, a setting over the budget, and a rival of the same kind shown as the competitor."""
    entries, verdicts, notes, _ = comparison.compare(replicas(tmp_path))
    found = at(verdicts, 0.4)
    assert [entry.family for entry in found.order] == ["residual", "threshold", "fixed", "steps"]
    assert not found.ties and found.tone == "good"
    assert "the winner is “threshold 0.98, residual, refresh 4”, 26." in found.text
    assert "outside the noise of 3 training seeds) than the next, “threshold 0.98”" in found.text
    assert "the best without early exit, “fixed layer 3”, is" in found.text
    assert at(verdicts, 0.3).text.endswith("no method is fast enough.")
    assert "“threshold 0.99, residual, refresh 2”" in at(verdicts, 0.6).text
    assert all(len(entry.quality) == 3 for entry in entries)


def test_a_tie(tmp_path):
    """Catches a winner that is announced although the difference is inside the noise."""
    points = changed({"residual": 30.0, "threshold": 33.0, "fixed": 30.3})
    found = at(comparison.compare(replicas(tmp_path, points=points, noise=1.5))[1], 0.4)
    assert found.tone == "even" and {entry.family for entry in found.ties + found.order[:1]} >= {"residual", "fixed"}
    assert "nobody wins" in found.text and "not distinguishable from" in found.text and "inside the noise" in found.text


def test_early_exit_loses(tmp_path):
    """Catches a comparison that praises early exit where a fixed layer is better."""
    points = changed({"residual": 40.0, "threshold": 41.0})
    found = at(comparison.compare(replicas(tmp_path, points=points))[1], 0.4)
    assert found.tone == "bad" and found.order[0].family == "fixed"
    assert (
        "early exit loses, its best is “threshold 0.98, residual, refresh 4”" in found.text
        and "outside the noise" in found.text
    )


def test_only_baselines(tmp_path):
    """Catches a verdict for early exit where none took part, and matched controls that win."""
    points = tuple(p for p in POINTS if p[0] in BASELINES) + (("matched_random", "matched", 2.8, 20, 4.0, 20.0),)
    found = at(comparison.compare(replicas(tmp_path, points=points))[1], 0.4)
    assert found.tone == "bad" and "no early exit is this fast" in found.text and found.order[0].family == "fixed"


def test_one_seed_is_no_evidence(tmp_path):
    """Catches confidence that comes from nowhere."""
    found = at(comparison.compare([evaluation(tmp_path / "a", n_seeds=1)])[1], 0.4)
    assert "one seed, so the noise is unknown" in found.text and found.tone == "even" and found.ties


def test_differences_are_paired_within_a_model(tmp_path):
    """Catches the noise that both points share, which drowns a small and certain difference."""
    points = changed({"residual": 30.0, "threshold": 30.5})
    entries, *_ = comparison.compare([evaluation(tmp_path / "a", points, noise=0.02, common=5.0)])
    one, two = (next(e for e in entries if e.family == f) for f in ("threshold", "residual"))
    gap = difference(one, two)
    assert gap.clear and gap.mean == pytest.approx(0.5, abs=0.1) and gap.freedom == 2
    assert gap.margin == pytest.approx(STUDENT[1] * gap.error)


def test_training_seeds_outweigh_noise_seeds(tmp_path):
    """Catches nine values of three trainings that pass for nine trainings."""
    directories = []
    for seed, gap in enumerate((1.0, 2.0, 9.0)):  # how much better one of the two is depends on the training
        points = changed({"residual": 20.0, "threshold": 20.0 + gap})
        directories.append(evaluation(tmp_path / f"a{seed}", points, seed=seed))
    found = at(comparison.compare(directories)[1], 0.4)
    assert [entry.family for entry in found.ties] == ["threshold"] and "nobody wins" in found.text


def test_the_selection_seed_chooses_the_setting(tmp_path):
    """Catches a setting that is picked by the very numbers it is then reported with."""
    directory = evaluation(tmp_path / "a", noise=0.0)
    results = tmp_path / "a" / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    lines[2]["metrics"][f"{KEY}_selection"] = 99.0  # residual 0.99: the best on the reported seeds
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = at(comparison.compare([directory])[1], 0.6)
    assert found.order[0].label == "threshold 0.98, residual, refresh 4"


def test_seconds_of_different_evaluations(tmp_path):
    """Catches raw seconds of a slow and a fast day in one comparison, and silence about it."""
    alone, _, notes, _ = comparison.compare([evaluation(tmp_path / "alone")])
    assert not any("evaluations" in note for note in notes)
    directories = [evaluation(tmp_path / f"a{seed}", seed=seed, slower=1 + 2 * seed) for seed in range(2)]
    found, _, notes, _ = comparison.compare(directories)
    assert [e.cost for e in found] == pytest.approx([e.cost for e in alone])
    assert any("come from 2 evaluations" in note and "own full-depth seconds" in note for note in notes)


def test_other_steps_of_the_same_network(tmp_path):
    """Catches a full depth of 10 steps that counts as much as one of 20."""
    short = (("full", "full depth", 7.0, 10, 15.0, 50.0), ("threshold", "threshold 0.9", 3.5, 10, 7.5, 60.0))
    directories = [evaluation(tmp_path / "a"), evaluation(tmp_path / "b", short, slower=3.0)]
    found, *_ = comparison.compare(directories)
    assert {e.label: e.cost for e in found if e.steps == 10} == pytest.approx(
        {"full depth": 0.5, "threshold 0.9": 0.25}
    )


def test_a_smaller_network(tmp_path):
    """Catches a small model that is divided by its own full depth, or timed on another machine."""
    small = (("full", "full depth", 7.0, 20, 4.0, 35.0),)
    directories = [*replicas(tmp_path), *replicas(tmp_path, name="small", points=small, mac=0.4)]
    found, verdicts, notes, _ = comparison.compare(directories)
    entry = next(e for e in found if e.model == "small0")
    assert entry.cost == pytest.approx(0.4) and len(entry.quality) == 3 and entry.family == "full"
    assert [e.model for e in at(verdicts, 0.4).order].count("small0") == 1
    assert any(note.startswith("small0: not the network of a0") for note in notes)
    other = evaluation(tmp_path / "other", small, model="other", mac=0.4, device="a GPU")
    found, _, notes, _ = comparison.compare([*directories, other])
    assert next(e for e in found if e.model == "other").cost is None
    assert any("Its seconds are not compared" in note for note in notes)


def test_what_makes_a_model(tmp_path):
    """Catches trainings of different methods, or the same weights twice, that are averaged as training seeds."""
    a = replicas(tmp_path, n=2)
    b = evaluation(tmp_path / "b", model="b")
    again = evaluation(tmp_path / "again", POINTS[:1] + (("schedule", "schedule", 4, 20, 6.0, 27.0),))  # weights of a0
    found, _, notes, _ = comparison.compare([*a, b, again])
    models = {e.model: len(e.quality) for e in found}
    assert models == {"a0": 2, "b": 1}
    assert any("not every run of a0 has them: schedule" in note for note in notes)
    stranger = evaluation(tmp_path / "stranger", weights="x")  # trained with a0's settings and seed, yet not a0
    assert len({e.model for e in comparison.compare([a[0], stranger])[0]}) == 2
    named = comparison.compare([a[0], b, stranger], ["one", "one", "two"])[0]
    assert {e.model: len(e.quality) for e in named} == {"one": 2, "two": 1}


def test_seconds_of_one_interleaved_run(tmp_path):
    """Catches seconds of separate evaluations where better ones are at hand, or those of two runs taken for one."""
    small = (("full", "full depth", 7.0, 20, 4.0, 35.0),)
    directories = [evaluation(tmp_path / "a"), evaluation(tmp_path / "small", small, model="small", mac=0.4)]
    timings = [
        {"run": "x", "seconds": {label.replace(" ", "-"): [0.02] for _, label, *_ in POINTS}},
        {"run": "y", "seconds": {"full-depth": [0.009, 0.01, 0.011]}},
    ]
    for name, timing in zip(("a", "small"), timings, strict=True):
        (tmp_path / name / "timing.json").write_text(json.dumps(timing))
    found, _, notes, _ = comparison.compare(directories)
    assert found[-1].cost == pytest.approx(0.4) and any("2 evaluations" in note for note in notes)
    (tmp_path / "small" / "timing.json").write_text(json.dumps(timings[1] | {"run": "x"}))
    found, _, notes, _ = comparison.compare(directories)
    assert found[-1].cost == pytest.approx(0.5) and not any("evaluations" in note for note in notes)
    assert found[1].cost == 1


def test_several_runs_timed_together(tmp_path):
    """Catches a full depth that costs more or less than itself, and a warning about the seconds that were replaced."""
    directories = replicas(tmp_path, n=2)
    for directory, seconds, threads in zip(directories, (0.02, 0.03), (1, 2), strict=True):
        folder = tmp_path / directory
        lines = [
            json.loads(line) | {"threads": threads} for line in (folder / "results.jsonl").read_text().splitlines()
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        timing = {"run": "x", "threads": 4, "device": "d", "seconds": {line["slug"]: [seconds] for line in lines}}
        (folder / "timing.json").write_text(json.dumps(timing))
    found, _, notes, _ = comparison.compare(directories)
    assert [entry.cost for entry in found] == pytest.approx([1.0] * len(POINTS))
    assert not any("threads" in note for note in notes)


def test_models_of_the_same_training_seeds_are_paired(tmp_path):
    """Catches the difference between trainings, common to both models, that drowns that between the models."""
    directories = []
    for seed, common in enumerate((0.0, 5.0, 9.0)):
        for model, gap in (("a", 0.0), ("b", 1.0)):
            points = tuple((*point[:5], point[5] + common + gap) for point in POINTS)
            directories.append(evaluation(tmp_path / f"{model}{seed}", points, seed=seed, model=model, noise=0.01))
    found, *_ = comparison.compare(directories)
    one, two = (next(e for e in found if e.model == f"{model}0") for model in "ab")
    gap = difference(two, one)
    assert gap.clear and gap.mean == pytest.approx(1.0, abs=0.1) and gap.freedom == 2
    with_another = [*directories[:4], evaluation(tmp_path / "a9", seed=9), directories[5]]
    found, *_ = comparison.compare(with_another, ["a", "b"] * 3)
    one, two = (next(e for e in found if e.model == model) for model in "ab")
    assert difference(two, one).margin > 5


def test_timing_several_evaluations_together(tmp_path):
    """Catches a directory that is timed with another one's network or points, and batches that differ."""
    for name, width in (("a", 32), ("b", 16)):
        config, _, _ = quick(
            nnet__embed_dim=width, eval__sweep=("reuse.every=2",), eval__thresholds=(0.9,), mixed_precision="no"
        )
        (tmp_path / name).mkdir()
        config.nnet_path = str(tmp_path / name / "nnet.pth")
        torch.save(evaluator.build_model(config).state_dict(), config.nnet_path)
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
    directories = [tmp_path / name for name in "ab"]
    found = time_together.time_together(directories, 2)
    stored = [json.loads((directory / "timing.json").read_text()) for directory in directories]
    assert stored[0]["run"] == stored[1]["run"] and set(found) == {str(directory) for directory in directories}
    assert all(list(s["seconds"]) == ["full-depth", "threshold-0.9", "reuse-every-2"] for s in stored)
    assert all(len(runs) == 2 and min(runs) > 0 for s in stored for runs in s["seconds"].values())
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["eval"]["timing_batch"] += 1
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="timing_batch"):
        time_together.time_together(directories, 1)


def test_page_and_command(tmp_path, capsys):
    """Catches a page that is not well-formed, numbers that are missing, and a command that swallows its names."""
    a, b = replicas(tmp_path, n=2), evaluation(tmp_path / "b=c", model="b")
    output = tmp_path / "out" / "all.html"
    compare.main([f"mine={a[0]}", f"mine={a[1]}", b, f"--output={output}"])
    ElementTree.fromstring(output.read_text())
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert {point["model"] for point in numbers["points"]} == {"mine", "b=c"}
    assert len(numbers["verdicts"]) == len(comparison.BUDGETS) and "95 %" in numbers["rule"]
    said = capsys.readouterr().out
    assert all(v["text"] in said and v["text"] in output.read_text() for v in numbers["verdicts"])
    assert "“threshold 0.98, residual, refresh 4 · mine”" in said


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "no such file"), (["{a}", "--output=x.txt"], "ends in .html")]
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
    """Catches a traceback where the user gave a wrong directory."""
    directory = evaluation(tmp_path / "a")
    with pytest.raises(SystemExit):
        compare.main([text.format(a=directory) for text in arguments])
    assert message in capsys.readouterr().err


def test_full_depth_is_needed(tmp_path):
    """Catches shares of a reference that was never timed."""
    with pytest.raises(ValueError, match="timed full-depth point"):
        comparison.compare([evaluation(tmp_path / "a", POINTS[1:])])


def test_the_price_of_a_quality(tmp_path):
    """Catches settings chosen on the reported seeds, a slower one than needed, controls offered for use."""
    control = ("matched_static", "matched_static path threshold-0.98", 2.7, 20, 3.0, 26.1)
    points = changed({"fixed": 26.6}) + (control, ("steps", "full depth 14 steps", 7.0, 14, 5.0, 27.4))
    text = fastest_within(comparison.compare(replicas(tmp_path, points=points))[0])
    first, second = text.split("fastest of each method: ")[1].split("; ")
    assert first.startswith("“threshold 0.98, residual, refresh 4” 2.50× (+") and "noise of 3 training seeds" in first
    assert re.match(r"“fixed layer 3” 2\.50× \(\+[123]\.\d\u00a0%", second)
    points = changed({"residual": 30.0})
    assert fastest_within(comparison.compare([evaluation(tmp_path / "a", points)])[0]).endswith("method: none is.")


@pytest.mark.parametrize("quality", [31.9, 30.1])
def test_what_looking_is_worth(tmp_path, quality):
    """Catches a policy that is praised where its control is better, and another point's control."""
    control = ("matched_static", "matched_static path threshold-0.98", 2.7, 20, 4.0, quality)
    stray = ("matched_random", "matched_random path threshold-0.9", 2.7, 20, 4.0, quality)
    directories = replicas(tmp_path, points=POINTS + (control, stray), noise=0.01)
    (text,) = worth_of_looking(comparison.compare(directories)[0])
    side = "less" if quality > 31 else "more"
    assert re.match(rf"“threshold 0.98” has 0\.[89]\d* {side} \(", text) and "outside the noise" in text
    assert "“matched_static path threshold-0.98”" in text and "2.80 layers against 2.70" in text
    comparison.write(directories, [None] * 3, tmp_path / "page.html")
    assert text in json.loads((tmp_path / "page.json").read_text())["findings"]
