"""Compiled blocks: the numbers of eager ones, few graphs whatever the exits, and what cannot be compiled."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import inputs, tiny, tiny_dit, tiny_unet

from libs.exits import EXIT_POLICIES, run_with_exits
from libs.losses import Objective
from libs.run import Alone
from sde import VPLinear


class Graphs:
    """A backend that counts graphs and runs them as they are."""

    n = 0

    def __call__(self, module, inputs):
        self.n += 1
        return module.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.inference_mode()
def call(model, n, certainty):
    x, t, time, cond = inputs(n, model=model)
    policy = EXIT_POLICIES["threshold"](certainty=certainty)
    return run_with_exits(model, policy, x, t, time, cond)


@pytest.mark.parametrize("made", [tiny, tiny_dit])
def test_exits_share_few_graphs(made):
    """Catches a graph per exit or per number of rows, and rows that a compiled block mixes up."""
    eager = made()
    model, graphs = deepcopy(eager), Graphs()
    model.compile_blocks(backend=graphs)
    seen = set()
    for n in (48, 1, 20):
        for certainty in (1.0, 0.5, 0.45):
            wanted, depth = call(eager, n, certainty)
            found, used = call(model, n, certainty)
            assert np.array_equal(used, depth)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            seen |= set(used.tolist())
    assert len(seen) > 2, "these thresholds must take rows away"
    assert 0 < graphs.n <= 8


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_training_step_is_the_eager_one(backend):
    """Catches gradients that a compiled block loses: the loss and every gradient equal the eager ones."""
    models = [tiny(spread=False, depth=2).train() for _ in range(2)]
    models[1].compile_blocks(backend=backend)
    x, t, time, _ = inputs(8)
    noise, process = torch.randn_like(x), VPLinear()
    losses = []
    for model in models:
        loss, _ = Objective()(model(process.noised(x, t, noise), time), process, "noise", x, noise, t)
        loss.sum().backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-6, name


@pytest.mark.long
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_inductor_makes_the_same_images(precision):
    """Catches fused kernels that change more than rounding, at full depth and with exits, with cast weights."""
    from test_inflight import case

    policy = EXIT_POLICIES["schedule"]()
    made = []
    for compiled in (False, True):
        sampler, settings = case(Alone("cpu", precision), policy=policy)
        if compiled:
            sampler.model.compile_blocks()
        made.append(torch.cat([images.pixels for images in sampler.images(**settings)]))
    error = (made[1] - made[0]).square().mean().sqrt() / made[0].std()
    assert error < (1e-5 if precision == "no" else 0.02)


def test_a_u_net_is_refused():
    """Catches dozens of graphs, and a silent return to eager after the eighth."""
    with pytest.raises(ValueError, match="compile is True.*not for U-Nets"):
        tiny_unet(spread=False).compile_blocks()
