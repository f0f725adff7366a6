"""In-flight batching: images that do not wait for their batch are the images of lockstep."""

import numpy as np
import pytest
import torch
from conftest import calibration_file, tiny, tiny_unet

from libs.codecs import Identity
from libs.exits import EXIT_POLICIES
from libs.metrics.cost import macs_per_image
from libs.models.gaussian import Gaussian
from libs.regimes import Labels, Regime
from libs.sampling.denoiser import PAIRS, Guidance
from libs.sampling.inflight import InFlight, suits
from libs.sampling.plans import forecasting
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import ddim, dpm_solver, dpm_solver_pp_2m, euler_maruyama_sde
from sde import VPLinear

PLANS = {
    "ddim": lambda: ddim(VPLinear(), steps=6),
    "multistep": lambda: dpm_solver_pp_2m(VPLinear(), steps=6),
    "singlestep": lambda: dpm_solver(VPLinear(), steps=6),  # its anchor is not its x, and it reads three outputs
    "stochastic": lambda: euler_maruyama_sde(VPLinear(), steps=6),
    "forecast": lambda: forecasting(PLANS["multistep"](), VPLinear(), COMPUTED, order=2),
    "stochastic forecast": lambda: forecasting(PLANS["stochastic"](), VPLinear(), COMPUTED),
}
COMPUTED = (True, True, False, True, False, False)
IDS = np.array([7, 3, 100, 0, 21, 22, 23, 50, 51, 52, 4, 5, 90, 91, 92, 93, 94, 95, 30, 31, 32, 33, 34])
BATCH = 3  # 23 images: the last batch is not full, and places are used again


class Raw(Identity):
    """Shows samples as they are, so that differences are not rounded away."""

    def decode(self, x):
        return x


def case(
    run, plan="ddim", uem="time", heads="shared", certainty=0.5, policy=None, scale=0.0, pair="free", gaussian=False,
    **options,
):  # fmt: skip
    classes = 4 if scale else 0
    model = tiny(uem, heads, num_classes=classes or -1, **options).requires_grad_(False)
    if gaussian:
        model.gaussian = Gaussian((1, 8, 8), classes or 1, 8, VPLinear(), "noise")
        model.gaussian.basis.normal_(std=0.1), model.gaussian.mean.normal_(), model.gaussian.variance.fill_(1.0)
        model.gaussian.basis_of.copy_(torch.arange(classes or 1))
        if "0" in model.heads:
            del model.heads["0"]
    labels = Labels(classes - (scale > 0), has_null=scale > 0)
    regime = Regime((1, 8, 8), (1, 8, 8), VPLinear(), Raw(), labels, dataset=None)
    settings = dict(
        plan=PLANS[plan](),
        policy=policy or EXIT_POLICIES["threshold"](certainty=certainty),
        seed=5,
        ids=IDS,
        batch_size=BATCH,
    )
    return Sampler(model, regime, run, pred="noise", guidance=Guidance(scale, pair)), settings


AT_0 = EXIT_POLICIES["threshold"](certainty=0.42, at=(0, 3))
CASES = {
    "ddim": dict(),
    "multistep": dict(plan="multistep"),
    "singlestep": dict(plan="singlestep"),
    "stochastic": dict(plan="stochastic"),
    "own heads": dict(heads="own"),
    "forecast": dict(plan="forecast"),
    "stochastic forecast": dict(plan="stochastic forecast", scale=1.5),
    "some exits": dict(points=(2, 4)),
    "exit before the first layer": dict(points=(0, 3), certainty=0.42),
    "exit 0 is a Gaussian": dict(points=(0, 3), policy=AT_0, gaussian=True),
    "exit 0 is a Gaussian per class": dict(points=(0, 3), policy=AT_0, gaussian=True, heads="own", scale=1.5),
    "guidance": dict(scale=1.5),
    "calibrated": dict(policy=EXIT_POLICIES["calibrated"](path=calibration_file())),
    "never": dict(certainty=1.0),
}


@pytest.mark.parametrize("inflight", [False, True])
@pytest.mark.parametrize("policy, scale", [("full", 0.0), ("threshold", 1.5), ("reuse", 0.0)])
def test_forecasts_cost_nothing(policy, scale, inflight, run):
    """Catches forecasts that are charged as calls, and costs of special calls that move to other steps."""
    sampler, settings = case(
        run, plan="forecast", policy=None if policy == "threshold" else EXIT_POLICIES[policy](), scale=scale
    )
    batch = next(sampler.images(inflight=inflight, **settings))
    used, computed = batch.trace.used, np.array(COMPUTED)
    assert used.shape[0] == len(COMPUTED) and (used[~computed] == 0).all()
    assert batch.trace.t.tolist() == settings["plan"].t.tolist()
    model, macs = sampler.model, sampler.model.macs()
    by_exit = np.array([macs.at(k, batch.trace.asked) for k in range(model.depth + 1)])
    calls = [by_exit[step] for step in used[computed]][:: 2 if policy == "reuse" else 1]  # it computes every second one
    np.testing.assert_array_equal(macs_per_image(batch.trace, macs), sum(call.sum(0) for call in calls))


@pytest.mark.parametrize("name", CASES)
def test_in_flight_equals_lockstep(name, run):
    """Catches rows that get another's skips, noise, history, label or place, and traces that follow the batch."""
    sampler, settings = case(run, **CASES[name])
    assert suits(sampler.model, settings["policy"], sampler.guidance)
    lockstep, free = (list(sampler.images(inflight=on, **settings)) for on in (False, True))
    assert [batch.ids.tolist() for batch in free] == [batch.ids.tolist() for batch in lockstep]
    for ours, wanted in zip(free, lockstep, strict=True):
        np.testing.assert_array_equal(ours.trace.t, wanted.trace.t)
        np.testing.assert_array_equal(ours.trace.used, wanted.trace.used)
        assert (ours.trace.asked, ours.trace.depth) == (wanted.trace.asked, wanted.trace.depth)
        assert set(ours.trace.costs) == set(wanted.trace.costs) == ({2, 4, 5} if "forecast" in name else set())
        assert (ours.pixels - wanted.pixels).abs().max() < 1e-4 * wanted.pixels.abs().max()
        assert (ours.labels is None) == (wanted.labels is None)
        if wanted.labels is not None:
            np.testing.assert_array_equal(ours.labels, wanted.labels)
    used = np.concatenate([batch.trace.used for batch in lockstep], axis=2)
    assert name == "never" or len(set(used.ravel().tolist())) >= 3, "the exits must be spread or the test shows nothing"


def test_layers_see_fuller_batches(run):
    """Catches an engine that runs rows as they come: then it is lockstep with more copies."""
    sizes = {}
    for inflight in (False, True):
        sampler, settings = case(run)
        sizes[inflight] = seen = []
        for block in sampler.model.backbone.blocks:
            block.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(out)))
        list(sampler.images(inflight=inflight, **settings))
    assert sum(sizes[True]) == sum(sizes[False]), "the work is the same"
    assert len(sizes[True]) < len(sizes[False]), "in fewer, fuller calls"
    assert max(sizes[True]) <= BATCH


def test_what_runs_in_lockstep(run):
    """Catches rows of a batch policy, of a tied pair or with a memory that are torn apart."""
    model = case(run)[0].model
    threshold = EXIT_POLICIES["threshold"]()
    assert [suits(model, threshold, Guidance(1.0, pair)) for pair in PAIRS] == [True, False, False]
    assert not suits(tiny_unet(), threshold, Guidance())
    for name in ("full", "fixed", "schedule", "patience", "similarity", "released_batch_mean", "reuse", "cache"):
        assert not suits(model, EXIT_POLICIES[name](), Guidance())
    sampler, settings = case(run, policy=EXIT_POLICIES["patience"](certainty=0.5))
    lockstep, same = (list(sampler.images(inflight=on, **settings)) for on in (False, True))
    for ours, wanted in zip(same, lockstep, strict=True):
        assert torch.equal(ours.pixels, wanted.pixels)


def test_another_rows_skips_are_caught(monkeypatch, run):
    """Without slots of their own, rows that join would read one another's long skips."""
    from libs.sampling.inflight import Pooled

    pop = Pooled.pop
    monkeypatch.setattr(Pooled, "pop", lambda self: (pop(self)[0].roll(1, 0), pop(self)[1]))
    with pytest.raises(AssertionError):
        test_in_flight_equals_lockstep("ddim", run)


def test_few_images(run):
    """Catches an engine that waits for more images than there are."""
    sampler, settings = case(run)
    settings |= dict(ids=IDS[:2], batch_size=64)
    (batch,) = sampler.images(inflight=True, **settings)
    assert batch.ids.tolist() == IDS[:2].tolist() and batch.trace.used.shape == (6, 1, 2)
    assert InFlight(sampler, **settings).places == 2
