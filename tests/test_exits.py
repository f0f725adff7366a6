"""Per-image exits: a batch of B equals B batches of one, and the work done is the sum of the layers used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import calibration_file, inputs, plan_file, tiny, trace_file
from wrong import BatchMeanExit, FirstRowTime, RememberingPatience, UngatheredSkips

from libs.exits import EXIT_POLICIES, GuidancePairs, Look, Trace, oracle, run_with_exits
from libs.models.backbone import Carry
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.solvers import ddim
from sde import PROCESSES, VPLinear

# Settings at which the tiny model's exits differ between images; a policy that is not here is tested with its defaults.
SETTINGS = {
    "full": {},
    "fixed": {"layer": 3},
    "threshold": {"certainty": 0.5},
    "patience": {"certainty": 0.5, "times": 2, "consecutive": True},
    "schedule": {},
    "power": {"exponent": 2.0},
    "levels": {"c": 1.0},
    "planned": {"path": plan_file()},
    "calibrated": {"path": calibration_file()},
    "similarity": {"cosine": 0.852},
    "matched_random": {"path": trace_file()},
    "matched_static": {"path": trace_file()},
    "released_batch_mean": {"certainty": 0.5},
    "reuse": {"every": 2},
    "cache": {"every": 2, "layers": 2},
    "first_block": {},
    "teacache": {},
    "duo": {},
    "learned_cache": {},
    "lazy_gate": {},
}
# Alone, a call of theirs runs full depth: tested in test_reuse.py and test_rivals.py.
LOOK_BACK = ("reuse", "cache", "first_block", "teacache", "duo", "learned_cache", "lazy_gate")
PER_IMAGE = [name for name, policy in EXIT_POLICIES.items() if policy.per_image or name in LOOK_BACK]
MARGIN = 1e-5  # a mean uncertainty this close to the threshold may fall on either side of it by rounding
TOLERANCE = 2e-6  # of predictions of order one, fp32


def made(name: str):
    """The policy `name` as it decides in the second call of a sampling."""
    return EXIT_POLICIES[name](**SETTINGS.get(name, {})).at_call(1)


def check_batch_equals_singles(model, policy, n=64, tolerance=TOLERANCE):
    """A batch of n and n batches of one give the same exits (outside MARGIN) and predictions (within `tolerance`)."""
    x, t, time, cond = inputs(n, model=model)
    out, used = run_with_exits(model, policy.bind(0, range(n)), x, t, time, cond)
    exits = model(x, time, cond)
    rows = [slice(i, i + 1) for i in range(n)]
    singles = [run_with_exits(model, policy.bind(0, [r.start]), x[r], t[r], time[r], cond) for r in rows]
    close = np.zeros(n, bool)
    if "u" in policy.reads:
        bound = policy.bind(0, range(n))
        sign = torch.ones(len(exits.u), *[1] * (exits.u.dim() - 1))
        sign[1::2] = -1  # in turn: for rules that compare two exits
        for shift in (sign.abs(), -sign.abs(), sign, -sign):
            moved = replace(exits, u=exits.u + MARGIN * shift)
            close |= dense_decisions(model, bound, moved, t) != dense_decisions(model, bound, exits, t)
        assert close.mean() < 0.05, "the test's threshold lies in the middle of the estimates"
    np.testing.assert_array_equal(used[~close], np.array([int(single[1][0]) for single in singles])[~close])
    wanted = torch.cat([single[0] for single in singles])
    assert (out - wanted)[~close].abs().max() < tolerance * wanted.abs().max()
    return used


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", PER_IMAGE)
def test_batch_equals_single_images(name, heads):
    """Catches decisions that depend on batch mates, rows returned in the wrong order, wrong heads, wrong skips."""
    model = tiny("time", heads)
    used = check_batch_equals_singles(model, made(name))
    if name in SETTINGS and name not in ("full", "fixed", "planned", *LOOK_BACK):
        assert len(set(used)) >= 3, "the exits must be spread or the test shows nothing"


def test_a_batch_mean_exit_is_caught():
    """The released code's rule, taken for a per-image one."""
    with pytest.raises(AssertionError):
        check_batch_equals_singles(tiny("time"), BatchMeanExit(certainty=0.5))


def test_a_probe_chosen_by_the_first_row_is_caught(monkeypatch):
    """A public attempt picked one timestep's probe for the whole batch."""
    model = tiny("time")
    monkeypatch.setattr(model.uem, "__class__", FirstRowTime)
    with pytest.raises(AssertionError):
        check_batch_equals_singles(model, EXIT_POLICIES["threshold"](certainty=0.5))


def test_skips_that_are_not_gathered_are_caught(monkeypatch):
    """Without the gather, survivors read the skips of rows that left."""
    monkeypatch.setattr(Carry, "pop", UngatheredSkips.pop)
    with pytest.raises(AssertionError):
        check_batch_equals_singles(tiny("time"), EXIT_POLICIES["threshold"](certainty=0.5))


def check_no_memory(policy):
    """The same call twice gives the same exits."""
    model, policy = tiny(), policy.bind(0, range(64))
    x, t, time, cond = inputs()
    first = run_with_exits(model, policy, x, t, time, cond)[1]
    np.testing.assert_array_equal(run_with_exits(model, policy, x, t, time, cond)[1], first)


@pytest.mark.parametrize("name", EXIT_POLICIES)
def test_no_state_between_calls(name):
    """Catches counters that live on the policy or the model."""
    check_no_memory(made(name))


def test_state_between_calls_is_caught():
    """The released forward pass keeps such a list."""
    with pytest.raises(AssertionError):
        check_no_memory(RememberingPatience(certainty=0.5, times=2))


@pytest.mark.parametrize("name", EXIT_POLICIES)
def test_row_order_does_not_matter(name):
    """Catches outputs that are returned in the order in which rows left."""
    model, policy = tiny("time"), made(name)
    x, t, time, _ = inputs()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    out, used = run_with_exits(model, policy.bind(0, range(64)), x, t, time, None)
    policy = policy.bind(0, order.tolist())
    shuffled, used_shuffled = run_with_exits(model, policy, x[order], t[order], time[order], None)
    np.testing.assert_array_equal(used_shuffled, used[order.numpy()])
    assert (shuffled - out[order]).abs().max() < TOLERANCE * out.abs().max()


def dense_decisions(model, policy, exits, t):
    """The layers (B,) that `policy` would use, decided on a dense call without removing any row.

    It sees the uncertainties of the dense call, not tokens, so it serves policies that read "u" or nothing.
    """
    n = exits.out.shape[1]
    used = np.full(n, model.depth)
    decide = policy.start(n, model.depth, t)
    for k in policy.asked(model.points):
        alive = np.flatnonzero(used == model.depth)
        if not len(alive):
            break
        rows = torch.from_numpy(alive)
        u = exits.mean_u[exits.points.index(k)].cpu()
        stop = decide(Look(k=k, rows=rows, u=u[rows] if "u" in policy.reads else None))
        used[alive[np.asarray(stop) & np.ones(len(alive), bool)]] = k
    return used


@pytest.mark.parametrize("name", [name for name in EXIT_POLICIES if "patches" not in EXIT_POLICIES[name].reads])
def test_decisions_equal_the_dense_reference(name):
    """Catches an executor that decides on other uncertainties than a dense call shows (wrong rows, wrong exit)."""
    model, policy = tiny("time"), made(name).bind(0, range(64))
    x, t, time, _ = inputs()
    out, used = run_with_exits(model, policy, x, t, time, None)
    exits = model(x, time, None)
    np.testing.assert_array_equal(dense_decisions(model, policy, exits, t), used)
    wanted = torch.stack([exits.out[exits.points.index(k), i] for i, k in enumerate(used)])
    assert (out - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("name", EXIT_POLICIES)
def test_work_is_the_sum_of_layers_used(name):
    """Catches exits that are only simulated: rows entering layers, heads and estimators are counted as they run."""
    model, policy = tiny(), made(name).bind(0, range(64))
    layers, heads, asked = [], [], []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, args, out: layers.append(len(out)))
    model.backbone.norm.register_forward_hook(lambda module, args, out: heads.append(len(out)))
    model.uem.register_forward_hook(lambda module, args, out: asked.append(len(out)))
    x, t, time, _ = inputs()
    _, used = run_with_exits(model, policy, x, t, time, None)
    assert sum(layers) == used.sum()
    assert sum(heads) == len(x), "one head per image"
    assert sum(asked) == sum(int((used >= k).sum()) for k in policy.questions(model.points))


def test_asking_at_some_exits_only():
    """Catches a policy that is asked, or that leaves, where it did not want to be asked."""
    model = tiny()
    x, t, time, _ = inputs()
    _, used = run_with_exits(model, EXIT_POLICIES["threshold"](certainty=0.5, at=(2, 5)), x, t, time, None)
    assert set(used) <= {2, 5, 7} and len(set(used)) > 1
    with pytest.raises(ValueError, match="exit.at asks at"):
        EXIT_POLICIES["threshold"](at=(9,)).check(model)
    with pytest.raises(ValueError, match="exit.fixed.layer is 9"):
        EXIT_POLICIES["fixed"](layer=9).check(model)
    for name in ("full", "fixed", "planned"):
        with pytest.raises(ValueError, match=f"exit.{name}.at is .2,.; this method asks at no exit"):
            EXIT_POLICIES[name](at=(2,))


@pytest.mark.parametrize("points", [(2, 4), (0, 3)])
def test_a_subset_of_exit_points(points):
    """Catches estimators or heads that are indexed by position instead of by layer; 0 skips all layers of a call."""
    model = tiny("time", "own", points=points)
    assert model.points == (*points, 7)
    used = check_batch_equals_singles(model, EXIT_POLICIES["threshold"](certainty=0.42))
    assert set(used) <= {*points, 7} and points[0] in used


@pytest.mark.parametrize("pair", ["free", "tied", "cond"])
@pytest.mark.parametrize("name", ["threshold", "patience", "fixed", "schedule"])
def test_guidance_pairs(pair, name):
    """Catches mixed guidance halves, pairs that separate, and a null row that has a say where the cond row decides."""
    model = tiny("time", num_classes=4)
    policy = made(name)
    x, t, time, cond = inputs(32, model=model)
    t[:], null, scale, process = 0.5, torch.full((32,), 3), 1.5, VPLinear()
    denoiser = Denoiser(model, process, "noise", policy, cond=cond, null=null, guidance=Guidance(scale, pair))
    eps = denoiser(x, t)
    used = denoiser.trace.used[0]  # (branches, n)
    time = process.network_time(t).float()
    dense = [model(x, time, c).out for c in (cond, null)]
    picked = [torch.stack([out[k - 1, i] for i, k in enumerate(row)]) for out, row in zip(dense, used, strict=True)]
    wanted = picked[0] + scale * (picked[0] - picked[1])
    assert (eps - wanted).abs().max() < 1e-5 * wanted.abs().max()
    if pair != "free":
        np.testing.assert_array_equal(used[0], used[1])
        alone = [run_with_exits(model, policy, x, t, time, c)[1] for c in (cond, null)]
        if pair == "cond":
            np.testing.assert_array_equal(used[0], alone[0])
        elif name == "threshold":  # a threshold pair cannot leave before its later row would
            assert (used[0] >= np.maximum(*alone)).all()
    elif name == "threshold":
        assert (used[0] != used[1]).any()


def test_a_batch_mean_has_no_pairs():
    """Catches sample.pair that does nothing where the rows of a branch decide together."""
    model = tiny(num_classes=4)
    cond, guidance = inputs(4, model=model)[3], Guidance(1.0, "tied")
    policy = EXIT_POLICIES["released_batch_mean"]()
    with pytest.raises(ValueError, match="sample.pair is 'tied'; exit.released_batch_mean"):
        Denoiser(model, VPLinear(), "noise", policy, cond=cond, null=cond, guidance=guidance)
    policy = replace(policy, per_image=True)
    Denoiser(model, VPLinear(), "noise", policy, cond=cond, null=cond, guidance=guidance)


def test_guidance_needs_a_null_condition():
    """Catches guidance that silently runs unguided."""
    model = tiny(num_classes=4)
    with pytest.raises(ValueError, match="null condition"):
        Denoiser(model, VPLinear(), "noise", EXIT_POLICIES["full"](), cond=torch.zeros(2), guidance=Guidance(1.0))
    with pytest.raises(ValueError, match="sample.scale"):
        Guidance(float("nan"))
    with pytest.raises(ValueError, match="sample.pair"):
        Guidance(1.0, "loose")


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan"), float("inf"), "0.9"])
@pytest.mark.parametrize("name", ["threshold", "patience", "released_batch_mean"])
def test_certainty_range(name, value):
    """Catches thresholds that would silently never or always exit."""
    with pytest.raises(ValueError, match="exit_threshold"):
        EXIT_POLICIES[name](certainty=value)


def test_certainty_one_never_exits():
    """The public flag's meaning: 1.0 = full depth, whatever the estimate."""
    model = tiny()
    for linear in model.uem.maps.values():
        linear.bias.data -= 1e4  # u = 0 exactly
    x, t, time, _ = inputs()
    assert (run_with_exits(model, EXIT_POLICIES["threshold"](certainty=1.0), x, t, time, None)[1] == 7).all()


def test_patience_counts():
    """Catches a patience that needs one hit too few or many, or that does not reset when it should."""
    u = {1: 0.1, 2: 0.9, 3: 0.1, 4: 0.1, 5: 0.1}

    def leaves(**settings):
        decide = EXIT_POLICIES["patience"](certainty=0.5, **settings).start(1, 7, torch.zeros(1))
        rows = torch.zeros(1, dtype=torch.long)
        return next(k for k in u if decide(Look(k=k, rows=rows, u=torch.tensor([u[k]])))[0])

    assert leaves(times=1) == 1
    assert leaves(times=2) == 3
    assert leaves(times=2, consecutive=True) == 4
    assert leaves(times=3, consecutive=True) == 5


def test_released_batch_rule():
    """The released models leave the first half at the second crossing only, the second half at the first."""

    def leaves(us, **settings):
        decide = EXIT_POLICIES["released_batch_mean"](certainty=0.9, **settings).start(2, 7, torch.zeros(2))
        rows = torch.arange(2)
        return next(
            k for k, u in enumerate(us, 1) if decide(Look(k=k, rows=rows, u=torch.tensor([u - 0.02, u + 0.02])))
        )

    assert leaves([0.05, 0.5, 0.05]) == 3
    assert leaves([0.5, 0.5, 0.5, 0.05]) == 4  # layer 4 of 7 is in the second half
    assert leaves([0.05], second_in_first_half=False) == 1


def test_schedule_follows_time():
    """Catches a schedule read from the wrong end: few layers belong to the noise end, t = 1."""
    model = tiny()
    x, _, _, _ = inputs(4)
    t = torch.tensor([0.0, 0.35, 0.75, 1.0], dtype=torch.float64)
    _, used = run_with_exits(model, EXIT_POLICIES["schedule"](), x, t, (999 * t).float(), None)
    np.testing.assert_array_equal(used, [7, 6, 4, 3])  # ceil of 7 times 1, 24/28, 16/28, 12/28
    with pytest.raises(ValueError, match="shares"):
        EXIT_POLICIES["schedule"](shares=(0.5, 1.5))


@pytest.mark.parametrize("process", ["ddpm", "sd", "vp_linear"])
def test_the_released_schedule_counts_noise_levels_as_published(process):
    """Catches bins that are one level off where a uniform grid meets their borders: DDPM's level 899 ran bin 900-999.

    ASE's bins are the levels 0-99, ..., 900-999 of 1,000; a grid of ten calls asks 999, 899, ..., 99.
    """
    plan = ddim(PROCESSES[process](), steps=10)
    shares = (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)
    decide = EXIT_POLICIES["schedule"]().start(10, 28, plan.t)
    stops = torch.stack([torch.as_tensor(decide(Look(k=k, rows=torch.arange(10)))) for k in range(1, 29)])
    assert (stops.int().argmax(0) + 1).tolist() == list(reversed(shares))


def depths(policy, t):
    """The depths (n,) that a policy which looks at nothing gives n rows at the times t."""
    decide = policy.start(len(t), 7, torch.tensor(t, dtype=torch.float64))
    stops = [np.broadcast_to(decide(Look(k=k, rows=torch.arange(len(t)))), len(t)) for k in range(1, 8)]
    return (np.stack(stops).argmax(0) + 1).tolist()


def test_calibrated_schedule():
    """Catches a stored schedule read in the order of the calls, which is descending in time, and wrong rounding."""
    policy = EXIT_POLICIES["schedule"](path=calibration_file())
    assert depths(policy, [1.0, 0.95, 0.77, 0.61, 0.44, 0.3, 0.21, 0.19, 0.0]) == [2, 2, 4, 4, 5, 5, 5, 7, 7]
    assert policy.start(3, 7, torch.full((3,), 0.3, dtype=torch.float64))(Look(k=5, rows=torch.arange(3))) is True


def test_power_and_linear_schedules():
    """Catches a family that spends its layers at the noise end."""
    linear = EXIT_POLICIES["power"](at_data=1.0, at_noise=1 / 7)
    assert depths(linear, [0.0, 0.5, 1.0]) == [7, 4, 1]
    assert depths(EXIT_POLICIES["power"](at_data=1.0, at_noise=1 / 7, exponent=3.0), [0.0, 0.5, 1.0]) == [7, 7, 1]
    for bad in ({"at_data": 0.0}, {"at_noise": 1.2}, {"exponent": 0.0}):
        with pytest.raises(ValueError, match=f"exit.power.{next(iter(bad))}"):
            EXIT_POLICIES["power"](**bad)


def test_calibrated_thresholds():
    """Catches thresholds of another time bin or exit, and questions at exits that nobody leaves at."""
    policy = EXIT_POLICIES["calibrated"](path=calibration_file())
    assert policy.asked(tuple(range(1, 8))) == (1, 2, 3, 4, 5, 6)
    late, early = (policy.start(2, 7, torch.full((2,), t, dtype=torch.float64)) for t in (0.4, 0.6))
    look = Look(k=2, rows=torch.arange(2), u=torch.tensor([0.505, 0.44]))
    assert late(look).tolist() == [True, True] and early(look).tolist() == [False, True]
    assert not early(Look(k=1, rows=torch.arange(2), u=torch.zeros(2))).any()


@pytest.mark.parametrize("name", ["schedule", "calibrated"])
def test_bad_calibration_files(name, tmp_path):
    """Catches a damaged or foreign file that is used all the same."""
    policy, model = EXIT_POLICIES[name], tiny(points=(1,))
    with pytest.raises(ValueError, match="can be left at"):
        policy(path=calibration_file()).check(tiny(points=(1, 2, 5)))
    for content in ("{", "{}", '{"points": [1, 7], "schedule": {"t": [1]}, "thresholds": {"edges": [1], "max_u": []}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"exit.{name}.path is"):
            policy(path=str(tmp_path / "bad.json")).check(model)
    with pytest.raises(ValueError, match="there is no such file"):
        policy(path=str(tmp_path / "none.json")).check(model)
    with pytest.raises(ValueError, match="both set" if name == "schedule" else "is not set"):
        policy(**({"shares": (0.5,), "path": "a.json"} if name == "schedule" else {})).check(model)


def test_similarity_looks_at_the_layer_before():
    """Catches a comparison with another row's tokens after rows left, or with the first layer's."""
    model, policy = tiny("time"), EXIT_POLICIES["similarity"](**SETTINGS["similarity"])
    x, t, time, _ = inputs()
    tokens, carry = [], model.embed(x, time, None)
    for i in range(7):
        carry = model.layer(i, carry)
        tokens.append(model.backbone.patches(carry))
    near = [
        torch.cosine_similarity(a, b, dim=-1).mean(1) >= policy.cosine
        for a, b in zip(tokens[:-1], tokens[1:], strict=True)
    ]
    wanted = [next((k for k, hit in enumerate(row, 2) if hit and k < 7), 7) for row in torch.stack(near).T.tolist()]
    assert run_with_exits(model, policy, x, t, time, None)[1].tolist() == wanted
    with pytest.raises(ValueError, match="exit.similarity.cosine"):
        EXIT_POLICIES["similarity"](cosine=1.5)


def test_forecasts_are_no_calls_to_match(tmp_path):
    """Catches controls that spend less than what they match, as its forecasts count as calls of depth 0."""
    trace = Trace(7)
    for t in (1.0, 0.5):
        trace.add(t, np.full((1, 4), 6))
    trace.with_forecasts([1, 0.75, 0.5, 0.25], [True, False, True, False]).save(tmp_path / "trace.npz", np.arange(4))
    times, counts = EXIT_POLICIES["matched_static"](path=str(tmp_path / "trace.npz")).counts
    assert times == [0.5, 1.0] and counts[:, 6].tolist() == [4, 4]


def test_matched_controls():
    """Catches controls that spend more or less than what they match, or that follow time when they should not."""
    static = EXIT_POLICIES["matched_static"](path=trace_file())
    assert depths(static, [1.0, 0.7, 0.4, 0.1]) == [5, 4, 3, 2]  # the mode of each recorded call
    n = 4000
    for match, means in (("call", {1.0: 5.5, 0.1: 2.5}), ("all", {1.0: 4.0, 0.1: 4.0})):
        random = EXIT_POLICIES["matched_random"](path=trace_file(), match=match).bind(0, range(n))
        drawn = {t: depths(random, [t] * n) for t in means}
        for t, mean in means.items():
            assert np.mean(drawn[t]) == pytest.approx(mean, abs=0.1)
    assert drawn[1.0] != drawn[0.1], "draws of different calls are independent"
    assert depths(EXIT_POLICIES["matched_random"](path=trace_file()).bind(1, range(n)), [1.0] * n) != drawn[1.0]
    with pytest.raises(ValueError, match="bind it"):
        EXIT_POLICIES["matched_random"](path=trace_file()).start(2, 7, torch.zeros(2))
    with pytest.raises(ValueError, match="7 layers; this one has 5"):
        static.check(tiny(depth=4))
    with pytest.raises(ValueError, match="exit.matched_static.path is ''"):
        EXIT_POLICIES["matched_static"]().check(tiny())


def test_oracle_is_the_least_sufficient_exit():
    """Catches an oracle that measures against the wrong exit, or that takes the last sufficient one."""
    eps = torch.tensor([[3.0, 1.0], [1.0, 2.0], [1.5, 1.0], [0.0, 0.9]])[:, :, None, None, None]  # (4, 2, 1, 1, 1)
    assert oracle(eps, (1, 2, 4, 7), tau=1.0).tolist() == [2, 1]
    assert oracle(eps, (1, 2, 4, 7), tau=0.0).tolist() == [7, 7]


def test_pairs_pass_batchwise_decisions_through():
    """Catches a pairing rule that turns a fixed layer's host decision into device work."""
    decide = GuidancePairs(inner=EXIT_POLICIES["fixed"](layer=3), pair="tied").start(4, 7, torch.zeros(4))
    assert decide(Look(k=3, rows=torch.arange(4))) is True


def test_the_example_of_a_policy_works(monkeypatch):
    """Catches an example that lacks an import or breaks the contract, and a contract that only fits our policies."""
    blocks = [block.partition("```")[0] for block in Path("README.md").read_text().split("```python\n")[1:]]
    (code,) = [block for block in blocks if "(ExitPolicy)" in block]
    exec(compile(code, "example", "exec", dont_inherit=True), names := {"__name__": "mine"})
    monkeypatch.setitem(EXIT_POLICIES, "mine", names["Mine"])
    test_batch_equals_single_images("mine", "shared")
    test_no_state_between_calls("mine")
    test_row_order_does_not_matter("mine")
    test_decisions_equal_the_dense_reference("mine")
    test_work_is_the_sum_of_layers_used("mine")
    model, (x, t, time, _) = tiny("time"), inputs()
    assert len(set(run_with_exits(model, names["Mine"](slack=0.01), x, t, time, None)[1])) > 1
