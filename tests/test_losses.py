"""The objective on cases small enough to do by hand, and where gradients must not flow."""

import math

import pytest
import torch

from libs.losses import LAYER_WEIGHTS, Objective
from libs.models import AllExits
from sde import VPLinear

# Two exits, two one-pixel images; the truth is eps = 0 and x0 = 0, so errors are the outputs themselves.
OUT = torch.tensor([[1.0, 2.0], [0.5, 0.1]])
U = torch.tensor([[0.3, 0.8], [0.1, 0.2]])


def loss_of(pred="noise", requires_grad=False, **settings):
    out, u = (z.clone().reshape(2, 2, 1, 1, 1).requires_grad_(requires_grad) for z in (OUT, U))
    zeros = torch.zeros(2, 1, 1, 1)
    exits = AllExits(points=(1, 2), out=out, u=u)
    loss, parts = Objective(**settings)(exits, VPLinear(), pred, zeros, zeros, torch.tensor([0.4, 0.6]))
    return loss, parts, out, u


def test_paper_loss_by_hand():
    """Eq. 13 with per-image weights: catches batch-mean weights, a missing layer, a squared or absolute slip."""
    loss, parts, _, _ = loss_of()
    for i in range(2):
        simple = OUT[1, i] ** 2
        fit = sum((U[k, i] - math.tanh(abs(OUT[k, i]))) ** 2 for k in range(2)) / 2
        layers = sum((1 - U[k, i]) * OUT[k, i] ** 2 for k in range(2))
        assert loss[i] == pytest.approx(float(simple + fit + layers), rel=1e-6)
    assert set(parts) == {"simple", "uem", "layers", "err_1", "err_2", "u_1", "u_2"}


def test_excess_target():
    """tanh|eps_k - eps_K|: zero at the last exit, and free of the error that no depth removes."""
    _, parts, _, _ = loss_of(target="excess")
    for i in range(2):
        fit = (U[0, i] - math.tanh(abs(OUT[0, i] - OUT[1, i]))) ** 2  # nobody asks at the last exit
        assert parts["uem"][i] == pytest.approx(float(fit), rel=1e-6)


def test_the_uncertainty_is_about_eps():
    """Catches a target in the space of the network's output: for v, eps_k - eps = alpha (v_k - v)."""
    _, parts, _, _ = loss_of("v")
    t = torch.tensor([0.4, 0.6])
    for i, alpha in enumerate(VPLinear().alpha(t).tolist()):
        fit = (U[0, i] - math.tanh(alpha * abs(OUT[0, i]))) ** 2
        assert parts["uem"][i] == pytest.approx(float(fit), rel=1e-5)


def test_weights():
    """Each published weighting on numbers: sums, who is per image, who is not."""
    k = torch.tensor([1.0, 2.0])
    w = {name: weight(U, k, U.square()) for name, weight in LAYER_WEIGHTS.items()}
    torch.testing.assert_close(w["ual"], 1 - U)
    certainty = torch.tensor([(0.7 + 0.2) / 2, (0.9 + 0.8) / 2])
    torch.testing.assert_close(w["adadiff"], (certainty / certainty.sum())[:, None].expand(2, 2))
    torch.testing.assert_close(w["berxit"], torch.full((2, 2), 0.5))
    torch.testing.assert_close(w["calm"], torch.tensor([[1 / 3] * 2, [2 / 3] * 2]))
    torch.testing.assert_close(w["unweighted"], torch.ones(2, 2))
    torch.testing.assert_close(w["measured"], 1 - U.square())


@pytest.mark.parametrize(("weights", "moves_u"), [("ual", False), ("adadiff", True)])
def test_where_layer_losses_may_flow(weights, moves_u):
    """The paper stops u inside L_UAL; the released code does not. Catches one taken for the other."""
    loss, _, out, u = loss_of(requires_grad=True, weights=weights, lambda_u=0.0)
    loss.sum().backward()
    assert bool(u.grad.abs().sum() > 0) == moves_u
    assert (out.grad.abs() > 0).all()


@pytest.mark.parametrize("target", ["error", "excess"])
def test_the_fit_of_u_never_moves_the_predictions(target):
    """Catches the perverse gradient of a target that is not stopped: predictions drift to what the estimator says."""
    loss, _, out, u = loss_of(requires_grad=True, target=target, lambda_layers=0.0)
    loss.sum().backward()
    assert (out.grad[0] == 0).all() and (u.grad.abs() > 0).all()


def test_a_scalar_estimator_is_fitted_to_the_image_mean():
    """Catches broadcasting (E, B) against (E, B, C, H, W)."""
    out = torch.randn(2, 3, 1, 4, 4)
    u = torch.rand(2, 3)
    zeros = torch.zeros(3, 1, 4, 4)
    _, parts = Objective()(AllExits((1, 2), out, u), VPLinear(), "noise", zeros, zeros, torch.rand(3))
    wanted = (u - out.abs().tanh().flatten(2).mean(2)).square()[0]
    torch.testing.assert_close(parts["uem"], wanted)


@pytest.mark.parametrize(
    "bad", [{"weights": "mean"}, {"target": "gap"}, {"lambda_u": -1.0}, {"lambda_extra": math.nan}]
)
def test_bad_settings(bad):
    """Each error names the setting."""
    with pytest.raises(ValueError, match=f"loss.{next(iter(bad))}"):
        Objective(**bad)
