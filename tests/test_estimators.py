"""Uncertainty estimators: range, precision, what they may read, and what they may not move."""

from __future__ import annotations

import pytest
import torch
from conftest import inputs, tiny

from libs.models import ESTIMATORS

KINDS = [(name, options) for name in ESTIMATORS for options in ({}, {"norm": False}, {"output": "scalar"})]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_contract(name, options):
    """Catches estimates outside [0, 1], in half precision, of the wrong shape, or that depend on batch mates."""
    model = tiny(name, uem_options=options)
    x, _, time, _ = inputs(8)
    with torch.autocast("cpu", torch.bfloat16):
        exits = model(x, time)
    assert exits.u.dtype == torch.float32 and exits.u.min() >= 0 and exits.u.max() <= 1
    assert exits.u.shape == ((7, 8) if options.get("output") == "scalar" else (7, 8, 1, 8, 8))
    exits = model(x, time)
    alone = model(x[3:4], time[3:4])
    torch.testing.assert_close(exits.u[:, 3:4], alone.u, rtol=1e-4, atol=1e-5)
    carry = model.layer(0, model.embed(x, time, None))
    torch.testing.assert_close(model.uncertainty(1, carry), exits.mean_u[0])


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_fitting_u_never_moves_the_backbone(name, options):
    """Catches an estimator that reads tokens with their graph."""
    model = tiny(name, uem_options=options)
    x, _, time, _ = inputs(4)
    model(x, time).u.sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.uem.parameters())


def test_time_estimator_reads_time():
    """Catches the released code's omission: no timestep in the estimator."""
    model = tiny("time")
    x, _, time, _ = inputs(8)
    patches = model.backbone.patches(model.embed(x, time, None))
    assert (model.uem(2, patches, time) - model.uem(2, patches, time.flip(0))).abs().max() > 0.01


def test_norm_keeps_the_estimate_off_saturation():
    """Token norms grow with depth; without the LayerNorm the sigmoid saturates at once."""
    patches = 500 * torch.randn(4, 16, 32)
    with_norm, without = (tiny(uem_options={"norm": norm}).uem(3, patches, torch.zeros(4)) for norm in (True, False))
    saturated = [((u < 1e-6) | (u > 1 - 1e-6)).float().mean() for u in (with_norm, without)]
    assert saturated[0] < 0.01 < 0.9 < saturated[1]


def test_bad_output_kind():
    with pytest.raises(ValueError, match="uem output"):
        tiny(uem_options={"output": "vector"})
