"""DiT and SiT: the public codes' numbers, exits, guidance of some channels, weight files in both layouts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inputs, tiny, tiny_dit
from test_cost import count_macs
from test_exits import check_batch_equals_singles
from test_parity import arrays, close

from configs import base
from libs import checkpoints
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.models import DIT_SIZES, ESTIMATORS, DiT, EarlyExitModel, build_model
from libs.models.dit import FinalLayer, position_table
from libs.rng import SeededNoise
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.plans import sample
from libs.sampling.solvers import SAMPLERS
from scripts import inspect_checkpoint
from sde import PROCESSES, Flow
from tests.golden.recipe import golden_input, golden_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "dit_configs.json").read_text())
LABELS = torch.tensor([0, 3, 7, 10])


def recorded(case: str) -> EarlyExitModel:
    """A recorded network; its weights come through the loader, under the names that the file would have."""
    theirs = CASES[case]["config"]
    network = DiT(
        img_size=theirs["input_size"],
        patch_size=theirs["patch_size"],
        in_chans=theirs["in_channels"],
        embed_dim=theirs["hidden_size"],
        depth=theirs["depth"],
        num_heads=theirs["num_heads"],
        num_classes=theirs["num_classes"] + 1,
        learn_sigma=theirs["learn_sigma"],
        convention=CASES[case]["kind"],
    )
    model = EarlyExitModel(network, ESTIMATORS["linear"])
    model.drop_exits(heads=False)
    shapes = {key: value.shape for key, value in checkpoints.export(model.state_dict(), "dit").items()}
    assert len(shapes) == CASES[case]["keys"]
    state = golden_weights(shapes)
    assert checkpoints.kind(state) == "dit"
    model.load_state_dict(checkpoints.to_ours(state))
    return model.eval().requires_grad_(False)


def time_of(case: str, theirs: torch.Tensor) -> torch.Tensor:
    """What the network reads: DiT's step 0..999 as it is; SiT's time runs from noise 0 to data 1."""
    return 1000 * (1 - theirs) if case == "sit" else theirs


@pytest.mark.parametrize("case", CASES)
def test_released_forward(case):
    """Catches any difference from the public forward pass: modulation, gates, GELU, positions, time, eps of eight."""
    want, model = arrays("dit"), recorded(case)
    channels = model.backbone.channels
    got = model.backbone(golden_input("dit.x", (4, channels, 8, 8)), time_of(case, want[f"{case[:3]}.times"]), LABELS)
    close(-got if case == "sit" else got, want[f"{case}.out"][:, :channels], 1e-5)


@pytest.mark.parametrize("case", ["dit", "sit"])
def test_released_guidance(case):
    """Catches guidance of the fourth channel, which the released samplers leave alone, and of the wrong strength."""
    want, model = arrays("dit"), recorded(case)
    process = PROCESSES["flow" if case == "sit" else "ddpm"]()
    time = float(time_of(case, want[f"{case}.guided_time"]))
    t = torch.full((2,), (time + 1) / 1000 if case == "dit" else 1.0, dtype=torch.float64)
    if case == "sit":  # theirs starts at s = 1, which ours never reads
        process.time_scale = 1000.0
    x = golden_input("dit.x", (4, 4, 8, 8))[:2]
    condition = dict(cond=LABELS[1:3], null=torch.tensor([10, 10]), guidance=Guidance(0.5, channels=3))
    eps = Denoiser(model, process, "noise", EXIT_POLICIES["full"](), **condition)(x, t)
    close(-eps if case == "sit" else eps, want[f"{case}.guided"][:, :4], 1e-5)
    plain = Denoiser(model, process, "noise", EXIT_POLICIES["full"](), **condition | {"guidance": Guidance(0.5)})(x, t)
    assert torch.equal(plain[:, :3], eps[:, :3]) and not torch.allclose(plain[:, 3], eps[:, 3])


def test_released_positions():
    """Catches rows taken for columns, and sines behind cosines."""
    close(position_table(64, 4)[0], arrays("dit")["pos_embed.64.4"][0], 1e-6)


def test_flow_is_the_released_path():
    """Catches a path, a velocity, a drift or a diffusion that is not SiT's, whose time runs the other way."""
    want, process = arrays("dit"), Flow()
    s = 1 - want["flow.times"]
    t = s / Flow.end
    noise, data, out = (golden_input(f"flow.{name}", (4, 2, 3, 3)).double() for name in ("noise", "data", "velocity"))
    x = process.noised(data, t, noise)
    close(x, want["flow.xt"], 1e-12)
    close(-process.target("velocity", data, noise, t), want["flow.velocity"], 1e-12)
    eps = process.eps("velocity", -out, x, t)
    close(eps, want["flow.noise_of_velocity"], 1e-10)
    close(-eps / s.view(-1, 1, 1, 1), want["flow.score_of_velocity"], 1e-10)
    close(-process.beta(t) / 2 / Flow.end, want["flow.drift_of_one"], 1e-10)
    close(process.g2(t) / 2 / Flow.end, want["flow.diffusion"], 1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_follow_the_flow(name):
    """Catches solvers that take every process for variance preserving: Gaussian data, where the answer is known.

    Data N(0, 0.25) have eps = sigma x / (alpha^2 / 4 + sigma^2); deterministic solvers must end at x scaled by the
    ratio of standard deviations, the others at data of standard deviation 1/2.
    """
    process = Flow()

    def eps(x, t):
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        return sigma * x / (alpha**2 / 4 + sigma**2)

    plan = SAMPLERS[name](process, steps=240)
    x = golden_input("flow.start", (40, 1, 32, 32)).double()
    out = sample(plan, x, eps, SeededNoise(0, range(40), x.shape[1:]) if plan.stochastic else None)
    if plan.stochastic:
        assert float(out.std()) == pytest.approx(0.5, rel=0.015)
    else:
        torch.testing.assert_close(out, x / 2, rtol=0, atol=0.015)


def test_layers_are_the_published_network():
    """Catches a size of the paper that is another network: parameters counted from the public code without memory.

    Published multiply-adds (Gflops) at patch 2 of 32 x 32 latents: 6.06, 23.01, 80.71, 118.64.
    """
    counted = {
        "S": (32_963_360, 6.06),
        "B": (130_512_416, 23.01),
        "L": (458_102_816, 80.71),
        "XL": (675_129_632, 118.64),
    }
    keys = json.loads((GOLDEN / "keys_dit_xl.json").read_text())
    for size, (parameters, gmacs) in counted.items():
        with torch.device("meta"):
            network = DiT(img_size=32, patch_size=2, in_chans=4, num_classes=1001, **DIT_SIZES[size])
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        assert network.macs().at(network.depth) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == keys


# ---- exits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", ["threshold", "fixed", "schedule", "similarity"])
def test_batch_equals_single_images(name, heads):
    """Catches rows that are modulated by the condition of another row after some have left."""
    settings = {"threshold": {"certainty": 0.5}, "fixed": {"layer": 2}}.get(name, {})
    used = check_batch_equals_singles(tiny_dit("time", heads), EXIT_POLICIES[name](**settings))
    assert name != "threshold" or len(set(used)) >= 3, "the exits must be spread or the test shows nothing"


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_macs_are_those_of_the_work(heads):
    """Catches modulations that are run but not charged."""
    model = tiny_dit(heads=heads, num_classes=10)
    x, t, time, cond = inputs(1, model=model)
    for k in (1, 4, 7):
        policy = EXIT_POLICIES["fixed"](layer=k)
        assert model.macs().at(k) == count_macs(lambda policy=policy: run_with_exits(model, policy, x, t, time, cond))


def test_own_heads_start_as_the_shared_one_and_learn():
    """Catches final layers that are no copies, or that the frozen backbone's training does not reach."""
    model = tiny_dit(heads="own")
    assert [type(head) for head in model.heads.values()] == [FinalLayer] * 6
    model.copy_heads()
    x, _, time, _ = inputs(3)
    shared = tiny_dit(heads="shared")
    torch.testing.assert_close(model(x, time, None).out, shared(x, time, None).out)
    model.freeze_backbone()
    model(x, time, None).out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.heads.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_positions_and_variances_do_not_train():
    """Catches a fixed table that the optimiser moves, and variances that a loss on eps would reach."""
    model = tiny_dit(learn_sigma=True)
    x, _, time, _ = inputs(3)
    model(x, time, None).out.square().sum().backward()
    assert model.backbone.pos_embed.grad is None
    of_output = model.backbone.final_layer.linear.bias.grad.view(4, 2).abs()  # (p p, 2 C), channels fastest
    assert (of_output[:, 0] > 0).all() and (of_output[:, 1] == 0).all()


def test_ase_schedule():
    """Catches another static schedule than the released one: 28, 28, 24, 24, ... 12, 12 blocks of 28."""
    model = tiny_dit(depth=28, spread=False)
    x, _, time, _ = inputs(10)
    t = (100 * torch.arange(10, dtype=torch.float64) + 50) / 1000
    used = run_with_exits(model, EXIT_POLICIES["schedule"](), x, t, time, None)[1]
    np.testing.assert_array_equal(used, np.repeat([28, 24, 20, 16, 12], 2))


def test_cache_needs_long_skips():
    """Catches old tokens that silently replace a call's own where nothing joins them."""
    with pytest.raises(ValueError, match="exit.name is 'cache', which joins"):
        EXIT_POLICIES["cache"](every=2).check(tiny_dit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(convention="flux"), "nnet.convention is 'flux'; it must be one of dit, sit"),
        (dict(embed_dim=30, num_heads=3), "nnet.embed_dim is 30; a DiT's positions need a multiple of 4"),
        (dict(depth=0), "nnet.depth is 0; it must be at least 1"),
        (dict(in_chans=-1), "nnet.in_chans is -1; it must be at least 1"),
        (dict(mlp_ratio=-2.0), "nnet.mlp_ratio is -2.0; it must be at least 0.03125"),
        (dict(patch_size=3), "nnet.img_size 8 is not a multiple of nnet.patch_size 3"),
    ],
)
def test_impossible_networks_are_refused(changes, message):
    """Catches a shape error deep inside a block."""
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_dit(**changes)


# ---- weight files ----------------------------------------------------------------------------------------------------

SMALL = dict(img_size=8, patch_size=2, in_chans=4, embed_dim=64, depth=4, num_heads=4, num_classes=11)


def small(**changes) -> EarlyExitModel:
    return EarlyExitModel(DiT(**SMALL | changes), ESTIMATORS["linear"])


def test_a_folder_of_diffusers(tmp_path):
    """Catches queries, keys and values in another order, lost modulations, and embeddings of a block that differ.

    diffusers' class takes slightly other frequencies for the time, and another epsilon for its norms, than the code
    that trained the weights; with those set right it is the same network.
    """
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=4, sample_size=8, num_embeds_ada_norm=10,
        in_channels=4, out_channels=8, norm_eps=1e-6,
    ).eval()  # fmt: skip
    first = net.transformer_blocks[0].norm1.emb
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    net.save_pretrained(tmp_path / "transformer")
    model = small()
    assert "diffusers_dit weights" in checkpoints.load_weights(model, tmp_path, start=True)
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, time = golden_input("dit.x", (4, 4, 8, 8)), torch.tensor([999.0, 500.0, 20.0, 0.0])
    with torch.no_grad():
        close(model.backbone(x, time, LABELS), net(x, time, LABELS).sample[:, :4], 1e-5)
    text = "\n".join(inspect_checkpoint.describe(tmp_path))
    assert "nnet.num_classes = 11" in text and "nnet.img_size = 8" in text and "nnet.num_heads = 4" in text
    with pytest.raises(ValueError, match="config.json has sample_size 8 instead of 16"):
        checkpoints.load_weights(small(img_size=16), tmp_path, start=True)
    net.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data += 1
    net.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"transformer_blocks.2.norm1.emb.class_embedder.* differs from block 0's"):
        checkpoints.load_weights(model, tmp_path, start=True)


def test_a_training_state_of_the_public_code(tmp_path):
    """Catches raw weights taken where the averaged ones stand beside them."""
    state = checkpoints.export(small().state_dict(), "dit")
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "ema": averaged, "opt": {}, "args": None}, tmp_path / "0400000.pt")
    model = small()
    checkpoints.load_weights(model, tmp_path / "0400000.pt", full_depth=True)
    assert torch.equal(model.backbone.x_embedder.proj.bias, averaged["x_embedder.proj.bias"])


def test_a_file_of_another_network_names_the_experiment(tmp_path):
    """Catches a message that leaves people searching: a DiT's file in a U-ViT's experiment, and the reverse."""
    with torch.device("meta"):
        shape = SMALL | DIT_SIZES["XL"] | dict(img_size=64, depth=2)
        state = checkpoints.export(EarlyExitModel(DiT(**shape), ESTIMATORS["linear"]).state_dict(), "dit")
    state = {key: torch.zeros(1, dtype=torch.int8).expand(value.shape) for key, value in state.items()}
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"it is a dit and nnet.name is 'uvit'; take configs/imagenet512_dit_xl.py"):
        checkpoints.load_weights(tiny(), tmp_path / "dit.pt")
    checkpoints.write_weights(tiny().state_dict(), tmp_path / "uvit.pth")
    with pytest.raises(ValueError, match=r"it is a uvit and nnet.name is 'dit'; take configs/\*_uvit_\*.py"):
        checkpoints.load_weights(small(), tmp_path / "uvit.pth")
    checkpoints.write_weights(checkpoints.export(small().state_dict(), "dit"), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="nnet.img_size: 8 in the file, 16 in the config"):
        checkpoints.load_weights(small(img_size=16), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="layout dit holds a DiT or SiT"):
        checkpoints.export(tiny().state_dict(), "dit")


@pytest.mark.parametrize("uem", ESTIMATORS)
def test_settings_are_read_from_own_files(uem):
    """Catches a trained DiT that cannot be told from another by its file."""
    model = EarlyExitModel(DiT(**SMALL | dict(learn_sigma=False)), ESTIMATORS[uem], heads="own", points=(1, 3))
    found = checkpoints.infer(model.state_dict())
    config = base.config("dit")
    config.update_from_flattened_dict(found)
    twin = build_model(config)
    assert found["uem.name"] == uem and twin.points == model.points
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
