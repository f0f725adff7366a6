"""One budget over calls, times and depths: the costs, the search, the file, and what samples from it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import plan_file, tiny

from configs import digits_uvit_tiny
from libs import checkpoints, regimes
from libs.analysis import budget as budgets
from libs.analysis import joint
from libs.analysis.budget import spend
from libs.analysis.joint import WITHIN, Choice, Search
from libs.analysis.trajectory import Trajectory, best_path, learn_trajectory, step_errors
from libs.exits import EXIT_POLICIES
from libs.metrics.cost import macs_per_image
from libs.models import build_model
from libs.sampling.plans import State, advance
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import dpm_solver_pp_2m
from libs.sampling.stored import plan_of
from sde import VPLinear


@pytest.fixture
def setup(run, monkeypatch):
    """A quick model whose heads and estimators differ, its weights in the run's directory, and a reference of 20."""
    monkeypatch.setattr(joint, "WORK", 1.0)  # a few changes are as good as many here
    config = digits_uvit_tiny.get_config("quick")
    config.sample.update(sample_steps=20, n_samples=16, mini_batch_size=8)
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in [*model.heads.parameters(), *model.uem.parameters()]:
        parameter.data += 0.2 * torch.randn_like(parameter)
    config.nnet_path = str(run.dir / "nnet_ema.pth")
    checkpoints.write_weights(model.state_dict(), config.nnet_path)
    return config, regimes.pixels(config), run


def trajectory(n=6, exits=3, seed=0) -> Trajectory:
    rng = np.random.default_rng(seed)
    p, i, j = np.ogrid[:n, :n, : n + 1]
    error = rng.random((n, n, n + 1, exits)) * ((j - i) ** 2)[..., None] * np.linspace(2, 1, exits)
    error[~np.broadcast_to((p <= i) & (i < j), error.shape[:3])] = np.inf
    for first in range(1, n):
        error[first, first] = np.inf  # only the first step has no call before it
    gain, depth = rng.random(n + 1) + 0.5, np.linspace(1, 0, exits) * rng.random((n, 1))
    return Trajectory(np.append(np.linspace(1, 0.1, n), 1e-3), error, depth, gain)


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_step_errors_are_those_of_the_solver():
    """Catches a wrong sign or index in the Gram matrix: the solver's own rows are run from the teacher's states."""
    process, generator = VPLinear(), torch.Generator().manual_seed(0)
    plan = dpm_solver_pp_2m(process, steps=4, lower_order_final=False)
    nodes = torch.cat([plan.t, torch.tensor([1e-3], dtype=torch.float64)])
    x, m = (torch.randn(*shape, 5, generator=generator).double() for shape in ((5,), (4, 2)))
    found = step_errors(process, nodes, x, m)
    for p, i, j in itertools.combinations(range(5), 3):
        grid = ",".join(map(repr, nodes[[p, i, j]].tolist()))
        grid = grid if p == 0 else f"1.0,{grid}"
        row = 1 if p == 0 else 2
        steps = dpm_solver_pp_2m(process, steps=row + 1, grid=grid, lower_order_final=False)
        for k in range(2):
            history = (0 * x[:1], m[p, -1:], m[p, -1:])
            state = State(x[i : i + 1], x[i : i + 1], history, torch.tensor([row]))
            eps = (x[i] - process.alpha(nodes[i]) * m[i, k]) / process.sigma(nodes[i])
            got = advance(steps, state, eps[None]).x
            assert found[p, i, j, k] == pytest.approx(float((got - x[j]).square().sum()), rel=1e-6)
    assert np.isinf(found[2, 1]).all() and np.isinf(found[0, 2, :3]).all()


def test_best_path_is_the_best():
    """Catches a search that forgets the call before: every path and every depth of six nodes is tried."""
    seen, cost = trajectory(), np.array([0.3, 0.6, 1.0])

    def total(nodes, exits, price):
        steps = zip([0, *nodes], nodes, nodes[1:], exits, strict=False)
        return sum(seen.error[p, i, j, k] * seen.gain[j] ** 2 + price * cost[k] for p, i, j, k in steps)

    for price in (0.01, 0.3, 3.0):
        paths = [(0, *inner, 6) for n in range(6) for inner in itertools.combinations(range(1, 6), n)]
        depths = [(path, exits) for path in paths for exits in itertools.product(range(3), repeat=len(path) - 1)]
        least = min(total(path, exits, price) for path, exits in depths)
        assert total(*best_path(seen, cost, price), price) == pytest.approx(least)


def test_the_teacher_is_full_depth(setup):
    """Catches a trajectory of another sampler, and gains that do not end at 1."""
    config, regime, run = setup
    sampler = Sampler.open(config, regime, run)
    plan = dpm_solver_pp_2m(regime.process, steps=9, grid="power:2", lower_order_final=False)
    seen = learn_trajectory(sampler, plan, 1e-3, np.arange(4), seed=7)
    own = [seen.error[max(i - 1, 0), i, i + 1, -1] for i in range(9)]
    assert max(own) < 1e-5 < seen.error[0, 3, 9].min()  # its own steps lead to its own states
    assert (seen.depth[:, -1] == 0).all() and (seen.depth[:, 0] > 0).all() and seen.gain[-1] == 1


# ---- search --------------------------------------------------------------------------------------------------------


def test_search_spends_the_budget_and_improves():
    """Catches proposals over the budget, changes that are kept although they are worse, and times that cross."""
    search = Search(VPLinear(), trajectory(), np.array([0.3, 0.6, 1.0]), 10.0, np.random.default_rng(0))
    tried = []

    def quality(choice: Choice, everything: bool) -> float:
        tried.append(choice)
        return float(np.square(np.diff(np.log(choice.nodes))).sum() - 0.1 * np.sum(choice.exits))

    for budget in (0.1, 0.2, 0.35, 0.5):
        best, value = search.select(budget, quality)
        assert value == quality(best, True) == min(quality(c, True) for c in [*tried[-9:], best])
        assert all(search.spends(c) <= budget * (1 + WITHIN) for c in [best, *tried])
    assert all(c.nodes[0] == 1 and (np.diff(c.nodes) < 0).all() for c in tried)
    cheap = replace(best, exits=(0,) * len(best.exits), origin="plan-budget-0.2", max_u=(0.1,) * len(best.exits))
    for at in (-99.0, 99.0):  # more is not spent where it makes it worse
        found = search.select(0.5, quality, (cheap, at))
        assert (found == (cheap, at)) is (at < 0) and (found[0].max_u is None) is (at > 0)
    full = replace(search, cost=search.cost[-1:], trajectory=trajectory(exits=1))
    assert len(full.select(0.5, quality)[0].exits) == 5
    with pytest.raises(ValueError, match="whole calls"):
        full.select(0.27, quality)
    assert full.select(0.27, quality, (cheap, 1.0)) == (cheap, 1.0)


def test_two_exits_pay_for_more_calls_than_whole_ones():
    """Catches grids of two calls for a budget of two whole ones where the first exit costs next to nothing."""
    search = Search(VPLinear(), trajectory(exits=2), np.array([1e-3, 1.0]), 20.0, np.random.default_rng(0))
    mixed = [choice for choice in search.family(0.1) if set(choice.exits) == {0, 1}]
    assert {len(choice.exits) for choice in mixed} >= {6, 16}
    assert all(search.affords(choice, 0.1) for choice in mixed)


def test_a_larger_budgets_plan_is_where_a_smaller_one_begins():
    """Catches times that a larger budget found good, and that a smaller one never tries."""
    search = Search(VPLinear(), trajectory(), np.array([0.3, 0.6, 1.0]), 10.0, np.random.default_rng(0))
    dearer = Choice((1.0, 0.83, 0.47, 0.11, 0.001), (0, 0, 2, 2), False, "plan-budget-0.3", (0.0, 0.1, 0.0, 0.0))

    def quality(choice: Choice, everything: bool) -> float:
        return float(choice.nodes != dearer.nodes)

    best, value = search.select(0.2, quality, dearer=dearer)
    assert value == 0 and best.nodes == dearer.nodes and best.max_u is None
    assert search.spends(best) <= 0.2 * (1 + WITHIN)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_plan_is_sampled_as_it_says(run):
    """Catches layers of other calls, a split that is not charged, or twice, and forecasts that are counted as calls."""
    for max_u in ((0.0, 0.0, 0.0), (0.0, 0.52, 0.0)):
        policy, model = EXIT_POLICIES["planned"](path=plan_file(max_u=max_u)), tiny()
        regime = regimes.Regime(
            (1, 8, 8), (1, 8, 8), VPLinear(), regimes.Identity(), regimes.Labels(0, has_null=False), dataset=None
        )
        plan = plan_of(regime.process, policy.stored)
        batch = Sampler(model, regime, run, pred="v").batch(np.arange(40), seed=3, plan=plan, policy=policy)
        used, macs = batch.trace.used[:, 0], model.macs()
        assert (used[0] == 2).all() and (used[2] == 0).all() and (used[3] == 7).all()
        assert set(used[1].tolist()) == ({4, 5} if any(max_u) else {4})
        asked = (4,) if any(max_u) else ()
        want = macs.at(2) + macs.at(7) + np.array([macs.at(k, asked) for k in used[1]])
        np.testing.assert_array_equal(macs_per_image(batch.trace, macs), want)
    with pytest.raises(ValueError, match="is for exits"):
        policy.check(tiny(points=(3, 5)))


@pytest.mark.parametrize(("depth", "objective"), [("search", "frechet"), ("full", "teacher")])
def test_budgets_are_met(setup, depth, objective, monkeypatch):
    """Catches budgets that hold on paper only, files that nobody can sample from, and drafts that stay."""
    config, regime, run = setup
    monkeypatch.setattr(budgets, "FINE", 8)
    found, larger = spend(config, regime, run, {"budget": [0.4, 0.2]}, n_images=8, depth=depth, objective=objective)
    assert found["report"]["met"] and found["report"]["spends"] == pytest.approx(0.2, rel=WITHIN)
    suffix = "-full" if depth == "full" else ""
    stored = json.loads((run.dir / f"plan-budget-0.2{suffix}.json").read_text())
    assert stored["plan"] == found["plan"] and stored["reference"]["steps"] == 20
    assert [p.name for p in run.dir.glob(".*draft*")] == []
    assert EXIT_POLICIES["schedule"](path=found["path"]).stored["layers"] == found["plan"]["layers"]
    if depth == "full":
        assert found["plan"]["layers"] == [5] * 4
        return
    sampler = Sampler.open(config, regime, run)
    images = sampler(3, seed=1, budget=0.2)
    assert images.trace.used.shape[0] == len(found["plan"]["layers"])
    with pytest.raises(ValueError, match="budget is 0.3; .* plans for: 0.2"):
        sampler(3, budget=0.3)
    with pytest.raises(ValueError, match="leave exit_threshold, steps"):
        sampler(3, budget=0.2, steps=4)


def test_seconds_and_quality(setup, monkeypatch):
    """Catches a limit of the quality that is read as a budget, and seconds that are read as MACs."""
    config, regime, run = setup
    monkeypatch.setattr(budgets, "FINE", 8)
    monkeypatch.setattr(budgets, "LADDER", (0.2, 0.05))
    with monkeypatch.context() as patch:
        patch.setattr(budgets, "seconds_of", lambda *_: np.array([0.5, 0.6, 0.7, 0.8, 1.0]))
        (found,) = spend(config, regime, run, {"seconds": [0.2]}, n_images=8)
    assert found["report"]["spends"] == pytest.approx(0.2, rel=WITHIN)
    (found,) = spend(config, regime, run, {"max_quality_loss": [1e9]}, n_images=8)
    assert found["report"]["budget"] == 0.05 and found["asked"] == {"max_quality_loss": 1e9}


def test_a_quality_is_found_between_whole_calls(setup, monkeypatch):
    """Catches a search that ends in an error at 1.4 calls of full depth, although the one before it was good enough."""
    config, regime, run = setup
    monkeypatch.setattr(budgets, "FINE", 8)
    monkeypatch.setattr(budgets, "LADDER", (0.1, 0.07, 0.05))
    ask = {"max_quality_loss": [1e9]}
    (found,) = spend(config, regime, run, ask, n_images=8, depth="full", objective="teacher")
    assert found["report"]["budget"] == 0.05 and len(found["plan"]["layers"]) == 1


def test_plans_of_other_noise_are_not_compared(setup, monkeypatch):
    """Catches a plan selected on one noise seed that wins over plans of another, whose distances differ."""
    config, regime, run = setup
    monkeypatch.setattr(budgets, "FINE", 8)
    (small,) = spend(config, regime, run, {"budget": [0.1]}, n_images=8)
    stored = json.loads((run.dir / "plan-budget-0.1.json").read_text())
    stored["report"]["selected_at"] = 0.0  # better than anything
    (run.dir / "plan-budget-0.1.json").write_text(json.dumps(stored))
    (same,) = spend(config, regime, run, {"budget": [0.2]}, n_images=8)
    (other,) = spend(config, regime, run, {"budget": [0.2]}, n_images=8, seed=7101)
    assert same["plan"] == small["plan"] | {"origin": "plan-budget-0.1"}
    assert other["plan"]["nodes"] != small["plan"]["nodes"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({}, "one of --budget"),
        ({"budget": [0.2], "seconds": [0.2]}, "one of --budget"),
        ({"budget": [0.2, 1.5]}, "--budget=1.5"),
        ({"seconds": [0.0]}, "--seconds=0"),
        ({"max_quality_loss": [-0.1]}, "--max_quality_loss=-0.1"),
        ({"budget": [0.2], "n_images": 0}, "--images=0"),
        ({"budget": [0.2], "seed": 1}, "--seed=1"),
        ({"budget": [0.001]}, "budget is 0.001"),
        ({"budget": [0.2], "exit.name": "planned"}, "exit.name=planned is set"),
        ({"budget": [0.2], "sample.forecast.every": 2}, "sample.forecast is set"),
    ],
)
def test_bad_requests(setup, ask, message, monkeypatch):
    """Each message names the flag and the value."""
    monkeypatch.setattr(budgets, "FINE", 3)
    config, regime, run = setup
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name: ask.pop(name) for name in list(ask) if "." in name})
    with pytest.raises(ValueError, match=message):
        options = {name: ask.pop(name) for name in ("n_images", "seed") if name in ask}
        spend(config, regime, run, ask, **options)
