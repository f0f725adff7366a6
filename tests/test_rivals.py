"""Rivals of early exit that look back: each against full recomputation in a few naive lines.

Their batches, guidance branches and costs are tested with the other methods that look back (test_reuse.py).
"""

from __future__ import annotations

import pytest
import torch
from conftest import inputs, tiny, tiny_dit, tiny_unet
from test_cost import count_macs
from test_reuse import PROCESS, STEPS, denoiser, samples

from configs import base
from libs import checkpoints
from libs.exits import EXIT_POLICIES, looking_back
from libs.metrics.cost import macs_per_image
from libs.models.build import build_model
from libs.sampling.denoiser import Guidance


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
    checkpoints.write(build_model(config).state_dict(), path, {"config": config.to_dict()})
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
