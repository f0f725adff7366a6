"""What is said about constructed evaluations: a win, a tie, a loss, the honest rival, and what must not be mixed."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from test_points import quick
from test_report import KEY, record

from libs import report
from libs.evaluation.timing import time_together
from libs.models import build_model
from libs.report import statistics
from libs.report.entries import change, gap, speedup
from libs.report.families import BASELINES
from libs.report.verdict import best_plain, claim, fastest_of_each, recommend, rival_of, verdicts, worth_of_looking
from scripts import compare, leaderboard

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


def compared(directories, names=None):
    """Entries and notes, as the page has them."""
    directories = [directories] if isinstance(directories, str) else directories
    return report.entries(report.read_evaluations(directories), names or [None] * len(directories))


def at(entries, budget):
    return next(verdict for verdict in verdicts(entries) if verdict.budget == budget)


def named(entries, *labels):
    return [next(e for e in entries if e.label == label) for label in labels]


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_intervals_are_students_of_the_n_there_is():
    """Catches 4.3 standard errors for any number of seeds: for two they are 12.7, for five 2.78."""
    for values, t in (([1.0, 2.0], 12.706), ([1.0, 2.0, 4.0], 4.303), ([1.0, 2.0, 4.0, 5.0, 9.0], 2.776)):
        found = statistics.estimate(values)
        assert found.high - found.mean == pytest.approx(t * stdev(values) / len(values) ** 0.5, rel=1e-3)
        assert found.mean == pytest.approx(fmean(values)) and found.n == len(values)


def test_two_seeds_win_nothing():
    """Catches two noise seeds that agree by chance and are called outside the noise by one page."""
    close = statistics.estimate([1.0, 1.0001])
    assert close.low > 0.9 and close.excludes(0) is None
    assert statistics.estimate([1.0, 1.0001, 1.0002]).excludes(0) is True
    assert statistics.estimate([1.0]).excludes(0) is None and statistics.estimate([1.0]).low is None


def test_two_seeds_tie_on_the_page(tmp_path):
    """Catches "early exit wins" from two noise seeds: the same directory said both before."""
    entries, _ = compared(evaluation(tmp_path / "a", n_seeds=2, noise=0.001))
    assert all(verdict.tone != "good" or len(verdict.order) == 1 for verdict in verdicts(entries))
    assert "nobody wins" in at(entries, 0.4).text


def test_speed_ups_are_paired_run_by_run():
    """Catches a slow minute of the machine, which hits both points in turn, taken for noise of their ratio."""
    slow = statistics.ratio([[1.0, 2.0, 3.0]], [[0.5, 1.0, 1.5]], paired=True)
    assert (slow.mean, slow.low, slow.high) == pytest.approx((2, 2, 2))
    assert statistics.ratio([[1.0, 2.0, 3.0]], [[0.5, 1.0, 1.5]], paired=False).low is None
    over = statistics.ratio([[2.0], [4.0], [6.0]], [[1.0], [2.0], [3.0]], paired=False)  # three training runs
    assert over.n == 3 and over.mean == pytest.approx(2)


def test_a_speed_up_is_one_number(tmp_path):
    """Catches "2.67 times" beside "40 % of the seconds": medians in one place, mean ratios in the other."""
    directory = evaluation(tmp_path / "a")
    results = Path(directory) / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    rng = np.random.default_rng(0)
    for line in lines:
        line["metrics"]["seconds_per_image_runs"] = (rng.uniform(1, 2, 3) * 0.01).tolist()
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries, _ = compared(directory)
    full = entries[0]
    assert [speedup(e, full).mean * e.cost for e in entries] == pytest.approx([1.0] * len(entries))
    assert speedup(entries[1], entries[2]).mean == pytest.approx(entries[2].cost / entries[1].cost)


def test_unequal_numbers_of_images_are_not_compared(tmp_path):
    """Catches distances of 512 and 2,048 images in one ranking: a Fréchet distance falls with the number."""
    few = evaluation(tmp_path / "few", (("schedule", "schedule", 4, 20, 3.9, 20.0),), n_images=512, weights="a0")
    entries, notes = compared([evaluation(tmp_path / "a"), few])
    one, full = named(entries, "schedule", "full depth")
    assert gap(one, full) is None and change(one, full) is None
    assert one not in fastest_of_each(entries, 0.05) and all(one not in v.order for v in verdicts(entries))
    assert recommend(entries, 0.05) is not one and any("n_images (2048, 512)" in note for note in notes)


# ---- the honest rival ----------------------------------------------------------------------------------------------

PLACED = (  # family, label, mean depth, calls, milliseconds, quality
    ("plain", "full depth, power 2, 10 steps", 7.0, 10, 5.0, 25.0),
    ("plain", "full depth, power 2.5, 7 steps", 7.0, 7, 3.6, 25.4),
    ("plain", "full depth, power 2.5, 5 steps", 7.0, 5, 2.6, 33.0),
    ("threshold", "threshold 0.98, power 2, 8 steps", 2.8, 8, 2.0, 25.5),
)


def placed(tmp_path, points=POINTS[:1] + PLACED, **options):
    """Entries of an evaluation with calls on other grids."""
    directory = evaluation(tmp_path / "placed", points, noise=0.02, **options)
    results = Path(directory) / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        if "power" in line["label"]:
            line["sampler"]["grid"] = "power:2"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return compared(directory)[0]


def test_best_plain_sampling_at_a_quality(tmp_path):
    """Catches a rival that is the slowest that is good enough, too bad, or no plain sampling at all."""
    entries = placed(tmp_path)
    assert best_plain(entries, "placed", 26.0).label == "full depth, power 2.5, 7 steps"
    assert best_plain(entries, "placed", 25.2).label == "full depth, power 2, 10 steps"
    assert best_plain(entries, "placed", 40.0).label == "full depth, power 2.5, 5 steps"
    assert best_plain(entries, "placed", 20.0) is None


def test_headline_is_against_the_honest_rival(tmp_path):
    """Catches the speed-up over evenly spaced calls sold as the speed-up: 5 times, where 1.8 is what exits add."""
    entries = placed(tmp_path)
    head = report.headline(entries, 0.05)
    assert head["setting"]["label"] == "threshold 0.98, power 2, 8 steps"
    assert head["uniform"]["label"] == "full depth" and head["best_plain"]["label"] == "full depth, power 2.5, 7 steps"
    assert head["speedup_over_uniform"] == pytest.approx(5.0, rel=0.02)
    assert head["speedup_over_best_plain"] == pytest.approx(1.8, rel=0.02)
    assert head["quality_change"] == pytest.approx(25.5 / 26 - 1, abs=0.005)
    assert head["quality_change_over_best_plain"] == pytest.approx(25.5 / 25.4 - 1, abs=0.005)
    assert head["simpler"] is None and head["speedup_over_simpler"] is None
    for key, bounds in head["intervals"].items():
        assert bounds is None if "simpler" in key else bounds[0] <= head[key] <= bounds[1], key
    said = claim(entries, 0.05)
    assert said.tone == "good" and len(said.sentences) == 2
    assert "5.0" in said.sentences[0] and "full depth (20 evenly spaced calls)" in said.sentences[0]
    assert "full depth, power 2.5, 7 steps (7 calls on power:2)" in said.sentences[1] and "is 1.8" in said.sentences[1]


@pytest.mark.parametrize(("ms", "quality", "says"), [(1.98, 25.6, "does as well"), (1.98, 22, "is better and as fast")])
def test_a_simple_setting_that_does_better_is_said_to(tmp_path, ms, quality, says):
    """Catches a fixed layer that wins, and is said to do as well."""
    fixed = ("fixed", "fixed layer 4, power 2, 8 steps", 4.0, 8, ms, quality)
    said = claim(placed(tmp_path, (*POINTS[:1], *PLACED, fixed)), 0.05)
    assert says in said.sentences[0] and said.tone == ("bad" if "better" in says else "even")


@pytest.mark.parametrize(("ms", "first"), [(1.98, True), (2.6, False)])
def test_a_simple_setting_that_does_as_well_is_said_first(tmp_path, ms, first):
    """Catches a fixed layer that is as good and as fast as the recommended point in the small print only."""
    entries = placed(tmp_path, (*POINTS[:1], *PLACED, ("fixed", "fixed layer 4, power 2, 8 steps", 4.0, 8, ms, 25.6)))
    said, head = claim(entries, 0.05), report.headline(entries, 0.05)
    assert head["simpler"]["label"] == "fixed layer 4, power 2, 8 steps"
    assert head["speedup_over_simpler"] == pytest.approx(ms / 2, rel=0.02)
    assert ("Fixed layer 4, power 2, 8 steps does as well" in said.sentences[0]) is first
    assert (said.tone, len(said.sentences)) == (("even", 3) if first else ("good", 2))


@pytest.mark.parametrize("matched", [False, True])
def test_a_simple_setting_that_no_exit_matches_is_said_first(tmp_path, matched):
    """Catches a smaller network or a fixed layer that is clearly better for a little more, in the small print only."""
    fixed = ("fixed", "fixed layer 4, power 2, 8 steps", 4.0, 8, 2.2, 23.0)
    as_good = [("threshold", "threshold 0.99, power 2, 8 steps", 3.0, 8, 2.1, 23.1)] * matched
    entries = placed(tmp_path, (*POINTS[:1], *PLACED, fixed, *as_good))
    said, head = claim(entries, 0.05), report.headline(entries, 0.05)
    assert head["setting"]["label"] == f"threshold {0.99 if matched else 0.98}, power 2, 8 steps"
    assert ("Fixed layer 4, power 2, 8 steps is better than every early exit" in said.sentences[0]) is not matched
    assert (head["ahead"] is None) is matched and said.tone == ("good" if matched else "bad")


@pytest.mark.parametrize("rival", [(), (("plain", "full depth, power 2, 3 steps", 7.0, 3, 1.5, 27.0),)])
def test_the_recommended_point_is_the_fastest_for_its_quality(rival, tmp_path):
    """Catches the fastest exit at full depth's bad quality: plain calls are clearly better, or as fast."""
    poor = ("threshold", "threshold 0.9, power 2, 3 steps", 1.5, 3, 1.4, 26.9)
    entries = placed(tmp_path, (*POINTS[:1], *PLACED, poor, *rival))
    assert recommend(entries, 0.05).label == "threshold 0.98, power 2, 8 steps"


def test_plans_of_one_budget_are_one_setting(tmp_path):
    """Catches a plan that is left out because every training's own search found other calls for the same budget."""
    point = (POINTS[0], ("planned", "planned path plan-budget-0.1", 2.8, 5, 1.0, 25.0))
    directories = replicas(tmp_path, points=point, noise=0.01)
    for number, directory in enumerate(directories):
        results = Path(directory) / "results.jsonl"
        full, plan = (json.loads(line) for line in results.read_text().splitlines())
        plan |= {"exit": {"name": "planned", "path": f"runs/{number}/plan.json"}, "nfe": 5 + number}
        plan["sampler"]["grid"] = f"1,0.{number + 1},0.001"
        results.write_text("".join(json.dumps(line) + "\n" for line in (full, plan)))
    found = report.load_report(directories)
    assert len(found.entries) == 2 and found.entries[1].placement == "5 calls of its plan"
    row = found.numbers()["points"][1]
    assert row["exit"]["path"] == "plan.json"
    assert row["trainings"] == [0, 1, 2] and row["noise_seeds"] == [1, 2, 3] and row["quality_interval"][0] < 25


def alike(tmp_path, name: str, changes: dict, model: str = "a", seed: int = 0) -> str:
    """An evaluation of full depth and of one point that `changes`, with the same label whatever they are."""
    points = (POINTS[0], ("planned", "planned", 2.8, 5, 1.0, 25.0))
    directory = evaluation(tmp_path / name, points=points, model=model, seed=seed)
    full, point = (json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines())
    (tmp_path / name / "results.jsonl").write_text(f"{json.dumps(full)}\n{json.dumps(point | changes)}\n")
    return directory


def test_points_of_one_label_and_other_settings_stay_apart(tmp_path):
    """Catches the second of two budgets, exits or solvers that a page drops, as their labels are the same."""
    solver = {"name": "dpm_solver_pp_2m", "steps": 5}
    for first, second in (
        ({"exit": {"name": "planned", "path": f"x/{net}-plan-budget-{b}.json"}} for net, b in (("a", 0.1), ("a", 0.2))),
        ({"exit": {"name": "threshold", "certainty": 0.9, "at": at}} for at in ([], [2])),
        ({"exit": {"name": "threshold"}, "sampler": solver | more} for more in ({}, {"lower_order_final": False})),
    ):
        kept = tmp_path / str(len(list(tmp_path.iterdir())))
        kept.mkdir()
        entries = report.load_report([alike(kept, "one", first), alike(kept, "two", second)]).entries
        labels = {entry.label for entry in entries}
        assert len(entries) == len(labels) == 3, labels


def test_another_budget_is_no_other_training_of_a_plan(tmp_path):
    """Catches a mean over the plans of two budgets where two trainings are compared."""
    plans = [{"exit": {"name": "planned", "path": f"run{i}/n{i}-plan-budget-0.{i}.json"}} for i in (1, 1, 2)]
    ones = [alike(tmp_path, f"run{i}", {"exit": plans[0]["exit"]}, seed=i) for i in (1, 2)]
    assert len(report.load_report(ones).entries) == 2
    other = alike(tmp_path, "run3", plans[2], seed=3)
    assert [entry.family for entry in report.load_report([ones[0], other]).entries] == ["full"]


def test_the_rival_is_chosen_on_the_selection_seed(tmp_path):
    """Catches a rival picked by the numbers it is then reported with."""
    entries = placed(tmp_path)
    five, chosen = named(entries, "full depth, power 2.5, 5 steps", "threshold 0.98, power 2, 8 steps")
    five.first.record["metrics"][f"{KEY}_selection"] = 25.0
    assert rival_of(chosen, entries) is five


def test_plain_sampling_that_is_faster_is_said(tmp_path):
    """Catches praise of early exit where fewer, better placed calls are as good and faster."""
    points = POINTS[:1] + PLACED[:2] + (("threshold", "threshold 0.98", 2.8, 20, 4.0, 26.0),)
    entries = placed(tmp_path, points)
    said = claim(entries, 0.05)
    assert said.tone == "bad" and "is 0.9" in said.sentences[1]
    assert report.headline(entries, 0.05)["speedup_over_best_plain"] == pytest.approx(0.9, rel=0.02)


def test_only_evenly_spaced_calls_are_named_as_such(tmp_path):
    """Catches a speed-up over evenly spaced steps that passes for one over the best plain sampling."""
    said = claim(compared(evaluation(tmp_path / "a"))[0], 0.05)
    assert "Only evenly spaced calls were evaluated for plain sampling" in said.sentences[1]


def test_recommended_is_never_slower_than_full_depth(tmp_path):
    """Catches a "recommended" point whose overhead eats what it saves, though the evaluation marked it."""
    points = POINTS[:1] + (("threshold", "threshold 0.98", 2.8, 20, 10.4, 26.0),)
    directory = evaluation(tmp_path / "a", points)
    results = Path(directory) / "results.jsonl"
    lines = [json.loads(line) | {"recommended": "threshold" in line} for line in results.read_text().splitlines()]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries, _ = compared(directory)
    assert recommend(entries, 0.05) is None and report.headline(entries, 0.05) is None
    assert claim(entries, 0.05).tone == "bad" and "No early exit is both faster" in claim(entries, 0.05).sentences[0]


def test_tolerance_is_the_evaluations(tmp_path):
    """Catches pages that each have a tolerance of their own."""
    points = POINTS[:1] + (("threshold", "threshold 0.9", 2.0, 20, 3.0, 28.0), POINTS[3])
    directory = evaluation(tmp_path / "a", points, noise=0.01)
    for tolerance, label in ((0.05, None), (0.1, "threshold 0.9")):
        (tmp_path / "a" / "config.json").write_text(json.dumps({"eval": {"tolerance": tolerance}}))
        found = report.load_report([directory])
        head = found.numbers()["headline"]
        found.write(tmp_path / "a.html")
        assert (head and head["setting"]["label"]) == label
        assert f"shaded to {100 * tolerance:.0f}\u00a0%" in (tmp_path / "a.html").read_text()


def test_without_times_nothing_is_called_fast(tmp_path):
    """Catches GMACs sold as a speed-up."""
    directory = evaluation(tmp_path / "a")
    results = Path(directory) / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        for key in ("seconds_per_image", "seconds_per_image_runs", "images_per_s"):
            del line["metrics"][key]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report.load_report([directory])
    found.write(tmp_path / "a.html")
    said = found.sentences()
    assert "of the GMACs (not timed)" in said[0] and not any("fast as" in text for text in said)
    assert found.numbers()["headline"]["speedup_over_uniform"] is None
    assert "GMACs are not a speed-up" in (tmp_path / "a.html").read_text()


def test_thresholds_that_differ_late_stay_apart(tmp_path):
    """Catches two settings of one label merged into the first of them."""
    points = [("threshold", "threshold 1", 5.0, 20, 5.0 + i, 26.0) for i in range(2)]
    directory = evaluation(tmp_path / "a", (POINTS[0], *points))
    results = Path(directory) / "results.jsonl"
    lines = [json.loads(line) | {"slug": f"point-{i}"} for i, line in enumerate(results.read_text().splitlines())]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(compared(directory)[0]) == 3


# ---- equal seconds -------------------------------------------------------------------------------------------------


def test_early_exit_wins(tmp_path):
    """Catches a wrong order, a setting over the budget, and a rival of the same kind shown as the competitor."""
    entries, _ = compared(replicas(tmp_path))
    found = at(entries, 0.4)
    assert [entry.family for entry in found.order] == ["residual", "threshold", "fixed", "steps"]
    assert not found.ties and found.tone == "good"
    assert "threshold 0.98, residual, refresh 4 (26." in found.text and "wins; next is threshold 0.98, +" in found.text
    assert "The best without early exit, fixed layer 3, has +" in found.text
    assert at(entries, 0.1).text.endswith("no method is fast enough.")
    assert "threshold 0.99, residual, refresh 2" in at(entries, 0.6).text
    assert all(len(entry.quality) == 3 for entry in entries)


def test_a_tie(tmp_path):
    """Catches a winner that is announced although the difference is inside the noise."""
    points = changed({"residual": 30.0, "threshold": 33.0, "fixed": 30.3})
    found = at(compared(replicas(tmp_path, points=points, noise=1.5))[0], 0.4)
    assert found.tone == "even" and {entry.family for entry in found.ties + found.order[:1]} >= {"residual", "fixed"}
    assert "nobody wins" in found.text and "is not told from" in found.text


def test_early_exit_loses(tmp_path):
    """Catches a comparison that praises early exit where a fixed layer is better."""
    points = changed({"residual": 40.0, "threshold": 41.0})
    found = at(compared(replicas(tmp_path, points=points))[0], 0.4)
    assert found.tone == "bad" and found.order[0].family == "fixed" and "fixed layer 3" in found.text
    assert "next is threshold 0.98, residual, refresh 4" in found.text


def test_only_baselines(tmp_path):
    """Catches a verdict for early exit where none took part, and matched controls that win."""
    points = tuple(p for p in POINTS if p[0] in BASELINES) + (("matched_random", "matched", 2.8, 20, 4.0, 20.0),)
    found = at(compared(replicas(tmp_path, points=points))[0], 0.4)
    assert found.tone == "bad" and "No early exit is this fast" in found.text and found.order[0].family == "fixed"


def test_differences_are_paired_within_a_model(tmp_path):
    """Catches the noise that both points share, which drowns a small and certain difference."""
    points = changed({"residual": 30.0, "threshold": 30.5})
    entries, _ = compared(evaluation(tmp_path / "a", points, noise=0.02, common=5.0))
    one, two = named(entries, "threshold 0.98", "threshold 0.98, residual, refresh 4")
    found = gap(one, two)
    assert found.excludes() and found.mean == pytest.approx(0.5, abs=0.1) and found.n == 3


def test_training_seeds_outweigh_noise_seeds(tmp_path):
    """Catches nine values of three trainings that pass for nine trainings."""
    directories = []
    for seed, apart in enumerate((1.0, 2.0, 9.0)):  # how much better one of the two is depends on the training
        points = changed({"residual": 20.0, "threshold": 20.0 + apart})
        directories.append(evaluation(tmp_path / f"a{seed}", points, seed=seed))
    found = at(compared(directories)[0], 0.4)
    assert [entry.family for entry in found.ties] == ["threshold"] and "nobody wins" in found.text


def test_the_selection_seed_chooses_the_setting(tmp_path):
    """Catches a setting that is picked by the very numbers it is then reported with."""
    directory = evaluation(tmp_path / "a", noise=0.0)
    results = tmp_path / "a" / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    lines[2]["metrics"][f"{KEY}_selection"] = 99.0  # residual 0.99: the best on the reported seeds
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = [verdict.order[0].label for verdict in verdicts(compared(directory)[0]) if verdict.order]
    assert "threshold 0.98, residual, refresh 4" in first and "threshold 0.99, residual, refresh 2" not in first


def test_seconds_of_different_evaluations(tmp_path):
    """Catches raw seconds of a slow and a fast day in one comparison, and silence about it."""
    alone, notes = compared([evaluation(tmp_path / "alone")])
    assert not any("evaluations" in note for note in notes)
    directories = [evaluation(tmp_path / f"a{seed}", seed=seed, slower=1 + 2 * seed) for seed in range(2)]
    found, notes = compared(directories)
    assert [e.cost for e in found] == pytest.approx([e.cost for e in alone])
    assert any("come from 2 evaluations" in note and "own full-depth seconds" in note for note in notes)


def test_other_steps_of_the_same_network(tmp_path):
    """Catches a full depth of 10 steps that counts as much as one of 20."""
    short = (("full", "full depth", 7.0, 10, 15.0, 50.0), ("threshold", "threshold 0.9", 3.5, 10, 7.5, 60.0))
    directories = [evaluation(tmp_path / "a"), evaluation(tmp_path / "b", short, slower=3.0)]
    found, _ = compared(directories)
    assert {e.label: e.cost for e in found if e.first.nfe == 10} == pytest.approx(
        {"full depth, 10 evenly spaced calls": 0.5, "threshold 0.9": 0.25}
    )


def test_a_smaller_network(tmp_path):
    """Catches a small model that is divided by its own full depth, or timed on another machine."""
    small = (("full", "full depth", 7.0, 20, 4.0, 35.0),)
    directories = [*replicas(tmp_path), *replicas(tmp_path, name="small", points=small, mac=0.4)]
    found, notes = compared(directories)
    entry = next(e for e in found if e.model == "small0")
    assert entry.cost == pytest.approx(0.4) and len(entry.quality) == 3 and entry.family == "full"
    assert [e.model for e in at(found, 0.4).order].count("small0") == 1
    assert any(note.startswith("small0: not the network of a0") for note in notes)
    other = evaluation(tmp_path / "other", small, model="other", mac=0.4, device="a GPU")
    found, notes = compared([*directories, other])
    assert next(e for e in found if e.model == "other").cost is None
    assert any("Its seconds are not compared" in note for note in notes)


def test_what_makes_a_model(tmp_path):
    """Catches trainings of different methods, or the same weights twice, that are averaged as training seeds."""
    a = replicas(tmp_path, n=2)
    b = evaluation(tmp_path / "b", model="b")
    again = evaluation(tmp_path / "again", POINTS[:1] + (("schedule", "schedule", 4, 20, 6.0, 27.0),))  # weights of a0
    found, notes = compared([*a, b, again])
    models = {e.model: len(e.quality) for e in found}
    assert models == {"a0": 2, "b": 1}
    assert any("not every run of a0 has them: schedule" in note for note in notes)
    stranger = evaluation(tmp_path / "stranger", weights="x")  # trained with a0's settings and seed, yet not a0
    assert len({e.model for e in compared([a[0], stranger])[0]}) == 2
    chosen = compared([a[0], b, stranger], ["one", "one", "two"])[0]
    assert {e.model: len(e.quality) for e in chosen} == {"one": 2, "two": 1}


def test_seconds_of_one_interleaved_run(tmp_path):
    """Catches seconds of separate evaluations where better ones are at hand, or those of two runs taken for one."""
    small = (("full", "full depth", 7.0, 20, 4.0, 35.0),)
    directories = [evaluation(tmp_path / "a"), evaluation(tmp_path / "small", small, model="small", mac=0.4)]
    timings = [
        {"run": "x", "seconds": {label.replace(" ", "-"): [0.02] for _, label, *_ in POINTS}},
        {"run": "y", "seconds": {"full-depth": [0.008, 0.01, 0.0125]}},
    ]
    for name, timing in zip(("a", "small"), timings, strict=True):
        (tmp_path / name / "timing.json").write_text(json.dumps(timing))
    found, notes = compared(directories)
    assert found[-1].cost == pytest.approx(0.4) and any("2 evaluations" in note for note in notes)
    (tmp_path / "small" / "timing.json").write_text(json.dumps(timings[1] | {"run": "x"}))
    found, notes = compared(directories)
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
    found, notes = compared(directories)
    assert [entry.cost for entry in found] == pytest.approx([1.0] * len(POINTS))
    assert not any("threads" in note for note in notes)


def test_models_of_the_same_training_seeds_are_paired(tmp_path):
    """Catches the difference between trainings, common to both models, that drowns that between the models."""
    directories = []
    for seed, common in enumerate((0.0, 5.0, 9.0)):
        for model, apart in (("a", 0.0), ("b", 1.0)):
            points = tuple((*point[:5], point[5] + common + apart) for point in POINTS)
            directories.append(evaluation(tmp_path / f"{model}{seed}", points, seed=seed, model=model, noise=0.01))
    found, _ = compared(directories)
    one, two = (next(e for e in found if e.model == f"{model}0") for model in "ab")
    found = gap(two, one)
    assert found.excludes() and found.mean == pytest.approx(1.0, abs=0.1) and found.n == 3
    with_another = [*directories[:4], evaluation(tmp_path / "a9", seed=9), directories[5]]
    found, _ = compared(with_another, ["a", "b"] * 3)
    one, two = (next(e for e in found if e.model == model) for model in "ab")
    assert gap(two, one).high - gap(two, one).mean > 5


def test_timing_several_evaluations_together(tmp_path):
    """Catches a directory that is timed with another one's network or points, and batches that differ."""
    for name, width in (("a", 32), ("b", 16)):
        config = quick(
            nnet__embed_dim=width, eval__sweep=("reuse.every=2",), eval__thresholds=(0.9,), mixed_precision="no"
        ).config
        (tmp_path / name).mkdir()
        config.nnet_path = str(tmp_path / name / "nnet.pth")
        torch.save(build_model(config).state_dict(), config.nnet_path)
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
        slugs = ("full-depth", "threshold-0.9", "reuse-every-2")
        results = "".join(json.dumps({"slug": slug, "nfe": config.sample.sample_steps}) + "\n" for slug in slugs)
        (tmp_path / name / "results.jsonl").write_text(results)
    directories = [tmp_path / name for name in "ab"]
    found = time_together(directories, 2)
    stored = [json.loads((directory / "timing.json").read_text()) for directory in directories]
    assert stored[0]["run"] == stored[1]["run"] and set(found) == {str(directory) for directory in directories}
    assert all(list(s["seconds"]) == ["full-depth", "threshold-0.9", "reuse-every-2"] for s in stored)
    assert all(len(runs) == 2 and min(runs) > 0 for s in stored for runs in s["seconds"].values())
    (tmp_path / "b" / "results.jsonl").write_text(
        results.replace(f'"nfe": {config.sample.sample_steps}', '"nfe": 3', 1)
    )
    with pytest.raises(ValueError, match=r"b: the point full-depth is not as it was measured \(nfe\)"):
        time_together(directories, 1)  # was the seconds of these calls beside the quality of others
    (tmp_path / "b" / "results.jsonl").write_text(results)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["tf32"] = True
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--tf32"):
        time_together(directories, 1)
    config["eval"]["timing_batch"] += 1
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="timing_batch"):
        time_together(directories, 1)
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b/config.json has no cpu, mixed_precision"):  # was an AttributeError
        time_together(directories, 1)
    with pytest.raises(SystemExit):
        leaderboard.main(["benchmarks/results/frontier-digits-cpu.json", "--board", str(tmp_path / "none.md")])


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"seeds": None}, "line 1: `seeds` is None"),
        ({"exit": "threshold"}, "line 1: `exit` is 'threshold'"),
        ({"n_images": [1]}, r"line 1: `n_images` is \[1\]"),
        ({"timing.json": {"run": "x", "seconds": {"full-depth": [0, 1]}}}, "timing.json: `full-depth` is"),
        ({"timing.json": {"run": "x", "seconds": {"full-depth": ["1"]}}}, "timing.json: `full-depth` is"),
    ],
)
def test_files_of_wrong_kinds_are_named(wrong, place, tmp_path):
    """Catches a traceback, or a mistake without the file that it is in."""
    directory = Path(evaluation(tmp_path / "a"))
    timing = wrong.pop("timing.json", None)
    if timing is not None:
        (directory / "timing.json").write_text(json.dumps(timing))
    first, *rest = (directory / "results.jsonl").read_text().splitlines()
    (directory / "results.jsonl").write_text("\n".join([json.dumps(json.loads(first) | wrong), *rest]))
    with pytest.raises(ValueError, match=place):
        report.load_report([str(directory)])


# ---- files and commands --------------------------------------------------------------------------------------------


def test_report_and_comparison_agree(tmp_path):
    """Catches two pages that say different things about one directory."""
    directory = evaluation(tmp_path / "a", n_seeds=2)
    report.load_report([directory]).write(tmp_path / "one.html")
    compare.main([directory, f"--output={tmp_path / 'two.html'}"])
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()
    assert json.loads((tmp_path / "two.json").read_text())["claim"] == report.load_report([directory]).sentences()[:2]


def test_page_and_command(tmp_path, capsys):
    """Catches a page that is not well-formed, numbers that are missing, and a command that swallows its names."""
    a, b = replicas(tmp_path, n=2), evaluation(tmp_path / "b=c", model="b")
    output, numbers = tmp_path / "out" / "all.html", tmp_path / "numbers" / "all.json"
    compare.main([f"mine={a[0]}", f"mine={a[1]}", b, f"--output={output}", f"--json={numbers}"])
    ElementTree.fromstring(output.read_text().partition("\n")[2])
    found = json.loads(numbers.read_text())
    assert {point["model"] for point in found["points"]} == {"mine", "b=c"} and "95 %" in found["rule"]
    said = capsys.readouterr().out
    assert found["verdicts"] and all(v["text"] in said for v in found["verdicts"])
    assert "threshold 0.98, residual, refresh 4 · mine" in said
    row = next(
        p for p in found["points"] if p["label"] == "threshold 0.98, residual, refresh 4" and p["model"] == "mine"
    )
    assert row["quality_interval"][0] < row["quality"] < row["quality_interval"][1] and row["trainings"] == [0, 1]
    assert row["seconds_relative_to_best_plain"] == pytest.approx(0.4, rel=0.05) and row["best_plain"] == "full depth"


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "no such file"), (["{a}", "--output=x.txt"], "ends in .html")]
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
    """Catches a traceback where the user gave a wrong directory."""
    directory = evaluation(tmp_path / "a")
    with pytest.raises(SystemExit):
        compare.main([text.format(a=directory) for text in arguments])
    assert message in capsys.readouterr().err


def test_evaluations_without_a_common_point_are_refused(tmp_path):
    """Catches a page of no points: a traceback where two evaluations of one model share none."""
    evaluation(tmp_path / "a", points=POINTS[:2], seed=1)
    evaluation(tmp_path / "b", points=POINTS[2:4], seed=2)
    with pytest.raises(ValueError, match="no point was measured in all of them"):
        report.load_report([tmp_path / "a", tmp_path / "b"], ["m", "m"])


def test_leaderboard_holds_records_only(tmp_path, capsys):
    """Catches a row that is no record, speed-ups over evenly spaced calls among them, and a file that is lost."""
    entries = placed(tmp_path)
    numbers = {"headline": report.headline(entries, 0.05), "dataset": "digits", "commit": "0123456789"}
    board, file = tmp_path / "board.md", tmp_path / "numbers.json"
    text = leaderboard.BOARD.read_text()
    before = text[: text.index("|\n", text.index("|---")) + 2]  # without rows
    board.write_text(before)

    def appended(numbers):
        file.write_text(json.dumps(numbers))
        leaderboard.main([str(file), f"--board={board}"])
        return board.read_text().removeprefix(before.rstrip()).strip().splitlines()

    (line,) = appended(numbers)
    assert "| 0123456 | digits | threshold 0.98, power 2, 8 steps | 0.55" in line and "| 0.200 |" in line
    assert line.count("|") == before.splitlines()[-1].count("|")
    assert len(appended(numbers)) == 1 and "no record on digits" in capsys.readouterr().out
    faster = numbers["headline"] | {"speedup_over_best_plain": 2.0}
    assert len(appended(numbers | {"headline": faster})) == 2
    one, two = ({"training_runs": n, "timing_runs": t} for n, t in ((1, 1), (2, 3)))  # intervals over trainings
    for wrong in (None, faster | {"other_grids": False}, faster | one, faster | two):
        with pytest.raises(SystemExit):
            appended(numbers | {"headline": wrong})
    assert "headline" in capsys.readouterr().err and len(board.read_text().splitlines()) == len(before.splitlines()) + 2


@pytest.mark.parametrize("quality", [31.9, 30.1])
def test_what_looking_is_worth(tmp_path, quality):
    """Catches a policy that is praised where its control is better, and another point's control."""
    control = ("matched_static", "matched_static path threshold-0.98", 2.7, 20, 4.0, quality)
    stray = ("matched_random", "matched_random path threshold-0.9", 2.7, 20, 4.0, quality)
    directories = replicas(tmp_path, points=POINTS + (control, stray), noise=0.01)
    (text,) = worth_of_looking(compared(directories)[0])
    assert "threshold 0.98 · " not in text and text.startswith(
        "threshold 0.98 against matched_static path threshold-0.98"
    )
    assert (": −2." in text) == (quality > 31) and (": +3." in text) == (quality < 31) and "outside the noise" in text
    assert "2.80 layers against 2.70" in text


def test_the_price_of_a_quality(tmp_path):
    """Catches settings chosen on the reported seeds, a slower one than needed, controls offered for use."""
    control = ("matched_static", "matched_static path threshold-0.98", 2.7, 20, 3.0, 26.1)
    points = changed({"fixed": 26.6}) + (control, ("steps", "full depth 14 steps", 7.0, 14, 5.0, 27.4))
    entries, _ = compared(replicas(tmp_path, points=points))
    full = named(entries, "full depth")[0]
    found = fastest_of_each(entries, 0.05)
    assert {e.label for e in found} == {"threshold 0.98, residual, refresh 4", "fixed layer 3"}
    assert all(speedup(e, full).mean == pytest.approx(2.5, rel=0.02) for e in found)
    assert fastest_of_each(compared(evaluation(tmp_path / "a", changed({"residual": 30.0})))[0], 0.05) == []
