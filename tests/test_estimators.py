"""Uncertainty estimators: range, precision, what they may read, and what they may not move."""

import pytest
import torch
from conftest import inputs, tiny, tiny_dit
from wrong import FirstRowBank

from libs.exits import EXIT_POLICIES, run_with_exits
from libs.models import ESTIMATORS

KINDS = [(name, options) for name in ("linear", "time") for options in ({}, {"norm": False}, {"output": "scalar"})]
KINDS += [("time_bank", {}), ("time_bank", {"norm": False, "bins": 3}), ("attention", {}), ("ahead", {}), ("probe", {})]
KINDS += [("attention_probe", {}), ("shared", {})]


def test_every_estimator_is_tested():
    """Catches an estimator that was added to the registry without the contract tests below."""
    assert {name for name, _ in KINDS} == set(ESTIMATORS)


def test_the_attention_probe_sees_every_patch():
    """Catches a first patch that is left out as if it were the token of the time, which a DiT has not."""
    model = tiny_dit("attention_probe")
    tokens = torch.randn(1, 16, 32)
    moved = tokens.clone()
    moved[:, 0] += 10
    assert not torch.equal(model.uem.score(1, tokens), model.uem.score(1, moved))


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_contract(name, options):
    """Catches estimates outside [0, 1], in half precision, of the wrong shape, or that depend on batch mates."""
    model = tiny(name, uem_options=options)
    x, _, time, _ = inputs(8)
    with torch.autocast("cpu", torch.bfloat16):
        exits = model(x, time)
    assert exits.u.dtype == torch.float32 and exits.u.min() >= 0 and exits.u.max() <= 1
    assert exits.u.shape == ((7, 8) if model.uem.scalar else (7, 8, 1, 8, 8))
    exits = model(x, time)
    alone = model(x[3:4], time[3:4])
    torch.testing.assert_close(exits.u[:, 3:4], alone.u, rtol=1e-4, atol=1e-5)
    carry = model.embed(x, time, None)
    asked = model.predict_ahead(carry)
    asked = model.uncertainty(1, model.layer(0, carry)) if asked is None else asked[:, 0]
    torch.testing.assert_close(asked, exits.mean_u[0])


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_fitting_u_never_moves_the_backbone(name, options):
    """Catches an estimator that reads tokens with their graph."""
    model = tiny(name, uem_options=options)
    x, _, time, _ = inputs(4)
    model(x, time).u.sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.uem.parameters())


@pytest.mark.parametrize("name", ["time", "time_bank"])
def test_time_estimator_reads_time(name):
    """Catches the released code's omission: no timestep in the estimator."""
    model = tiny(name)
    x, _, time, _ = inputs(8)
    patches = model.backbone.patches(model.embed(x, time, None))
    assert (model.uem(2, patches, time) - model.uem(2, patches, time.flip(0))).abs().max() > 0.01


def check_own_bank(model):
    """A row's estimate is the one of the bank of its own time, whatever its batch mates' times are."""
    x, _, time, _ = inputs(16)
    patches = model.backbone.patches(model.embed(x, time, None))
    alone = torch.cat([model.uem(2, patches[i : i + 1], time[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model.uem(2, patches, time), alone)


def test_every_row_has_its_own_bank():
    """Catches weights that are gathered once per batch."""
    check_own_bank(tiny("time_bank"))


def test_a_bank_chosen_by_the_first_row_is_caught(monkeypatch):
    """A public attempt indexed its bank with the first row's timestep: its probes were trained on the wrong times."""
    model = tiny("time_bank")
    monkeypatch.setattr(model.uem, "__class__", FirstRowBank)
    with pytest.raises(AssertionError):
        check_own_bank(model)


def test_banks_cover_all_times():
    """Catches an index beyond the last bin at t = 1, where discrete processes read 1000, and a wrong bin width."""
    bank = tiny("time_bank", uem_options={"bins": 4}).uem
    assert bank.bin(torch.tensor([0.0, 249.0, 250.0, 999.0, 1000.0])).tolist() == [0, 0, 1, 3, 3]


@pytest.mark.parametrize(("kind", "size"), [("time_bank", "bins"), ("attention", "hidden"), ("ahead", "hidden")])
def test_impossible_sizes_are_refused(kind, size):
    """Catches torch's own words for an empty or negative layer, which name no setting."""
    with pytest.raises(ValueError, match=f"uem.{kind}.{size} is 0; it must be at least 1"):
        tiny(kind, uem_options={size: 0})


def test_attention_starts_as_the_mean_and_then_selects():
    """Catches a pooling that ignores its query."""
    uem = tiny("attention").uem
    patches = torch.randn(2, 16, 32)
    before = uem(3, patches, torch.zeros(2))
    shuffled = patches[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(uem(3, shuffled, torch.zeros(2)), before)
    uem.queries["3"].weight.data[:, 0] += 5
    assert (uem(3, patches, torch.zeros(2)) - before).abs().max() > 1e-3


def test_looking_ahead_is_one_look(monkeypatch):
    """Catches an executor that asks an estimator of all exits again at every exit, or that reads the wrong column."""
    model = tiny("ahead")
    model.uem.exits.weight.data *= 100
    x, t, time, _ = inputs()
    exits = model(x, time)
    certainty = 1 - exits.mean_u[:-1].median().item()
    wanted = [next((k for k, u in zip(exits.points, row, strict=True) if u < 1 - certainty), 7) for row in exits.u.T]
    calls = []
    model.uem.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    _, used = run_with_exits(model, EXIT_POLICIES["threshold"](certainty=certainty), x, t, time, None)
    assert calls == [len(x)] and used.tolist() == wanted and len(set(wanted)) > 3
    assert model.questions((2, 5)) == (0,) and model.questions(()) == ()


def test_norm_keeps_the_estimate_off_saturation():
    """Token norms grow with depth; without the LayerNorm the sigmoid saturates at once."""
    patches = 500 * torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    with_norm, without = (tiny(uem_options={"norm": norm}).uem(3, patches, torch.zeros(4)) for norm in (True, False))
    saturated = [((u < 1e-6) | (u > 1 - 1e-6)).float().mean() for u in (with_norm, without)]
    assert saturated[0] < 0.01 < 0.9 < saturated[1]


@pytest.mark.parametrize("name", ["linear", "time"])
def test_bad_output_kind(name):
    """Catches a message that names no setting."""
    with pytest.raises(ValueError, match=f"uem.{name}.output is 'vector'"):
        tiny(name, uem_options={"output": "vector"})
