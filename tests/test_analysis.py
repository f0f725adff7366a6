"""Analysis on constructed data with known answers, and the command on a quick model."""

import json

import numpy as np
import pytest
import torch

from configs import digits_uvit_tiny
from libs import checkpoints as weights
from libs import regimes
from libs.analysis import explain
from libs.analysis.analyze import analyze, gradient_flow
from libs.analysis.calibrate import DepthBench
from libs.losses import LAYER_WEIGHTS
from libs.models import ESTIMATORS, build_model
from libs.sampling.sampler import Sampler

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("used", "wanted"),
    [
        (np.repeat([[1], [3], [5]], 4, 1), (1, 0, 0)),  # a static schedule
        (np.repeat([[1, 3, 5, 2]], 3, 0), (0, 1, 0)),  # a depth per image
        (np.array([[1, 2], [2, 1]]), (0, 0, 1)),  # interaction only
        (np.array([[1, 2], [3, 4]]), (0.8, 0.2, 0)),
        (np.full((3, 4), 7), (0, 0, 0)),
    ],
)
def test_exit_variance(used, wanted):
    """Catches time and sample exchanged, and shares that do not add up."""
    found = explain.exit_variance(used)
    assert [found[name] for name in ("time", "sample", "residual")] == pytest.approx(wanted)
    assert found["total"] == pytest.approx(used.var())


def test_class_share_and_late_images():
    """Catches a class share that chance alone gives, classes counted beside the images instead of among them, and a
    busy image taken for a simple one."""
    labels = RNG.integers(10, size=400)
    by_class = np.repeat(labels[None], 5, 0)
    assert explain.exit_variance(by_class, labels)["class"] == pytest.approx(1)
    blind = explain.exit_variance(RNG.integers(8, size=(1, 400)), labels)
    assert blind["class"] < 0.05 < 9 / 399 + 0.05 and blind["sample"] == pytest.approx(1)
    assert "class" not in explain.exit_variance(by_class)
    pixels = np.zeros((40, 1, 4, 4), np.uint8)
    pixels[:, :, ::2] = np.arange(0, 200, 5)[:, None, None, None]
    depth = np.arange(40.0)
    late = explain.late_images(depth, np.arange(40) // 20, explain.busyness(pixels))
    assert late["spearman_busy"] == pytest.approx(1) == late["spearman_busy_within_classes"]
    assert late["depth_per_class"] == {"0": 9.5, "1": 29.5}
    assert explain.late_images(depth, None, -depth)["spearman_busy"] == pytest.approx(-1)


def test_agreement_and_spread():
    """Catches a mode taken over everything instead of per call, and a spread over calls instead of images."""
    used = np.array([[1, 1, 1, 7], [7, 7, 7, 7], [2, 2, 3, 3]])
    assert explain.mode_agreement(used) == pytest.approx((3 / 4 + 1 + 1 / 2) / 3)
    assert explain.sample_spread(np.array([[1, 7], [3, 5]]))["std"] == pytest.approx(2)
    assert explain.sample_spread(np.array([[1, 1], [7, 7]]))["std"] == 0
    histogram = explain.exit_histogram(used, 7)
    assert histogram.shape == (3, 8) and histogram[0, 1] == 0.75 and histogram.sum(1).tolist() == [1, 1, 1]


def test_switch_time():
    """Catches a switch read from the wrong end, and one found where nothing switches."""
    t = np.linspace(1, 0, 11)
    used = np.where(t > 0.61, 2, 13)[:, None]
    assert explain.switch_time(t, used) == pytest.approx(0.65, abs=0.06)
    assert explain.switch_time(t[::-1], used[::-1]) == explain.switch_time(t, used)
    assert explain.switch_time(t, np.full((11, 4), 5)) is None


def test_predictor_scores():
    """Catches a baseline fitted on the scored half, a calibrated u that scores below 1, and undefined ranks."""
    target = RNG.gamma(2.0, 0.05, 4000)
    perfect = explain.predictor_scores(target, target)
    assert perfect["r2"] == perfect["spearman"] == pytest.approx(1) and perfect["mae"] == 0
    scaled = explain.predictor_scores(0.5 * target, target)
    assert scaled["r2"] < 0.5 and scaled["r2_refit"] == pytest.approx(1) and scaled["pearson"] == pytest.approx(1)
    noise = explain.predictor_scores(RNG.random(4000), target)
    assert noise["r2"] < 0 and abs(noise["r2_refit"]) < 0.01 and abs(noise["spearman"]) < 0.06
    half = target + RNG.normal(0, target.std(), 4000)
    assert explain.predictor_scores(half, target)["r2_refit"] == pytest.approx(0.5, abs=0.05)
    constant = explain.predictor_scores(np.full(4000, 0.3), target)
    assert constant["spearman"] == 0 and abs(constant["r2_refit"]) < 0.01
    assert explain.predictor_scores(target, np.zeros(4000))["r2"] == 0
    assert constant["mae_constant"] == pytest.approx(np.abs(target[1::2] - target[::2].mean()).mean())


def test_tables_and_curves():
    """Catches tables with times and exits exchanged, and groups that are not in the order of u."""
    u, target = RNG.random((3, 2, 100)), RNG.random((3, 2, 100))
    tables = explain.score_tables(u, target)
    assert np.shape(tables["r2"]) == (3, 2)
    assert tables["mae"][2][1] == explain.predictor_scores(u[2, 1], target[2, 1])["mae"]
    curve = explain.calibration_curve(np.arange(100) / 100, np.arange(100) / 50)
    np.testing.assert_allclose(curve["error"], 2 * np.array(curve["u"]))
    assert len(curve["u"]) == 10 and np.diff(curve["u"]).min() > 0
    by_time = np.repeat([[0.0], [1.0]], 50, 1)
    assert explain.explained_by_time(by_time) == 1
    assert explain.explained_by_time(by_time.T) == 0 == explain.explained_by_time(np.ones((2, 5)))


def quick(run, **settings):
    """A quick configuration with saved initial weights."""
    config = digits_uvit_tiny.get_config("quick")
    for name, value in settings.items():
        group, _, key = name.partition("__")
        config[group][key] = value
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in [*model.heads.parameters(), *model.uem.parameters()]:
        parameter.data += 0.2 * torch.randn_like(parameter)
    config.nnet_path = str(run.dir / "nnet.pth")
    weights.write_weights(model.state_dict(), config.nnet_path)
    return config, model, regimes.pixels(config)


@pytest.mark.parametrize("name", LAYER_WEIGHTS)
def test_gradients_go_where_the_settings_say(name, run):
    """Catches a weight or a target that is not stopped, in every weighting: the released one is known not to be."""
    config, model, regime = quick(run, loss__weights=name, loss__lambda_extra=0.5)
    flow = gradient_flow(DepthBench(Sampler.of(config, model, regime, run), 8, 7))
    assert flow["agree"], flow
    assert ("estimator" in flow["found"]["layers"]) == (name == "adadiff")
    assert flow["found"]["extra"] == ["backbone", "heads"]


@pytest.mark.parametrize("uem", [name for name in ESTIMATORS if name != "linear"])
def test_no_estimator_moves_the_backbone(uem, run):
    """Catches an estimator that reads tokens with their graph, with heads shared and the backbone frozen."""
    config, model, regime = quick(run, uem__name=uem, nnet__heads="shared", train__freeze_backbone=True)
    flow = gradient_flow(DepthBench(Sampler.of(config, model, regime, run), 8, 7))
    assert flow["found"] == flow["expected"] == {"simple": [], "uem": ["estimator"], "layers": []}


def test_a_leak_is_seen(run, monkeypatch):
    """The control of the two tests above: weights that are not stopped although the settings say so."""
    monkeypatch.setitem(LAYER_WEIGHTS, "ual", lambda u, k, gap: 1 - u)
    config, model, regime = quick(run)
    assert not gradient_flow(DepthBench(Sampler.of(config, model, regime, run), 8, 7))["agree"]


def test_analyze(run):
    """Catches a command that stops, numbers that JSON cannot hold, and a wrong end of time."""
    config, _, regime = quick(run)
    config.eval.thresholds = (0.5,)
    found = analyze(config, regime, run, n_images=8, seed=7, n_times=4, taus=[0.0, 1e9], budgets=[0.6])
    text = (run.dir / "analysis.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    point = stored["exits"]["threshold-0.5"]
    assert sum(point["variance"][name] for name in ("time", "sample", "residual")) in (0, pytest.approx(1))
    assert point["t"][0] == 1.0 and point["log_snr"] == sorted(point["log_snr"])
    estimates = stored["estimates"]
    assert np.shape(estimates["scores"]["excess"]["spearman"]) == (4, len(estimates["exits"]))
    assert np.array(estimates["mse_to_final"])[:, -1].tolist() == [0] * 4
    assert np.array(estimates["mean"]["error"]).min() > 0
    full, exact, first = stored["oracle"]
    assert exact["distance"] == full["distance"] and exact["psnr"] == 100
    assert first["mean_depth"] == 1 and first["share_of_macs"] < 0.5
    for name in found["pictures"]:
        assert (run.dir / name).stat().st_size > 5000
    (record,) = stored["per_image"]
    assert record["static"]["spends"] == pytest.approx(0.6, abs=0.04) and set(record["seconds"]) >= {
        "static",
        "inflight",
    }
    spends = record["static_at_thresholds"]["spends"]  # of whole images: one in eight moves it by this much
    assert record["thresholds"]["spends"] == pytest.approx(spends, abs=0.04 / 8)
    assert record["oracle_gain"]["mean"] > 0, "who knows the answer does better than depths for all images"
    assert not list(run.dir.glob("*.part")) and not (run.dir / "per-image.json").exists()
    assert len(found["pictures"]) == 7 and list(run.dir.glob("*.part")) == []


def test_points_are_analyzed_with_their_own_calls(run):
    """Catches a point of six calls that is analyzed on the calls of the experiment."""
    config, _, regime = quick(run)
    config.eval.sweep = ("threshold.certainty=0.5,steps=3,grid=power:2",)
    found = analyze(config, regime, run, n_images=8, seed=7, n_times=1, taus=[])
    ways = {point["label"]: point["t"] for point in found["exits"].values()}
    (few,) = (label for label in ways if "3 steps" in label)
    assert len(ways[few]) == 3 and ways[few][1] == pytest.approx((2 / 3) ** 2, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_images": 1}, "--images=1"), ({"n_times": 0}, "--times=0"), ({"taus": [-1.0]}, "--oracle=-1.0")],
)
def test_bad_requests(change, message, run):
    """Each message names the flag and the value."""
    config, _, regime = quick(run)
    with pytest.raises(ValueError, match=message):
        analyze(config, regime, run, **(dict(n_images=8, seed=7, n_times=2, taus=[]) | change))
