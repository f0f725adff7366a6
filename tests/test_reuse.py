"""Methods that look back: residual correction, output reuse, deep-feature cache. Memory is per image and branch."""

import numpy as np
import pytest
import torch
from conftest import inputs, plan_file, tiny
from test_cost import count_macs
from wrong import SharedResidualCalls

from libs.exits import EXIT_POLICIES, Refresh, Residual, Trace, looking_back
from libs.exits.execute import run_outer
from libs.metrics.cost import macs_per_image
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.plans import sample
from libs.sampling.solvers import ddim, dpm_solver_pp_2m
from sde import VPLinear

PROCESS = VPLinear()
STEPS = 6


def policy(name="threshold", residual=False, refresh=0, **settings):
    settings = settings or ({"certainty": 0.56} if name == "threshold" else {})
    return looking_back(EXIT_POLICIES[name](**settings), residual=residual, refresh=refresh)


METHODS = {
    "residual": lambda: policy(residual=True),
    "residual, refresh": lambda: policy(residual=True, refresh=3),
    "refresh": lambda: policy(refresh=3),
    "residual schedule": lambda: policy("schedule", residual=True, refresh=2),
    "residual fixed": lambda: policy("fixed", residual=True, refresh=2, layer=2),
    "reuse": lambda: policy("reuse", every=2),
    "cache": lambda: policy("cache", every=3, layers=2),
    "first block": lambda: policy("first_block", threshold=0.4, per_image=True),
    "teacache": lambda: policy("teacache", threshold=0.4, per_image=True),
}


def denoiser(model, policy, n_calls=None, **options) -> Denoiser:
    return Denoiser(model, PROCESS, "v", policy, n_calls=n_calls, **options)


@torch.no_grad()
def samples(model, policy, x, plan=ddim(PROCESS, steps=STEPS), **options):  # noqa: B008
    """(samples, the denoiser that made them)."""
    made = denoiser(model, policy, plan.nfe, **options)
    return sample(plan, x, made), made


def check_batch_equals_singles(model, method, n=12):
    """A sampling of n images and n samplings of one image give the same images and the same layers used."""
    x = inputs(n)[0]
    together, made = samples(model, METHODS[method](), x)
    used = made.trace.used
    for i in range(n):
        alone, one = samples(model, METHODS[method](), x[i : i + 1])
        np.testing.assert_array_equal(used[:, :, i], one.trace.used[:, :, 0])
        assert (alone[0] - together[i]).abs().max() < 1e-4
    return used


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single_images(method):
    """Catches memory that is indexed by position among the survivors, shared between images, or scattered wrongly."""
    used = check_batch_equals_singles(tiny("time", "own"), method)
    if method == "residual":
        deep, early = (used[:, 0] == 7), (used[:, 0] < 7)
        assert deep.any(1).any() and (deep[:-1] & early[1:]).any(), "nothing was corrected, so nothing was shown"
        assert (deep.any(1) & early.any(1)).any(), "the images must go deep at different calls"


def test_memory_shared_between_images_is_caught(monkeypatch):
    """One residual for the whole batch instead of one per image."""
    monkeypatch.setattr(Residual, "kind", SharedResidualCalls)
    with pytest.raises(AssertionError):
        check_batch_equals_singles(tiny("time", "own"), "residual")


@pytest.mark.parametrize("name", ["fixed", "schedule", "threshold"])
def test_residual_of_a_network_that_stands_still(name):
    """At the same x and t, eps_k + (eps_K - eps_k) is full depth: catches a wrong sign, exit or row."""
    model = tiny("time", "own")
    x, t, time, _ = inputs(16)
    t[:], settings = 0.4, {"layer": 2} if name == "fixed" else {}
    made = Denoiser(model, PROCESS, "v", policy(name, residual=True, refresh=5, **settings))
    plain = Denoiser(model, PROCESS, "v", policy(name, refresh=5, **settings))
    full, _, _ = made(x, t), plain(x, t), made(x, t)
    early = made.trace.used[1, 0] < 7
    assert early.any() and (name == "threshold" or early.all())
    for _ in range(2):
        torch.testing.assert_close(made(x, t), full, rtol=0, atol=2e-6)
    assert (plain(x, t) - full).abs().max() > 0.01, "without the correction it must differ"


def test_residual_lives_in_eps_space():
    """Catches a residual of raw outputs, which for v prediction has another meaning at another time."""
    model = tiny("time", "own")
    x, t, time, _ = inputs(4)
    made = Denoiser(model, PROCESS, "v", policy("fixed", layer=2, residual=True, refresh=2))
    first, second = torch.full_like(t, 0.3), torch.full_like(t, 0.8)
    with torch.no_grad():
        made(x, first)
        eps = made(x, second)

        def at(k, t):
            exits = model(x, PROCESS.network_time(t).float(), None)
            return PROCESS.eps("v", exits.out[k - 1], x, t.float())

        wanted = at(2, second) + at(7, first) - at(2, first)
    torch.testing.assert_close(eps, wanted, rtol=1e-5, atol=1e-5)


def test_an_image_without_a_deep_call_is_not_corrected():
    """Catches zero-initialised or borrowed memory that counts as known."""
    model = tiny("time", "own")
    x, t, time, _ = inputs(32)
    t[:] = 0.5
    made, plain = denoiser(model, policy(residual=True, certainty=0.58)), denoiser(model, policy(certainty=0.58))
    made(x, t), plain(x, t)
    deep = torch.from_numpy(made.trace.used[0, 0] == 7)
    assert 0 < deep.sum() < 32
    corrected, early = made(x, t), plain(x, t)
    torch.testing.assert_close(corrected[~deep], early[~deep], rtol=0, atol=0)
    torch.testing.assert_close(made.calls[0].known, deep.numpy())


def test_refresh_keeps_the_plan_of_the_calls_between():
    """Catches full-depth calls that make the others forget which call of the plan they are, and its split."""
    planned = EXIT_POLICIES["planned"](path=plan_file())
    made = looking_back(planned, residual=True, refresh=2)
    assert [made.at_call(number) for number in range(3)] == [
        EXIT_POLICIES["full"](),
        planned.at_call(1),
        made.at_call(0),
    ]
    _, made = samples(tiny(), looking_back(planned, refresh=2), inputs(40)[0], plan=dpm_solver_pp_2m(PROCESS, steps=3))
    assert [set(row.tolist()) for row in made.trace.used[:, 0]] == [{7}, {4, 5}, {7}]


STATIC = ["residual schedule", "residual fixed", "reuse", "cache"]  # a branch alone leaves where a tied one does


@pytest.mark.parametrize(
    ("method", "pair"),
    [*((method, "free") for method in METHODS), *((method, pair) for method in STATIC for pair in ("tied", "cond"))],
)
def test_guidance_branches_have_their_own_memory(method, pair):
    """Catches a null branch that reads the conditional branch's memory: each must equal a sampling of its own."""
    model = tiny("time", "own", num_classes=4)
    x, t, _, cond = inputs(8, model=model)
    null = torch.full((8,), 3)
    both = denoiser(model, METHODS[method](), STEPS, cond=cond, null=null, guidance=Guidance(1.5, pair))
    alone = [denoiser(model, METHODS[method](), STEPS, cond=c) for c in (cond, null)]
    with torch.no_grad():
        for u in np.linspace(1, 0.1, STEPS):
            t[:] = u
            one, two = (branch(x, t) for branch in alone)
            wanted = one + 1.5 * (one - two)
            torch.testing.assert_close(both(x, t), wanted, rtol=1e-4, atol=1e-4)
            x = 0.8 * x + 0.1 * wanted
    for branch, single in enumerate(alone):
        np.testing.assert_array_equal(both.trace.used[:, branch], single.trace.used[:, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("uem", ["linear", "ahead"])
def test_cost_is_what_was_computed(method, uem):
    """Catches heads that measure residuals for free, refresh calls charged for questions, and reuse that is charged."""
    model = tiny(uem, "own", attention="math")
    x = inputs(1)[0]
    made = []
    counted = count_macs(lambda: made.append(samples(model, METHODS[method](), x)[1]))
    assert macs_per_image(made[0].trace, model.macs()) == pytest.approx([counted], abs=0.5)


def test_heads_run_only_where_their_residual_can_be_read():
    """Catches residuals of exits that the policy cannot take, after the last call, or right before a refresh."""
    model = tiny("time", "own")
    heads = []
    for k, head in model.heads.items():
        head.register_forward_hook(lambda module, args, out, k=k: heads.append(int(k)))
    x, t, _, _ = inputs(4)
    made = denoiser(model, policy("fixed", layer=3, residual=True, refresh=2), n_calls=5)
    for wanted in ([3], [3], [3], [3], []):  # measured, taken, measured, taken, nobody reads it
        heads.clear()
        made(x, t)
        assert heads == wanted
    heads.clear()
    made = denoiser(model, policy("fixed", layer=3, residual=True, refresh=1))
    made(x, t), made(x, t)
    assert heads == [] and (made.trace.costs[1] == model.macs().at(7)).all()
    t[:] = 0.2
    denoiser(model, policy("schedule", shares=(0.4, 0.7, 1.0), residual=True, refresh=2))(x, t)
    assert heads == [3, 5], "a schedule of 3, 5 and 7 layers needs two residuals"


@pytest.mark.parametrize("name", ["reuse", "cache"])
def test_every_call_computed_is_full_depth(name):
    """Catches an interval that is off by one."""
    model, x = tiny("time", "own"), inputs(4)[0]
    full, made = samples(model, policy("full"), x)
    assert made.trace.costs == {}
    torch.testing.assert_close(samples(model, policy(name, every=1), x)[0], full, rtol=0, atol=0)
    assert (samples(model, policy(name, every=2), x)[0] - full).abs().max() > 0.01


def test_reuse_repeats_the_last_output():
    """Catches reuse of anything but the last computed eps, and a trace that charges for it."""
    model = tiny("time", "own")
    made, full = denoiser(model, policy("reuse", every=3)), denoiser(model, policy("full"))
    for call in range(6):
        x, t, _, _ = inputs(4, seed=call)
        eps, new = made(x, t), full(x, t)
        if call % 3 == 0:
            last = new
        torch.testing.assert_close(eps, last, rtol=0, atol=0)
    np.testing.assert_array_equal(made.trace.used[:, 0, 0], [7, 0, 0, 7, 0, 0])
    np.testing.assert_allclose(macs_per_image(made.trace, model.macs()), 2 * model.macs().at(7))


@pytest.mark.parametrize("outer", [1, 2, 3])
def test_cached_call_by_hand(outer):
    """Catches wrong layers, skips of the old call instead of the new one, and a cache taken at the wrong depth."""
    model = tiny("time", "own", num_classes=4)
    net, half = model.backbone, 3
    x, t, time, cond = inputs(5, model=model)
    new, later = inputs(5, seed=9)[0], 0.5 * time
    with torch.no_grad():
        made = denoiser(model, policy("cache", every=2, layers=outer), cond=cond)
        made(x, t), made(new, t * 0.5)

        def run(x, time, deep=None):
            h, skips = net.embed(x, time, cond).h, []
            for block in net.in_blocks[: half if deep is None else outer]:
                h = block(h)
                skips.append(h)
            if deep is None:
                h = net.mid_block(h)
                for block in net.out_blocks[: half - outer]:
                    h = block(h, skips.pop())
                deep = h
            h = deep
            for block in net.out_blocks[half - outer :]:
                h = block(h, skips.pop())
            return model.head(7, net.embed(x, time, cond).__class__(h=h, time=time, rows=torch.arange(5))), deep

        full, deep = run(x, time)
        wanted, _ = run(new, later, deep)
        got = run_outer(model, outer, deep, new, later, cond)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        torch.testing.assert_close(made.calls[0].deep, deep, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_outer(model, outer, deep, x, time, cond), full, rtol=0, atol=0)
    np.testing.assert_array_equal(made.trace.used[:, 0, 0], [7, 2 * outer])


def test_refresh_calls_ask_nothing():
    """Catches estimators that still run, or a wait for the device, in calls whose depth is known."""
    model = tiny("time", "own")
    asked = []
    model.uem.register_forward_hook(lambda module, args, out: asked.append(args[0]))
    made = denoiser(model, policy(refresh=2, certainty=0.9))
    x, t, _, _ = inputs(4)
    counts = []
    for _ in range(4):
        asked.clear()
        made(x, t)
        counts.append(len(asked))
    assert counts[0] == counts[2] == 0 < min(counts[1], counts[3])
    assert (made.trace.used[::2] == 7).all()


def test_trace_keeps_special_costs(tmp_path):
    """Catches a saved or concatenated trace from which the cost can no longer be computed."""
    model, x = tiny("time", "own"), inputs(6)[0]
    halves = [samples(model, METHODS["residual, refresh"](), part)[1].trace for part in (x[:2], x[2:])]
    trace = Trace.concatenate(halves)
    trace.save(tmp_path / "trace.npz", np.arange(6))
    loaded = Trace.load(tmp_path / "trace.npz")
    macs = model.macs()
    wanted = np.concatenate([macs_per_image(half, macs) for half in halves])
    np.testing.assert_allclose(macs_per_image(loaded, macs), wanted)
    plain = Trace(trace.depth, trace.asked, trace.calls)
    assert (macs_per_image(plain, macs) != wanted).all(), "this sampling must have special costs"


def test_wrong_settings_are_refused():
    """Catches corrections that would silently do nothing."""
    model = tiny()
    with pytest.raises(ValueError, match="in this order"):
        Refresh(inner=Residual(inner=policy()), every=2)
    for name in ("full", "reuse", "cache"):
        with pytest.raises(ValueError, match="leaves early"):
            policy(name, residual=True)
    with pytest.raises(ValueError, match="sample.refresh is -1"):
        policy(refresh=-1)
    for name, never in (("fixed", {"layer": 2}), ("schedule", {"shares": (0.3,)})):
        with pytest.raises(ValueError, match="never runs full depth.*set sample.refresh"):
            denoiser(model, policy(name, **never, residual=True))
        with pytest.raises(ValueError, match="never runs full depth.*set sample.refresh"):  # inside tied pairs too
            policy(name, **never, residual=True).paired("tied").check(model)
    denoiser(model, policy("schedule", shares=(0.3,), residual=True, refresh=2))
    shallow = policy("planned", path=plan_file(layers=(2, 4, 4), max_u=(0.0, 0.5, 0.0)), residual=True)
    with pytest.raises(ValueError, match="never runs full depth.*set sample.refresh"):
        shallow.check(model)
    policy("planned", path=plan_file(layers=(2, 4, 6), max_u=(0.0, 0.0, 0.5)), residual=True).check(model)
    with pytest.raises(ValueError, match="exit.reuse.every is 0"):
        policy("reuse", every=0)
    with pytest.raises(ValueError, match="each half of this network has 3 layers"):
        policy("cache", layers=4).check(model)
    with pytest.raises(ValueError, match="exit.reuse.at"):
        policy("reuse", at=(2,))
    made = denoiser(model, policy("reuse"))
    made(*inputs(4)[:2])
    with pytest.raises(ValueError, match="started with 4 rows"):
        made(*inputs(3)[:2])
