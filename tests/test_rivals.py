"""Rivals of early exit that look back: each against full recomputation in a few naive lines.

Their batches, guidance branches and costs are tested with the other methods that look back (test_reuse.py).
"""

import json

import numpy as np
import pytest
import torch
from conftest import inputs, tiny, tiny_dit, tiny_unet
from test_configs import load
from test_cost import count_macs
from test_inflight import case
from test_points import quick
from test_reuse import PROCESS, STEPS, denoiser, samples

from configs import base
from libs import checkpoints, regimes
from libs.analysis import rivals
from libs.analysis.rivals import GATES, fit_gates
from libs.evaluation.records import point_key
from libs.evaluation.sweep import make_point, parse_entry
from libs.exits import EXIT_POLICIES, looking_back
from libs.exits.sublayers import gate
from libs.metrics.cost import macs_per_image
from libs.models import EarlyExitModel, build_model
from libs.run import Alone
from libs.sampling.denoiser import Guidance
from libs.sampling.sampler import Sampler


def trajectory(n=6, calls=7, model=None):
    """(x (n, 1, 8, 8), t (n,)) of successive calls, whose changes differ between images and calls."""
    start, drift = inputs(n)[0], inputs(n, seed=2)[0] * torch.linspace(0.02, 0.4, n).view(-1, 1, 1, 1)
    return [(start + i**1.5 * drift, torch.full((n,), 0.9 - 0.1 * i, dtype=torch.float64)) for i in range(calls)]


def tokens(model, x, t):
    """The tokens before the first layer and after each: K + 1 of (B, L, D), and the carry."""
    carry = model.embed(x, PROCESS.network_time(t).float(), None)
    seen = [carry.h]
    for i in range(model.depth):
        carry = model.layer(i, carry)
        seen.append(carry.h)
    return seen, carry


def eps_of(model, h, carry, x, t):
    carry = carry.__class__(h=h, time=carry.time, rows=carry.rows)
    return PROCESS.eps("v", model.head(model.depth, carry), x, t.float())


def first_block_by_hand(model, calls, threshold):
    """[(eps, layers)] for one batch that decides together."""
    kept, answers = None, []
    for x, t in calls:
        h, carry = tokens(model, x, t)
        new = h[1] - h[0]
        skip = kept is not None and (new - kept[0]).abs().mean() / kept[0].abs().mean() < threshold
        if not skip:
            kept = (new, h[-1] - h[1])
        answers.append((eps_of(model, h[1] + kept[1], carry, x, t), 1 if skip else 7))
    return answers


def teacache_by_hand(model, calls, threshold):
    kept, total, answers = None, 0.0, []
    for i, (x, t) in enumerate(calls):
        h, carry = tokens(model, x, t)
        if kept is not None:
            change = (h[0] - last).abs().mean() / last.abs().mean()  # noqa: F821 set at the call before
            total += 2 * change**2 + 0.5 * change + 0.01
        skip = kept is not None and i < len(calls) - 1 and total < threshold
        if not skip:
            kept, total = h[-1] - h[0], 0.0
        last = h[0]  # noqa: F841
        answers.append((eps_of(model, h[0] + kept, carry, x, t), 0 if skip else 7))
    return answers


BY_CHANGE = {
    "first_block": (first_block_by_hand, dict(threshold=0.2)),
    "teacache": (teacache_by_hand, dict(threshold=0.6, polynomial=(2.0, 0.5, 0.01))),
}


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny, tiny_dit])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("name", BY_CHANGE)
def test_change_by_hand(name, per_image, build):
    """Catches changes against another call, sums that are not reset, a residual of other layers, and mixed rows."""
    model, (by_hand, settings) = build("time", "own"), BY_CHANGE[name]
    calls = trajectory()
    made = denoiser(model, EXIT_POLICIES[name](**settings, per_image=per_image), n_calls=len(calls))
    eps = [made(x, t) for x, t in calls]
    rows = [slice(i, i + 1) for i in range(6)] if per_image else [slice(0, 6)]
    for r in rows:
        wanted = by_hand(model, [(x[r], t[r]) for x, t in calls], settings["threshold"])
        for got, (answer, used), trace in zip(eps, wanted, made.trace.used, strict=True):
            assert set(trace[0, r]) == {used}
            torch.testing.assert_close(got[r], answer, rtol=1e-4, atol=1e-5)
    used = made.trace.used[:, 0]
    assert 7 < (used == 7).sum() < used.size - 7, "some calls must skip, others not"
    assert per_image == (used.min(1) < used.max(1)).any()


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("name", BY_CHANGE)
def test_threshold_zero_is_full_depth(name, per_image):
    """Catches computed rows that take their tokens as a sum of parts, or a comparison that lets equals pass."""
    model, x = tiny("time", "own"), inputs(4)[0]
    policy = EXIT_POLICIES[name](threshold=0.0, per_image=per_image)
    full, _ = samples(model, EXIT_POLICIES["full"](), x)
    mine, made = samples(model, policy, x)
    assert torch.equal(mine, full) and (made.trace.used == 7).all()
    made, same = denoiser(model, policy, n_calls=4), torch.full((4,), 0.5, dtype=torch.float64)
    made(x, same), made(x, same)
    assert (made.trace.used == 7).all()


@pytest.mark.parametrize("name", BY_CHANGE)
def test_a_batch_mean_depends_on_the_batch(name):
    """Catches a rule that is called per batch and decides per image, or the other way round."""
    model, calls = tiny("time", "own"), trajectory()
    for per_image in (True, False):
        policy = EXIT_POLICIES[name](**BY_CHANGE[name][1], per_image=per_image)
        used = []
        for rows in (slice(0, 6), slice(0, 1)):
            made = denoiser(model, policy, n_calls=len(calls))
            for x, t in calls:
                made(x[rows], t[rows])
            used.append(made.trace.used[:, 0, 0])
        assert (used[0] == used[1]).all() == per_image


@pytest.mark.parametrize("name", BY_CHANGE)
def test_what_cannot_be_joined_is_refused(name):
    """Catches settings that would silently do nothing or something else."""
    with pytest.raises(ValueError, match=f"exit.{name}.threshold is -1"):
        EXIT_POLICIES[name](threshold=-1)
    with pytest.raises(ValueError, match=f"exit.{name}.at"):
        EXIT_POLICIES[name](at=(2,))
    with pytest.raises(ValueError, match="leaves early"):
        looking_back(EXIT_POLICIES[name](), residual=True)
    with pytest.raises(ValueError, match="layers of one size"):
        EXIT_POLICIES[name]().check(tiny_unet())
    model = tiny(num_classes=4)
    _, _, _, cond = inputs(4, model=model)
    with pytest.raises(ValueError, match=f"sample.pair is 'tied'; exit.{name}"):
        denoiser(model, EXIT_POLICIES[name](), STEPS, cond=cond, null=cond, guidance=Guidance(1.0, "tied"))


# ---- two networks ----------------------------------------------------------------------------------------------------


def shallow_file(folder, **settings) -> str:
    """A network of three layers for the images of `tiny`, as a training writes it."""
    config = base.config()
    config.nnet.update(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=4, init="xavier")
    config.nnet.attention, config.pred = "math", "v"
    config.update_from_flattened_dict(settings)
    torch.manual_seed(5)
    path = folder / "shallow.pth"
    checkpoints.write_weights(build_model(config).state_dict(), path, {"config": config.to_dict()})
    return str(path)


def test_two_networks_by_hand(tmp_path):
    """Catches the deep network's layers, head or cost in the shallow one's calls, and a count that is off by one."""
    model, calls = tiny("time", "own", attention="math"), trajectory(3, 4)
    policy = EXIT_POLICIES["duo"](path=shallow_file(tmp_path), first=2)
    made, eps = denoiser(model, policy, n_calls=4), []
    counted = count_macs(lambda: eps.extend(made(x, t) for x, t in calls))
    shallow = policy.shallow
    with torch.no_grad():
        for i, (x, t) in enumerate(calls):
            out = (shallow if i < 2 else model).backbone(x, PROCESS.network_time(t).float())
            torch.testing.assert_close(eps[i], PROCESS.eps("v", out, x, t.float()), rtol=1e-5, atol=1e-5)
    assert made.trace.used[:, 0, 0].tolist() == [3, 3, 7, 7] and shallow.depth == 3
    assert macs_per_image(made.trace, model.macs()).sum() == pytest.approx(counted, abs=0.5)
    alone = denoiser(model, policy, n_calls=4)
    for (x, t), whole in zip(calls, eps, strict=True):
        torch.testing.assert_close(alone(x[:1], t[:1]), whole[:1], rtol=1e-5, atol=1e-5)


def test_two_networks_are_cast_and_compiled_alike(tmp_path, monkeypatch):
    """Catches a shallow network whose weights every call casts, and one that stays eager beside a compiled one."""
    sampler, settings = case(
        Alone("cpu", "bf16"), policy=EXIT_POLICIES["duo"](path=shallow_file(tmp_path, pred="noise"))
    )
    linear, seen = settings["policy"].shallow.backbone.mid_block.mlp.fc1, []
    linear.register_forward_hook(lambda module, args, out: seen.append(module.weight.dtype))
    monkeypatch.setattr(EarlyExitModel, "compile_blocks", lambda self, backend: setattr(self, "compiled", backend))
    sampler.model.compile_blocks("eager")
    list(sampler.images(**settings))
    assert set(seen) == {torch.bfloat16} and linear.weight.dtype == torch.float32
    assert settings["policy"].shallow.compiled == "eager"


def test_two_networks_that_do_not_fit_are_refused(tmp_path):
    """Catches a second network that means something else by its input or its output."""
    x, t, _, _ = inputs(2)
    with pytest.raises(ValueError, match="exit.duo.path is not set"):
        denoiser(tiny(), EXIT_POLICIES["duo"]())
    with pytest.raises(ValueError, match="exit.duo.first is 0"):
        EXIT_POLICIES["duo"](first=0)
    for settings, message in (
        ({"nnet.img_size": 16}, "with img_size 16; this one has 8"),
        ({"nnet.num_classes": 4}, "with num_classes 4; this one has 0"),
        ({"nnet.depth": 8}, "its 9 layers are more than 7"),
        ({"pred": "noise"}, "to predict noise; the deep network predicts v"),
        ({"process": "vp_cosine"}, "trained with process vp_cosine"),
    ):
        policy = EXIT_POLICIES["duo"](path=shallow_file(tmp_path, **settings))
        with pytest.raises(ValueError, match=message):
            denoiser(tiny(), policy)


def test_a_checkpoint_folder_as_the_second_network(tmp_path):
    """Catches a point that cannot be recognised when an evaluation resumes, since its network is no file."""
    sampler, keys = quick(), []
    sampler.config.nnet_path = str(tmp_path / "deep.pth")
    checkpoints.write_weights(sampler.model.state_dict(), sampler.config.nnet_path)
    (tmp_path / "last.ckpt").mkdir()
    about = {"config": sampler.config.to_dict()}
    for seed in (0, 1):
        torch.manual_seed(seed)
        checkpoints.write_weights(
            build_model(sampler.config).state_dict(), tmp_path / "last.ckpt" / "nnet_ema.pth", about
        )
        for _ in range(2 - seed):  # the same file twice; written twice, a pickle's bytes may differ
            point = make_point(parse_entry(f"duo.path={tmp_path}/last.ckpt,duo.first=2"), sampler)
            keys.append(point_key(point, "reference"))
    assert keys[0] == keys[1] != keys[2]


# ---- sublayers -------------------------------------------------------------------------------------------------------


def sublayer_file(folder, name: str, seed=0, calls=7, **changes) -> str:
    """Random gates for `tiny`, at the calls of `trajectory`."""
    generator = torch.Generator().manual_seed(seed)
    content = {"kind": name, "t": [0.9 - 0.1 * i for i in range(calls)]}
    if name == "learned_cache":
        run = torch.rand(calls, 7, 2, generator=generator) > 0.5
        run[::2] = True
        content["run"] = run.int().tolist()
    else:
        content["weight"] = torch.randn(7, 2, 32, generator=generator).tolist()
        content["bias"] = torch.zeros(7, 2).tolist()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content | changes))
    return str(path)


def sublayers_by_hand(model, calls, skip):
    """[(eps, what ran (K, 2))] of one image; skip(call, i, j, h) is what the gate says."""
    last, answers, net = {}, [], model.backbone
    for number, (x, t) in enumerate(calls):
        carry, skips, ran = net.embed(x, PROCESS.network_time(t).float(), None), [], np.zeros((7, 2), bool)
        h = carry.h
        for i, block in enumerate(net.blocks):
            if i > 3:
                h = block.skip_linear(torch.cat([h, skips.pop()], dim=-1))
            for j, part in enumerate((lambda h: block.attn(block.norm1(h)), lambda h: block.mlp(block.norm2(h)))):  # noqa: B023
                if number == 0 or not skip(number, i, j, h):
                    last[i, j], ran[i, j] = part(h), True
                h = h + last[i, j]
            if i < 3:
                skips.append(h)
        answers.append((eps_of(model, h, carry, x, t), ran))
    return answers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["learned_cache", "lazy_gate"])
def test_sublayers_by_hand(kind, tmp_path):
    """Catches outputs of another sublayer, image or call, skips that are not mixed in, and gates on other inputs."""
    model, calls = tiny("time", "own", attention="math"), trajectory()
    policy = EXIT_POLICIES[kind](path=sublayer_file(tmp_path, kind))
    made = denoiser(model, policy, n_calls=7)
    eps = [made(x, t) for x, t in calls]
    stored, macs = {key: torch.tensor(value).float() for key, value in policy.stored.items()}, model.macs()

    def skip(number, i, j, h):
        if kind == "learned_cache":
            return not stored["run"][number, i, j]
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return float((normed @ stored["weight"][i, j]).mean() + stored["bias"][i, j]) > 0

    ran_all = []
    for r in range(6):
        wanted = sublayers_by_hand(model, [(x[r : r + 1], t[r : r + 1]) for x, t in calls], skip)
        for number, (answer, ran) in enumerate(wanted):
            torch.testing.assert_close(eps[number][r : r + 1], answer, rtol=1e-4, atol=1e-5)
            gates = 7 * 2 * 32 if kind == "lazy_gate" and number else 0
            cost = macs.at(7) - (~ran).sum(0) @ np.array(macs.sublayers) + gates
            assert made.trace.costs[number][0, r] == cost and made.trace.used[number, 0, r] == ran.any(1).sum()
        ran_all.append([ran for _, ran in wanted])
    ran_all = np.array(ran_all)  # (6, calls, K, 2)
    assert 0.3 < ran_all[:, 1:].mean() < 0.9 and (ran_all != ran_all[:1]).any() == (kind == "lazy_gate")


@pytest.mark.parametrize("kind", ["learned_cache", "lazy_gate"])
def test_cost_of_sublayers_is_what_was_computed(kind, tmp_path):
    """Catches a gate that is free, an attention at the price of an MLP, and work for rows that skip."""
    model, calls = tiny(attention="math"), trajectory()
    made = denoiser(model, EXIT_POLICIES[kind](path=sublayer_file(tmp_path, kind)), n_calls=7)
    counted = count_macs(lambda: [made(x, t) for x, t in calls])
    assert macs_per_image(made.trace, model.macs()).sum() == pytest.approx(counted, abs=0.5)


@torch.no_grad()
def test_closed_and_open_sublayers(tmp_path):
    """Catches a path through the residuals that is not the layer: with all gates open, full depth to the last bit."""
    model, calls = tiny(), trajectory()
    full = denoiser(model, EXIT_POLICIES["full"]())
    wanted = [full(x, t) for x, t in calls]
    for kind, changes in (
        ("learned_cache", {"run": np.ones((7, 7, 2)).tolist()}),
        ("lazy_gate", {"bias": [[-1e9] * 2] * 7}),
    ):
        made = denoiser(model, EXIT_POLICIES[kind](path=sublayer_file(tmp_path, kind, **changes)), n_calls=7)
        assert all(torch.equal(made(x, t), eps) for (x, t), eps in zip(calls, wanted, strict=True))


@pytest.mark.parametrize("kind", ["learned_cache", "lazy_gate"])
def test_sublayers_that_do_not_fit_are_refused(kind, tmp_path):
    """Catches gates of another network or other calls, damaged files, and pairs that would not be kept together."""
    model, calls, policy = tiny(), trajectory(), EXIT_POLICIES[kind]
    part = policy.parts[1 if kind == "learned_cache" else 0]
    for path, message in (
        ("", f"exit.{kind}.path is not set"),
        (sublayer_file(tmp_path, kind, kind="other"), "it holds a other"),
    ):
        with pytest.raises(ValueError, match=message):
            policy(path=path).check(model)
    for wrong in ({part: [[[1]]]}, {part: [[float("nan")]]}, {part: None}):
        with pytest.raises(ValueError, match="for another network|no such file"):
            policy(path=sublayer_file(tmp_path, kind, **wrong)).check(model)
    compiled = build_model(load("digits_uvit_tiny", "quick"))
    compiled.compile_blocks("eager")
    with pytest.raises(ValueError, match=f"compile is on and exit.name is '{kind}'"):  # was an assertion of dynamo
        policy(path=sublayer_file(tmp_path, kind)).check(compiled)
    with pytest.raises(ValueError, match="this is no U-ViT"):
        policy(path=sublayer_file(tmp_path, kind)).check(tiny_dit())
    with pytest.raises(ValueError, match="leaves early"):
        looking_back(policy(path=sublayer_file(tmp_path, kind)), residual=True)
    if kind == "learned_cache":
        made = denoiser(model, policy(path=sublayer_file(tmp_path, kind)), n_calls=8)
        made(*calls[0])
        with pytest.raises(ValueError, match="fitted for 7 calls at 0.9, 0.8.*call 2 of 8 is at 0.8"):
            made(*calls[1])


def test_gates_that_are_sure(tmp_path, monkeypatch):
    """Catches gates told apart by sigmoids, which are all 1 there, and maps rounded to bf16 under autocast."""
    config = load("digits_uvit_tiny", "quick")
    config.sample.sample_steps = 3
    config.nnet_path = str(tmp_path / "w.pth")
    checkpoints.write_weights(build_model(config).state_dict(), config.nnet_path)

    def learn(model, gates, *_):
        gates.bias.data = -60 - torch.arange(10.0).view(5, 2)  # (layer, sublayer): the first are the least sure
        return {}

    monkeypatch.setattr(rivals, "learn_gates", learn)
    found = fit_gates(config, regimes.pixels(config), Alone("cpu"), "lazy_gate", budget=0.95, n_images=4)
    closed = (np.array(found["bias"]) >= 0).reshape(-1).tolist()
    assert closed == sorted(closed, reverse=True) and 0 < sum(closed) < 10
    h, weight = torch.randn(4, 5, 32), torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16):
        low = gate(h, weight, torch.zeros(()))
    assert torch.equal(low, gate(h, weight, torch.zeros(())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs=0"),
        ({"n_images": 0}, "--images=0"),
        ({"penalty": float("nan")}, "--penalty=nan"),
        ({"seed": 1}, "--seed=1"),
    ],
)
def test_fits_that_are_refused(options, message):
    """Catches tracebacks, gates that are NaN, and a rival fitted to the noise that it is reported on."""
    config = load("digits_uvit_tiny", "quick")
    with pytest.raises(ValueError, match=message):
        fit_gates(config, regimes.pixels(config), Alone("cpu"), "lazy_gate", budget=0.7, **options)


@pytest.mark.parametrize("kind", GATES)
def test_fit(kind, tmp_path):
    """Catches gates that learn the wrong sign, and a budget that is not spent.

    The least useful sublayers are made useless by hand: their last maps are zero, so that closing them changes nothing.
    """
    config = load("digits_uvit_tiny", "quick")
    config.sample.sample_steps = 6
    torch.manual_seed(0)
    model = build_model(config)
    useless = [(0, 1), (2, 0), (4, 1)]
    for i, j in useless:
        block = model.backbone.blocks[i]
        last = block.mlp.fc2 if j else block.attn.proj
        last.weight.data.zero_(), last.bias.data.zero_()
    config.nnet_path = str(tmp_path / "w.pth")
    checkpoints.write_weights(model.state_dict(), config.nnet_path)
    macs, calls = model.macs(), 6
    late = calls // 2 if kind == "learned_cache" else calls - 1
    saved = sum(macs.sublayers[j] for _, j in useless)
    extra = 0 if kind == "learned_cache" else late * model.depth * 2 * 32
    budget = 1 - (late * saved - extra) / (calls * macs.at(model.depth)) + 1e-9
    found = fit_gates(config, regimes.pixels(config), Alone("cpu"), kind, budget=budget, n_images=16, epochs=25)
    assert found["loss"]["last"] < found["loss"]["first"]
    path = tmp_path / "fitted.json"
    path.write_text(json.dumps(found))
    sampler = Sampler.open(config, regimes.pixels(config), Alone("cpu"))
    images = sampler(16, seed=7001, policy=EXIT_POLICIES[kind](path=str(path)))
    share = macs_per_image(images.trace, macs).mean() / (calls * macs.at(model.depth))
    assert share == pytest.approx(budget, abs=1e-6 if kind == "learned_cache" else 0.05)
    if kind == "learned_cache":
        run = np.array(found["run"])
        off = {tuple(where) for where in np.argwhere(run == 0).tolist()}
        assert off == {(call, i, j) for call in (1, 3, 5) for i, j in useless}
    with pytest.raises(ValueError, match=r"--budget=0.01: with these calls it must lie in \[0\."):
        fit_gates(config, regimes.pixels(config), Alone("cpu"), kind, budget=0.01, n_images=4, epochs=1)
