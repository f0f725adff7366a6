"""Budgets: what calibration promises is what the executor spends, and more budget never buys less."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs import digits_uvit_tiny
from libs import checkpoints as weights
from libs import regimes
from libs.analysis import calibration
from libs.analysis.calibrate import calibrate, calls_name, share_of_rows
from libs.analysis.calibration import ALWAYS, Bins, Evidence
from libs.exits import EXIT_POLICIES, oracle
from libs.models import build_model
from libs.sampling.denoiser import Guidance
from libs.sampling.dense import sample_dense
from libs.sampling.plans import State, advance
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import SAMPLERS
from libs.sampling.stored import make_plan
from sde import VPLinear

BUDGETS = (0.3, 0.45, 0.6, 0.75, 0.9)


def evidence(calls=20, exits=7, rows=50, noise=0.3, seed=0) -> Evidence:
    """Losses that fall with depth and rise towards the data; uncertainties that know them up to `noise`."""
    rng = np.random.default_rng(seed)
    t = np.linspace(1, 0.05, calls)
    depth = np.linspace(1, 0, exits)
    size = np.exp(-4 * t)[:, None, None] * depth[:, None] ** 2 * rng.lognormal(0, 0.5, (calls, 1, rows))
    u = np.clip(size / size.max() * np.exp(noise * rng.standard_normal(size.shape)), 0, 1)
    cost = np.linspace(1 / exits, 1, exits)
    return Evidence(t, u, size, size.mean(2), np.ones(calls, bool), cost, np.append(np.full(exits - 1, 0.002), 0))


def test_files_of_other_calls_have_other_names():
    """Catches a calibration of even calls that takes the place of one on another grid, or a name of 300 letters."""
    config = digits_uvit_tiny.get_config("quick")
    names = set()
    for grid in ("", "power:2", "power:2.5", "1,0.8,0.6,0.3,0.001", "1,0.8,0.6,0.2,0.001"):
        config.sample.grid = grid
        names.add(calls_name(config))
    assert len(names) == 5 and "5-power-2" in names and max(map(len, names)) < 20


def test_guided_channels_count_as_they_are_guided():
    """Catches losses of all channels where the sampler guides three of four."""
    guidance, gap = Guidance(scale=1.5, channels=3), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    share = share_of_rows(guidance, 4)  # independent rows: their squares add up
    own, null = torch.zeros_like(gap), torch.zeros_like(gap)
    own[0], null[1] = gap[0], gap[1]
    moved = guidance.apply(own).square() + guidance.apply(null).square()
    torch.testing.assert_close((share * gap.square().mean((2, 3))).sum(0), moved.mean((0, 2, 3)))


# ---- the sampler's weights and the schedule ------------------------------------------------------------------------


def test_reach_is_what_eps_moves():
    """Catches weights of another row, or of x0 instead of eps."""
    plan = SAMPLERS["ddim"](VPLinear(), steps=6)
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    state = replace(State.start(x), row=torch.arange(6))
    moved = advance(plan, state, torch.ones_like(x)).x - advance(plan, state, torch.zeros_like(x)).x
    np.testing.assert_allclose(calibration.reach(plan), moved.abs().amax((1, 2, 3)))
    for name, builder in SAMPLERS.items():
        assert (calibration.reach(builder(VPLinear(), steps=7)) > 0).all(), name


def test_schedule_is_optimal():
    """Catches an allocation that is not the best one: all 4^4 are tried."""
    found = evidence(calls=4, exits=4)
    calls = np.arange(4)
    for budget in np.linspace(0.26, 1, 12):
        chosen, spent = calibration.schedule(found.static, found.cost, found.free, budget)
        loss = found.static[calls, chosen].sum()
        others = (np.array(k) for k in itertools.product(range(4), repeat=4))
        able = [found.static[calls, k].sum() for k in others if found.cost[k].mean() <= spent + 1e-9]
        assert loss == pytest.approx(min(able)), budget
        assert spent == pytest.approx(found.cost[chosen].mean())


def test_more_budget_only_adds_layers():
    """Catches budgets that are missed by more than a layer, and quality that is not monotone in them."""
    found, before, loss = evidence(), np.zeros(20), np.inf
    found.static[:, 3] *= 3  # an exit that is worse than the one before it
    for budget in np.linspace(0.15, 1, 40):
        chosen, spent = calibration.schedule(found.static, found.cost, found.free, budget)
        assert abs(spent - budget) <= 1 / 7 / 20 / 2 + 1e-9
        assert (chosen >= before).all()
        now = np.maximum.accumulate(found.static[:, ::-1], axis=1)[:, ::-1][np.arange(20), chosen].sum()
        assert now <= loss
        before, loss = chosen, now
    assert (chosen == 6).all()
    with pytest.raises(ValueError, match="--budget=0.1"):
        calibration.schedule(found.static, found.cost, found.free, 0.1)
    with pytest.raises(ValueError, match="--budget=1.5"):
        calibration.schedule(found.static, found.cost, found.free, 1.5)


def test_forced_calls_are_paid_and_not_chosen():
    """Catches a refresh that the budget forgets."""
    found = evidence()
    found = replace(found, free=np.arange(20) % 4 > 0)
    chosen, spent = calibration.schedule(found.static, found.cost, found.free, 0.5)
    assert (chosen[::4] == 6).all() and (chosen[1::4] < 6).any()
    assert spent == pytest.approx(0.5, abs=0.005)
    table, spent = calibration.thresholds(found, Bins.of(found.t, 20), 0.5)
    taken = calibration.exits_taken(found, Bins.of(found.t, 20), table)
    assert (taken[::4] == 6).all() and spent == pytest.approx(0.5, abs=0.005)


# ---- thresholds ----------------------------------------------------------------------------------------------------


def test_split():
    """Catches a threshold on the wrong side of a row, and one that lets rows leave at a loss."""
    u = np.array([0.4, 0.1, 0.3, 0.2])
    assert calibration.best_threshold(u, np.array([5.0, -3.0, 1.0, -1.0])) == pytest.approx(0.25)
    assert calibration.best_threshold(u, np.ones(4)) == 0.0
    assert calibration.best_threshold(u, -np.ones(4)) == ALWAYS
    assert (
        calibration.best_threshold(u, np.array([-9.0, 1.0, 1.0, 1.0])) == ALWAYS
    )  # a bad order can still pay as a whole


def test_bins_are_those_of_the_policy(tmp_path):
    """Catches bins that calibration and sampling number differently."""
    t = np.linspace(1, 0.03, 23)
    for most, n in ((5, 5), (50, 23), (1, 1)):
        bins = Bins.of(t, most)
        again = torch.bucketize(torch.from_numpy(t), torch.tensor(bins.edges).double(), right=True).numpy()
        np.testing.assert_array_equal(again, bins.of_call)
        assert len(set(again)) == n and again[0] == n - 1
        assert np.ptp(np.bincount(again)) <= 1


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_thresholds_spend_the_budget(noise):
    """Catches a search that stops beside the budget, also where uncertainties say little."""
    found = evidence(noise=noise)
    bins, loss = Bins.of(found.t, 20), np.inf
    for budget in BUDGETS:
        table, spent = calibration.thresholds(found, bins, budget)
        assert spent == pytest.approx(budget, rel=0.005) == calibration.spending(found, bins, table)
        taken = calibration.exits_taken(found, bins, table)
        now = np.take_along_axis(found.loss, taken[:, None], axis=1).mean()
        assert now < loss
        loss = now


def test_saturated_uncertainties_still_meet_the_budget():
    """Catches a search that needs rows to differ: with equal u, whole calls move at once."""
    found = evidence()
    found = replace(found, u=np.zeros_like(found.u))
    for budget in BUDGETS:
        assert calibration.thresholds(found, Bins.of(found.t, 20), budget)[1] == pytest.approx(budget, abs=0.02)


def test_images_that_differ_pay():
    """Catches thresholds that ignore what the uncertainty knows: per image must beat the best schedule here."""
    found = evidence(noise=0.0)
    found.loss[:, :-1, ::2] *= 30
    found.u[:, :-1, ::2] = np.clip(found.u[:, :-1, ::2] * 30, 0, 1)
    found = replace(found, static=found.loss.mean(2))
    chosen, _ = calibration.schedule(found.static, found.cost, found.free, 0.5)
    taken = calibration.exits_taken(found, bins := Bins.of(found.t, 20), calibration.thresholds(found, bins, 0.5)[0])
    static = found.static[np.arange(20), chosen].sum()
    assert np.take_along_axis(found.loss, taken[:, None], axis=1).mean(2).sum() < 0.9 * static


# ---- the closed loop -----------------------------------------------------------------------------------------------


def test_meet_corrects():
    """Catches a correction in the wrong direction, and one that returns its last try instead of its best."""
    for spends in (lambda x: 1.2 * x, lambda x: 0.8 * x, lambda x: x**2):
        assert spends(calibration.meet(0.5, 0.1, float, spends)) == pytest.approx(0.5, rel=0.005)
    assert calibration.meet(0.5, 0.1, float, lambda x: 0.45 if x < 0.6 else 0.6) < 0.6


def test_cheapest_within():
    """Catches a search that keeps what loses too much."""
    found = calibration.cheapest_within(0.05, 0.2, float, lambda x: 1 - x, rounds=12)
    assert found == pytest.approx(0.95, abs=0.001) and found >= 0.95
    assert calibration.cheapest_within(0.0, 0.2, float, lambda x: 1 - x) == 1.0


@pytest.fixture
def setup(run):
    """A quick model with 20 calls, whose heads and estimators differ, and its saved weights."""
    config = digits_uvit_tiny.get_config("quick")
    config.sample.sample_steps, config.sample.mini_batch_size = 40, 10
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in [*model.heads.parameters(), *model.uem.parameters()]:
        parameter.data += 0.2 * torch.randn_like(parameter)
    config.nnet_path = str(run.dir / "nnet.pth")
    weights.write_weights(model.state_dict(), config.nnet_path)
    return config, model.eval(), regimes.pixels(config), run


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_dense_sampling_follows_what_is_picked(setup, scale):
    """Catches dense runs on other trajectories than the executor's, and an oracle that is charged wrongly."""
    config, model, regime, run = setup
    if scale:
        config.nnet.num_classes, config.dataset.p_uncond = 11, 0.1
        torch.manual_seed(0)
        model, regime = build_model(config).eval(), regimes.pixels(config)
    plan = make_plan(regime.process, config.sample, 6)
    sampler, ids = Sampler(model, regime, run, pred=config.pred, guidance=Guidance(scale)), np.arange(5)
    options = dict(seed=3, plan=plan)
    calls = []
    dense = sample_dense(sampler, ids, calls.append, **options)
    full = sampler.batch(ids, policy=EXIT_POLICIES["full"](), **options)
    assert (dense.pixels == full.pixels).all() and (dense.trace.used == model.depth).all()
    assert [call.number for call in calls] == list(range(6)) and calls[0].eps.shape[:2] == (5, 5 * (1 + (scale > 0)))

    third = sample_dense(sampler, ids, lambda call: torch.full((call.u.shape[1],), 3), **options)
    fixed = sampler.batch(ids, policy=EXIT_POLICIES["fixed"](layer=3), **options)
    assert (third.pixels == fixed.pixels).all() and (third.trace.used == 3).all()
    perfect = sample_dense(sampler, ids, lambda call: oracle(call.eps, model.points, 0.0), **options)
    assert (perfect.pixels == full.pixels).all()


@pytest.mark.parametrize("budget", [BUDGETS[0], BUDGETS[-1]])
def test_budgets_are_met_in_the_closed_loop(setup, budget):
    """Catches budgets that hold on the dense trajectories only, on noise seeds that were not learned from."""
    config, model, regime, run = setup
    found = calibrate(config, regime, run, budget=budget, max_quality_loss=None, n_images=20, seed=7, n_bins=40)
    for part in ("schedule", "thresholds"):
        assert found[part]["closed_loop"] == pytest.approx(budget, rel=0.02), part
    stored = json.loads((run.dir / f"budget-{budget:g}-dpm_solver_pp_2m-40.json").read_text())
    assert stored["asked"] == {"budget": budget} and stored["schedule"]["layers"] == found["schedule"]["layers"]
    assert list(run.dir.glob("*.part")) == []
    for name in ("schedule", "calibrated"):
        policy = EXIT_POLICIES[name](path=found["path"])
        assert set(policy.asked(model.points)) <= set(model.points)


def test_calibration_knows_the_residual(setup):
    """Catches losses of uncorrected outputs, and budgets that forget the refresh or the heads that measure."""
    config, model, regime, run = setup
    config.sample.residual = True
    ask = dict(budget=0.6, max_quality_loss=None, n_images=10, seed=7, n_bins=40)
    with pytest.raises(ValueError, match="sample.refresh"):
        calibrate(config, regime, run, **ask)
    config.sample.refresh = 4
    found = calibrate(config, regime, run, **ask)
    assert found["path"].endswith("residual-4.json")
    assert set(found["schedule"]["layers"][::4]) == {model.depth}
    for part in ("schedule", "thresholds"):
        assert found[part]["closed_loop"] == pytest.approx(0.6, rel=0.02), part


def test_quality_is_kept(setup):
    """Catches a quality limit that is read as a budget."""
    config, _, regime, run = setup
    config.sample.update(sample_steps=6, n_samples=24)
    losses = [
        calibrate(config, regime, run, budget=None, max_quality_loss=most, n_images=20, seed=7, n_bins=10)["schedule"]
        for most in (0.0, 1e9)
    ]
    assert losses[0]["open_loop"] > losses[1]["open_loop"]
    assert losses[0]["quality_loss"] <= losses[1]["quality_loss"]
    for part, most in zip(losses, (0.0, 1e9), strict=True):
        assert part["met"] == (part["quality_loss"] <= most)


def test_quality_is_that_of_an_evaluation(setup, monkeypatch, capsys):
    """Catches a limit held on few images, whose distance is larger, and a missed one that nobody hears of."""
    config, model, regime, run = setup
    config.sample.update(sample_steps=4, n_samples=24)
    sizes = []

    def distance(images):
        sizes.append(sum(len(batch.ids) for batch in images))
        full = all((batch.trace.used == model.depth).all() for batch in images)
        return 1.0 if full else 1.05 if len(sizes) <= 8 else 2.0  # fine while searched, bad when reported

    monkeypatch.setattr("libs.analysis.calibrate.distance_of", lambda *_: distance)
    ask = dict(budget=None, max_quality_loss=0.1, n_images=4, seed=7, n_bins=4)
    found = calibrate(config, regime, run, **ask)
    assert set(sizes) == {24} and not found["schedule"]["met"]
    assert "schedule: it loses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_quality_loss": 0.1}, "not both"),
        ({"budget": None}, "not both"),
        ({"budget": None, "max_quality_loss": -0.1}, "--max_quality_loss=-0.1"),
        ({"n_images": 0}, "--images=0"),
        ({"n_bins": 0}, "--bins=0"),
        ({"seed": 1}, "--seed=1"),
        ({"budget": 0.01}, "--budget=0.01"),
    ],
)
def test_bad_requests(setup, change, message):
    """Each message names the flag and the value."""
    config, _, regime, run = setup
    with pytest.raises(ValueError, match=message):
        ask = dict(budget=0.5, max_quality_loss=None, n_images=4, seed=7, n_bins=40) | change
        calibrate(config, regime, run, **ask)
