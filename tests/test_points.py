"""Which points an evaluation measures, and how a sweep names them."""

import json

import pytest
import torch
from test_configs import load

from libs import regimes
from libs.evaluation import evaluate as evaluator
from libs.evaluation import sweep as points_module
from libs.evaluation.sweep import Method, parse_entry, points, read_entry
from libs.exits import Refresh, Residual
from libs.models import build_model
from libs.run import Alone
from libs.sampling.sampler import Sampler


def quick(**settings):
    """The digits' quick twin (5 layers), as a sampler, with settings by dotted path."""
    config = load("digits_uvit_tiny", "quick")
    for key, value in settings.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    torch.manual_seed(0)
    return Sampler.of(config, build_model(config), regimes.pixels(config), Alone("cpu"))


@pytest.mark.parametrize(
    ("entry", "family", "label", "settings"),
    [
        ("fixed.layer=3", "fixed", "fixed layer 3", {"layer": 3}),
        ("steps=10", "steps", "full depth 10 steps", {}),
        ("steps=7,grid=power:2.5", "plain", "full depth, 7 steps, grid power:2.5", {}),
        ("steps=3,grid=(1,0.6,0.2,0.001)", "plain", "full depth, 3 steps, grid 1,0.6,0.2,0.001", {}),
        (
            "steps=5,grid=power:2,lower_order_final=False",
            "plain",
            "full depth, 5 steps, grid power:2, lower_order_final False",
            {},
        ),
        ("full", "full", "full depth", {}),
        ("sampler=ddim, steps=4", "sampler", "full depth, ddim, 4 steps", {}),
        ("threshold.certainty=0.98", "threshold", "threshold 0.98", {"certainty": 0.98}),
        ("threshold.certainty=1", "threshold", "threshold 1", {"certainty": 1.0}),
        (
            "threshold.certainty=0.98,residual=True,refresh=4",
            "residual",
            "threshold 0.98, residual, refresh 4",
            {"certainty": 0.98},
        ),
        ("fixed.layer=2,refresh=2", "refresh", "fixed layer 2, refresh 2", {"layer": 2}),
        (
            "forecast.every=2, forecast.order=3",
            "forecast",
            "full depth, forecast.every 2, forecast.order 3",
            {},
        ),
        (
            "threshold.certainty=0.98,forecast.every=2,forecast.tail=0,steps=9",
            "threshold, forecast",
            "threshold 0.98, 9 steps, forecast.every 2, forecast.tail 0",
            {"certainty": 0.98},
        ),
        ("fixed.layer=3,forecast.every=2", "forecast", "fixed layer 3, forecast.every 2", {"layer": 3}),
        ("duo.path=runs/small/last.ckpt", "duo", "duo path small", {"path": "runs/small/last.ckpt"}),
        ("reuse.every=2", "reuse", "reuse every 2", {"every": 2}),
        ("cache.every=3,cache.layers=2", "cache", "cache every 3 layers 2", {"every": 3, "layers": 2}),
        (
            "schedule.shares=(0.5, 1.0),steps=7",
            "schedule",
            "schedule shares (0.5, 1.0), 7 steps",
            {"shares": (0.5, 1.0)},
        ),
    ],
)
def test_sweep_entries(entry, family, label, settings):
    """Catches entries that are read as another method, lose a setting, or share a label with another point."""
    method = parse_entry(entry)
    assert (method.family, method.label, method.settings) == (family, label, settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("treshold.certainty=0.9", "the policy is 'treshold'; it must be one of"),
        ("threshold.certainy=0.9", "threshold has the settings at, certainty"),
        ("threshold.certainty", "sets nothing"),
        ("threshold=0.9", "sets nothing"),
        ("fixed.layer=2,reuse.every=2", "two policies, fixed and reuse"),
        ("fixed.layer=two", "fixed.layer is 'two'; a value of type int"),
        ("fixed.layer=2.5", "fixed.layer is '2.5'; a value of type int"),
        ("steps=0", "steps is 0"),
        ("residual=1", "residual is '1'; a value of type bool"),
        ("sampler=euler", "sampler is 'euler'"),
        ("forecast.evry=2", "must be one of"),
        ("", "must be one of"),
        ({"policy": "threshold", "certanty": 0.9}, "certanty is no setting; threshold has at, certainty"),
        ({"policy": "treshold"}, "the policy is 'treshold'"),
        ("steps=5,lower_order_final=0", "lower_order_final is '0'; a value of type bool"),
        ({"steps": "many"}, "steps is 'many'; a value of type int"),
    ],
)
def test_sweep_mistakes(entry, message):
    """Catches a typing error that evaluates something else; the entry and what is allowed must be named."""
    with pytest.raises(ValueError) as caught:
        read_entry(entry)
    assert message in str(caught.value) and f"eval.sweep entry {entry!r}" in str(caught.value)


def test_entries_as_dicts_and_files(tmp_path):
    """Catches entries that mean another method as a dict or in a file than as text."""
    text = ("threshold.certainty=0.9,steps=7,grid=power:2.5", "schedule.shares=(0.5,1.0),refresh=2", "full")
    dicts = [
        {"policy": "threshold", "certainty": 0.9, "steps": 7, "grid": "power:2.5"},
        {"policy": "schedule", "shares": [0.5, 1.0], "refresh": 2},
        {},
    ]
    assert [read_entry(entry) for entry in dicts] == [[parse_entry(entry)] for entry in text]
    plans = [read_entry("plan=a/b.json"), read_entry({"plan": "a/b.json"})]
    assert plans == [[Method("planned", {"path": "a/b.json"})]] * 2
    (tmp_path / "sweep.json").write_text(json.dumps([*dicts[:2], "full"]))
    assert read_entry(str(tmp_path / "sweep.json")) == [parse_entry(entry) for entry in text]
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="eval.sweep is .*sweep.json"):
        read_entry(str(tmp_path / "sweep.json"))


def test_points_on_grids():
    """Catches two grids under one name, and a record that does not say its grid."""
    sampler = quick(eval__sweep=("steps=4,grid=power:2.5", "steps=4,grid=logsnr", "steps=4", "threshold,grid=logsnr"))
    found = [point for point in points(sampler) if point.solver["grid"]]
    assert [p.solver["grid"] for p in found] == ["power:2.5", "logsnr", "logsnr"]
    assert [p.family for p in found] == ["plain", "plain", "threshold"] and len({p.slug for p in found}) == 3
    assert not torch.equal(found[0].plan.t, found[1].plan.t)


def test_points_with_solver_settings():
    """Catches a solver's setting that is read and not used, that one entry leaves to the next, or that none has."""
    plain = "steps=4,grid=power:2"
    sampler = quick(
        eval__sweep=(f"{plain},lower_order_final=False", plain, f"threshold,{plain},lower_order_final=False")
    )
    own, default, exits = points(sampler)[2:]
    assert own.plan.cm[-1, 1] != 0 and default.plan.cm[-1, 1] == 0 and exits.plan.cm[-1, 1] != 0
    assert own.solver["lower_order_final"] is False and own.slug != default.slug and own.family == "plain"
    dicts = {"steps": 4, "grid": "power:2", "lower_order_final": False}
    assert read_entry(dicts) == read_entry(f"{plain},lower_order_final=False")
    with pytest.raises(ValueError, match="lower_order_final is no setting of ddim; it has eta"):
        points(quick(eval__sweep=("steps=4,sampler=ddim,lower_order_final=False",)))


def test_pairs_need_guidance():
    """Catches a second, equal point in a family of its own."""
    config = load("digits_uvit_tiny", "quick")
    config.eval.sweep = ("threshold.certainty=0.9,pair=tied",)
    with pytest.raises(ValueError, match="pair is 'tied' and sample.scale is 0"):
        points(Sampler.of(config, build_model(config), regimes.pixels(config), Alone("cpu")))


def test_points_with_forecasts():
    """Catches forecast settings of one entry that another one takes, and a point that calls more than it says."""
    sweep = ("steps=9,forecast.every=3,forecast.order=3,forecast.tail=1", "steps=9,forecast.every=2", "steps=9")
    found = [point for point in points(quick(eval__sweep=sweep)) if point.plan.rows == 9]
    assert [p.plan.computed.tolist() for p in found] == [
        [i in (0, 3, 6, 8) for i in range(9)],
        [i % 2 == 0 or i > 4 for i in range(9)],
        [True] * 9,
    ]
    assert [p.family for p in found] == ["forecast", "forecast", "steps"]
    assert found[0].solver["forecast.order"] == 3 and "forecast.order" not in found[2].solver
    for wrong, message in {
        "every=0": "every is 0",
        "every=2,forecast.order=4": "order is 4",
        "order=2": "computes each",
    }.items():
        with pytest.raises(ValueError, match=message):
            points(quick(eval__sweep=(f"steps=9,forecast.{wrong}",)))


def test_points_of_an_evaluation():
    """Catches existing settings that a sweep replaces, points measured twice, and full depth that is not first."""
    sweep = ("steps=3", "fixed.layer=2", "full", "reuse.every=2", "schedule,residual=True,refresh=2,steps=3")
    sampler = quick(eval__sweep=sweep, eval__fixed=(2,), eval__thresholds=(0.9, 0.8))
    found = points(sampler)
    assert [p.slug for p in found] == [
        "full-depth", "threshold-0.9", "threshold-0.8", "fixed-layer-2", "full-depth-3-steps", "reuse-every-2",
        "schedule-residual-refresh-2-3-steps",
    ]  # fmt: skip
    last = found[-1]
    assert isinstance(last.policy, Residual) and isinstance(last.policy.inner, Refresh)
    assert last.plan.nfe == last.solver["steps"] == 3 and last.exit["residual"] and last.exit["refresh"] == 2
    assert found[0].plan.nfe == 5


def test_residual_of_the_configured_policy():
    """Catches sample.residual and sample.refresh that reach the baselines too, or nothing."""
    settings = {"sample__residual": True, "sample__refresh": 4, "eval__fixed": (2,)}
    sampler = quick(**settings, eval__thresholds=(0.9,))
    assert [p.family for p in points(sampler)] == ["full", "residual", "fixed"]
    sampler = quick(**settings, exit__name="full")
    with pytest.raises(ValueError, match="leaves early"):
        points(sampler)


def test_a_path_is_text():
    """Catches a file name that is read as a number or an expression, or that breaks the folder of the point."""
    method = parse_entry("matched_static.path=runs/4/points/a=b/trace.npz")
    assert method.settings == {"path": "runs/4/points/a=b/trace.npz"} and "/" not in method.label
    assert parse_entry("calibrated.path=12").settings == {"path": "12"}
    assert Method("schedule", {"path": "x/0.6.json"}).label == "schedule path 0.6"


def test_two_files_of_one_name_are_refused(tmp_path):
    """Catches the second of two runs' plans dropped in silence, as both would be the same point."""
    for name in "ab":
        (tmp_path / name).mkdir()
        content = {"points": [1, 2, 3, 4, 5], "plan": {}} | dict(schedule={"t": [1.0], "layers": [5]})
        (tmp_path / name / "budget.json").write_text(json.dumps(content))
    files = [f"schedule.path={tmp_path / name}/budget.json" for name in ("a", "b", "a/../a")]
    assert len(points(quick(eval__sweep=(files[0], files[2])))) == len(points(quick(eval__sweep=(files[0],))))
    with pytest.raises(ValueError, match=r"a/budget.json and .*b/budget.json would both be the point 'schedule-path-"):
        points(quick(eval__sweep=tuple(files)))


def test_evaluation_of_a_sweep(run, tmp_path):
    """Catches points whose records lack their sampler, or whose cost does not count what was reused."""
    sweep = ("reuse.every=2", "cache.every=2", "fixed.layer=1,refresh=2,residual=True", "sampler=ddim,steps=4")
    sampler = quick(eval__sweep=sweep, eval__thresholds=(0.9,))
    config, model, regime = sampler.config, sampler.model, sampler.regime
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    config.nnet_path = str(tmp_path / "nnet.pth")
    records = {r["family"]: r for r in evaluator.evaluate(config, regime, run)}
    macs, gmacs = model.macs(), {name: r["metrics"]["gmacs"] * 1e9 for name, r in records.items()}
    full, head = macs.at(5), macs.head[1]
    assert gmacs["full"] == pytest.approx(5 * full) and gmacs["reuse"] == pytest.approx(3 * full)
    assert records["reuse"]["metrics"]["mean_depth"] == pytest.approx(3)
    outer = macs.embed + macs.layers[0] + macs.layers[4] + macs.head[5]
    assert gmacs["cache"] == pytest.approx(3 * full + 2 * outer)
    assert gmacs["residual"] == pytest.approx(3 * full + 2 * macs.at(1) + 2 * head)  # the last call measures nothing
    assert records["sampler"]["sampler"] == {"name": "ddim", "steps": 4, "grid": ""} and records["sampler"]["nfe"] == 4
    assert not any(r["recommended"] for name, r in records.items() if name in ("reuse", "cache", "sampler"))


def test_thresholds_that_differ_late_are_two_points():
    """Catches certainties that agree in six digits under one name, so that one of them overwrites the other."""
    labels = {points_module.Method("threshold", {"certainty": value}).label for value in (0.9999991, 0.9999992, 0.98)}
    assert len(labels) == 3 and "threshold 0.98" in labels
    assert points_module.Method("power", {"exponent": 3.0}).label == "power exponent 3"
