"""Training that runs only some of the layers: which, for whom, and at what cost."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import exit_codes, forked, inputs, tiny, tiny_unet
from test_configs import load
from test_training import log

from libs import regimes, trainer
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.exits.static import layers_at
from libs.losses import CELLS, Depths, Objective
from libs.run import PROCESS_TIMEOUT, Run
from sde import PROCESSES

POINTS = (1, 2, 3, 4, 5, 6, 7)


def depths_of(kind="random", process="vp_linear", seed=1, freeze=False, model=None, objective=None, **policy):
    config = load("digits_uvit_tiny").unlock()
    config.update_from_flattened_dict({"train.depths": kind, "train.freeze_backbone": freeze, "seed": seed})
    config.update_from_flattened_dict({f"exit.{key}": value for key, value in policy.items()})
    return Depths(
        config, model or SimpleNamespace(points=POINTS, gaussian=None), PROCESSES[process](), objective or Objective()
    )


def ran(model, run) -> list[int]:
    """How often each layer of a U-ViT or level of a U-Net ran while `run` did."""
    blocks = list(model.backbone.blocks)
    counts = [0] * len(blocks)
    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1)))
    run()
    for hook in hooks:
        hook.remove()
    return counts


def test_layers_that_are_not_asked_do_not_run_and_learn_nothing():
    """Catches a training that runs everything and throws the deep exits away, and gradients of zero that decay."""
    model = tiny(spread=False).train()
    x, t, time, cond = inputs(4)
    exits = None

    def forward():
        nonlocal exits
        exits = model(x, time, cond, (1, 3))

    assert ran(model, forward) == [1, 1, 1, 0, 0, 0, 0]
    assert exits.points == (1, 3) and not exits.full and len(exits.out) == len(exits.u) == 2
    loss, parts = Objective()(exits, PROCESSES["vp_linear"](), "noise", x, torch.randn_like(x), t)
    loss.sum().backward()
    for i, block in enumerate(model.backbone.blocks):
        assert all((p.grad is None) == (i > 2) for p in block.parameters()), i
    assert all(p.grad is None for p in model.uem.maps["5"].parameters()) and "err_3" in parts and "err_4" not in parts
    whole = model(x, time, cond)
    assert whole.full and torch.equal(exits.out[1], whole.out[2]) and torch.equal(exits.u[0], whole.u[0])


def test_levels_that_are_not_asked_do_not_run():
    """Catches the same in a U-Net, whose heads are decoders: the exit alone runs one of them."""
    model = tiny_unet(spread=False)
    x, _, time, _ = inputs(4)
    assert ran(model, lambda: model(x, time, None, (2,))) == [1, 1, 0, 0, 0, 0, 0, 1, 1]  # 4 down, middle, 4 up


def test_losses_of_fewer_exits_by_hand():
    """Catches a deepest exit without its simple loss, and an excess over a depth that was not run."""
    model = tiny(spread=False)
    x, t, time, cond = inputs(4)
    noise, process = torch.randn_like(x), PROCESSES["vp_linear"]()
    exits = model(x, time, cond, (1, 3))
    err = (exits.out - noise).square().flatten(2).mean(2)
    layers = ((1 - exits.mean_u) * err).sum(0)
    loss, parts = Objective(target="excess")(exits, process, "noise", x, noise, t)
    torch.testing.assert_close(loss, err[1] + layers)
    assert "uem" not in parts
    loss, parts = Objective(target="error")(exits, process, "noise", x, noise, t)
    fit = (exits.u - (exits.out - noise).abs().tanh()).square().flatten(2).mean(2).mean(0)
    torch.testing.assert_close(loss, err[1] + layers + fit)
    torch.testing.assert_close(parts["uem"], fit.detach())  # the deepest one is asked, too


def test_random_depths():
    """Catches depths that are not uniform, exits beyond them, and times that were touched."""
    depths, uniform = depths_of(), torch.rand(8, dtype=torch.float64)
    drawn = [depths.draw(step, uniform) for step in range(1400)]
    assert all(points == POINTS[: points[-1]] and u is uniform for points, u in drawn)
    counts = np.bincount([points[-1] for points, _ in drawn], minlength=8)[1:]
    assert counts.min() > 140 and counts.max() < 260, counts  # 200 each, standard deviation 13
    plain = Objective(lambda_u=0.0, lambda_layers=0.0)
    assert all(len(depths_of(objective=plain).draw(step, uniform)[0]) == 1 for step in range(20))


@pytest.mark.parametrize("process", ["vp_linear", "ddpm"])
def test_a_batch_of_a_schedule_has_the_times_of_its_depth(process):
    """Catches times of another depth, times that are not uniform over all batches, and discrete levels that move."""
    depths = depths_of("schedule", process, name="schedule")
    policy, process = EXIT_POLICIES["schedule"](), PROCESSES[process]()
    everything = []
    for step in range(400):
        u = torch.rand(16, dtype=torch.float64)
        points, u = depths.draw(step, u)
        t = process.times(u)
        assert (layers_at(policy, POINTS, t) == points[-1]).all() and points == POINTS[: points[-1]]
        everything.append(t)
    counts = torch.histc(torch.cat(everything), 10, 0, 1)  # 640 each; batches of one bin come together
    assert counts.min() > 420 and counts.max() < 880, counts
    assert len({int(points[-1]) for points in [depths.draw(s, u)[0] for s in range(50)]}) == 5


def test_processes_agree():
    """Catches a depth that depends on the rank, on the rows at hand or on what was drawn before."""
    for kind, policy in (("random", {}), ("schedule", {"name": "power"})):
        depths, uniform = depths_of(kind, **policy), torch.rand(8, dtype=torch.float64)
        whole = depths.draw(7, uniform)
        halves = [depths_of(kind, **policy).draw(7, part) for part in uniform.chunk(2)]
        assert {points for points, _ in halves} == {whole[0]}
        assert torch.equal(torch.cat([u for _, u in halves]), whole[1])
        assert len({depths_of(kind, seed=seed, **policy).draw(7, uniform)[0] for seed in range(20)}) > 2


def test_layers_at_is_what_sampling_runs():
    """Catches a training under other depths than those that are sampled."""
    model = tiny(spread=False)
    x, t, time, cond = inputs(64)
    for name, settings in (("schedule", {}), ("power", {"at_noise": 0.1}), ("fixed", {"layer": 3})):
        policy = EXIT_POLICIES[name](**settings)
        used = run_with_exits(model, policy, x, t, time, cond)[1]
        np.testing.assert_array_equal(layers_at(policy, model.points, t), used)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="some"), "train.depths is 'some'; it must be one of all, random, schedule"),
        (dict(kind="schedule", name="threshold"), "exit.name is 'threshold'; the depth of a time is told by"),
        (dict(kind="random", freeze=True), "train.freeze_backbone is on"),
    ],
)
def test_bad_settings(changes, message):
    """Each error names the setting."""
    with pytest.raises(ValueError, match=message):
        depths_of(**changes)


def test_a_resumed_run_keeps_its_schedule(tmp_path):
    """Catches a run that goes on under other depths: the policy may change, what it says about training may not."""
    config = load("digits_uvit_tiny", "quick")
    config.train.update(n_steps=1, sample_interval=0, depths="schedule")
    config.exit.name = "power"
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.train.n_steps = 2
    config.exit.power.at_noise = 0.9
    with pytest.raises(ValueError, match="exit was .*'at_noise': 0.4.* and is .*'at_noise': 0.9"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.exit.power.at_noise = 0.4
    config.exit.threshold.certainty = 0.5  # not what it trains with
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.train.depths = "all"
    with pytest.raises(ValueError, match="train.depths was 'schedule' and is 'all'"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))


def test_two_processes_equal_one(tmp_path):
    """Catches processes that run different depths, and a wait for the gradients of layers that nobody ran."""

    def work(world):
        config = load("digits_uvit_tiny", "quick")
        config.cpu, config.mixed_precision, config.optimizer.name = True, "no", "adamw"
        config.train.update(n_steps=6, sample_interval=0, depths="random")
        run = Run(tmp_path / str(world), Accelerator(cpu=True, kwargs_handlers=[PROCESS_TIMEOUT]))
        trainer.fit(config, regimes.pixels(config), run)

    for world in (1, 2):
        assert set(exit_codes(forked(lambda world=world: work(world), world))) == {0}
    one, two = (log(tmp_path / str(world)) for world in (1, 2))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
    assert len({json.dumps(sorted(line)) for line in one}) > 1, "the depths must differ between steps"


def test_cells_are_levels():
    """Catches a count of cells at which DDPM's levels would be split between two depths."""
    assert CELLS % PROCESSES["ddpm"]().n == 0
