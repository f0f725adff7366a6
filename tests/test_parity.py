"""Numbers recorded from the public implementations (tests/golden): networks, exits, losses, processes, samplers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from libs import checkpoints as weights
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.losses import Objective
from libs.models import ESTIMATORS, AllExits, EarlyExitModel, UViT
from libs.models.backbone import Tokens
from libs.models.uvit import time_embedding
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.plans import sample
from libs.sampling.solvers import SAMPLERS
from sde import PROCESSES, VPLinear
from tests.golden.recipe import golden_input, golden_weights, toy_eps

GOLDEN = Path(__file__).parent / "golden"
CASES = {kind: json.loads((GOLDEN / f"{kind}_configs.json").read_text()) for kind in ("uvit", "adadiff", "uva")}
LABELS = {"uvit": (0, 3, 5, 7, 9, 10), "adadiff": (0, 4, 9, 10), "uva": (0, 4, 9, 10)}
f8 = torch.float64


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest recorded number."""
    assert got.shape == want.shape
    error = float((got.detach().double() - want.double()).abs().max() / want.double().abs().max())
    assert error < tolerance, f"relative error {error:.1e}"


def backbone(kind: str, case: str) -> UViT:
    """The network of a recorded case, initialised."""
    settings = dict(CASES[kind][case]["config"])
    if case.startswith("t2i"):
        settings.setdefault("clip_dim", 768)
    if kind == "uva":
        settings["depth"] -= 1  # theirs counts the middle block
        settings["time_scale"] = 1e-3 if settings.pop("normalize_timesteps") else 1.0
    return UViT(**settings)


def conditions(kind: str, case: str, network: UViT) -> Tensor | None:
    if network.num_classes:
        return torch.tensor(LABELS[kind])
    if network.context_shape:
        return golden_input(f"{kind}.context", (len(LABELS[kind]), *network.context_shape))
    return None


def recorded_uvit(case: str) -> UViT:
    network = backbone("uvit", case)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert len(shapes) == CASES["uvit"][case]["keys"]
    network.load_state_dict(golden_weights(shapes))
    return network.eval().requires_grad_(False)


def released(kind: str, case: str) -> EarlyExitModel:
    """A recorded early-exit network. Its weights come through the loader, under the names that the file would have."""
    network = backbone(kind, case)
    if kind == "adadiff":
        model = EarlyExitModel(network, ESTIMATORS["linear"], norm=False)
    else:
        uem = ESTIMATORS["attention_probe" if case == "attention" else "probe"]
        model = EarlyExitModel(network, uem, points=range(network.depth), heads="own")
    theirs = weights.export(model.state_dict(), kind)
    assert len(theirs) == CASES[kind][case]["keys"]
    state = golden_weights({key: value.shape for key, value in theirs.items()})
    assert weights.kind(state) == kind
    model.load_state_dict(weights.to_ours(state))
    return model.eval().requires_grad_(False)


def test_the_random_stream_is_the_recorded_one():
    """If this fails, the other tests say nothing about the code: the recipe draws other numbers on this machine."""
    want = arrays("recipe")
    shapes = {key: value.shape for key, value in backbone("uvit", "uncond").state_dict().items()}
    state = golden_weights(shapes)
    for key in want:
        if key.startswith("keys_sum."):
            weight = state[key.removeprefix("keys_sum.")].double()
            torch.testing.assert_close(torch.stack([weight.sum(), weight.square().sum()]), want[key], rtol=1e-6, atol=0)
    assert torch.equal(golden_input("uvit.x", (6, 3, 8, 8)).flatten()[:8], want["input.uvit.x.first8"])


# ---- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["uvit"])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_uvit_forward(case, attention):
    """Catches wrong token order, skip pairing, concatenation, patch layout, head order, GELU, scale or epsilon."""
    want, network = arrays("uvit"), recorded_uvit(case)
    for block in network.blocks:
        block.attn.backend = attention
    x = golden_input("uvit.x", (6, network.channels, network.img_size, network.img_size))
    cond = conditions("uvit", case, network)
    close(network(x, want["timesteps"], cond), want[f"{case}.out.f32"], 1e-5)
    if f"{case}.out.f64" in want:
        close(network.double()(x.double(), want["timesteps"], cond), want[f"{case}.out.f64"], 1e-12)


def test_sinusoid():
    """Catches sines before cosines and frequencies with half - 1 in place of half."""
    want = arrays("uvit")
    for dim in (64, 7):
        close(time_embedding(want["timesteps"], dim), want[f"sinusoid.{dim}"], 1e-6)


@pytest.mark.parametrize("case", CASES["adadiff"])
def test_adadiff_forward_and_exits(case):
    """Every prediction and certainty map, and the layers that the released rule ran, alone and in a batch of four.

    Catches an estimator that reads other tokens or is indexed by another block, a sign, and another patience.
    """
    want, model = arrays("adadiff"), released("adadiff", case)
    x = golden_input("adadiff.x", (4, model.backbone.channels, 8, 8))
    time, cond = want["timesteps"], conditions("adadiff", case, model.backbone)
    exits = model(x, time, cond)
    close(exits.out, want[f"{case}.preds"], 1e-5)
    close(1 - exits.u, want[f"{case}.certainty"], 1e-5)

    for i, threshold in enumerate(want[f"{case}.thresholds"].tolist()):
        policy = EXIT_POLICIES["released_batch_mean"](
            certainty=max(threshold, 1e-9),  # 0 leaves at the first chance
            second_in_first_half=case != "t2i",
        )
        for rows in [*([j] for j in range(4)), range(4)]:
            rows = list(rows)
            some = None if cond is None else cond[rows]
            out, used = run_with_exits(model, policy, x[rows], time[rows].double() / 999, time[rows], some)
            recorded = want[f"{case}.executed_alone"][i, rows] if len(rows) == 1 else want[f"{case}.executed_batch"][i]
            assert (used == recorded.numpy()).all()
            close(out, want[f"{case}.preds"][used[0] - 1, rows], 1e-5)


@pytest.mark.parametrize("case", CASES["uva"])
def test_uva_forward_and_exits(case):
    """Catches probes at block outputs, heads off by one, the missing time token in the mean, t in place of t / 1000."""
    want, model = arrays("uva"), released("uva", case)
    x = golden_input("uva.x", (4, 3, 8, 8))
    time, cond = want["timesteps"].float(), conditions("uva", case, model.backbone)
    exits = model(x, time, cond)
    close(exits.out[-1], want[f"{case}.out"], 1e-5)
    if case == "attention":  # it is not bounded; u is
        close(scores(model, x, time), want[f"{case}.uncertainty"], 1e-5)
    close(exits.u[:-1], want[f"{case}.uncertainty"].clamp(0, 1), 1e-5)
    if f"{case}.heads" in want:
        close(exits.out[:-1], want[f"{case}.heads"], 1e-5)
    for i, threshold in enumerate(want[f"{case}.thresholds"].tolist()):
        policy = EXIT_POLICIES["threshold"](certainty=min(max(1 - threshold, 1e-9), 1.0))
        out, used = run_with_exits(model, policy, x, time.double() / 1000, time, cond)
        assert used.tolist() == want[f"{case}.exit_index"][i].tolist()
        close(out, torch.stack([exits.out[k, j] for j, k in enumerate(used)]), 1e-5)


def scores(model: EarlyExitModel, x: Tensor, time: Tensor) -> Tensor:
    """(K, B): what the attention probes say before each layer."""
    carry, values = model.embed(x, time, None), []
    for k in range(model.depth):
        values.append(model.uem.score(k, model.backbone.all_tokens(carry)))
        carry = model.layer(k, carry)
    return torch.stack(values)


def test_first_files_of_the_replication():
    """Catches the probe of the middle block, which the public code never ran, and times that it did not divide yet."""
    want, network = arrays("uva"), backbone("uva", "attention")
    model = EarlyExitModel(network, ESTIMATORS["attention_probe"], points=range(network.depth), heads="own")
    half, old = network.depth // 2, {}
    for key, value in weights.export(model.state_dict(), "uva").items():
        k, _, rest = key.removeprefix("matrix.").partition(".")
        if not key.startswith("matrix."):
            old[key] = value
        elif int(k) < half:
            old[f"in_blocks_classifiers.{k}.{rest}"] = value
        elif int(k) == half:
            old[f"mid_block_classifier.{rest}"] = value
        else:
            old[f"out_blocks_classifiers.{int(k) - half - 1}.{rest}"] = value
    assert len(old) == 133  # of the public class
    state = golden_weights({key: value.shape for key, value in old.items()})
    found = weights.infer(state)
    assert (found["uem.name"], found["nnet.time_scale"], found["nnet.points"]) == (
        "attention_probe",
        1.0,
        (0, 1, 2, 3, 4),
    )
    model.load_state_dict(weights.to_ours(state))
    network.time_scale = found["nnet.time_scale"]
    model.eval().requires_grad_(False)
    x, time = golden_input("uva.x", (4, 3, 8, 8)), want["timesteps"].float()
    exits = model(x, time, None)
    close(exits.out[-1], want["old_attention.out"], 1e-5)
    close(exits.out[:-1], want["old_attention.heads"], 1e-5)
    close(scores(model, x, time), want["old_attention.uncertainty"], 1e-5)


def test_size_of_an_attention_probe():
    """The number that the public code states for a width of 512."""
    tokens = [Tokens(n=256, width=512, patch_dim=12, extras=1)] * 2
    probe = ESTIMATORS["attention_probe"](tokens, (0, 1))
    assert sum(value.numel() for value in probe.parameters()) == 788_993


# ---- losses --------------------------------------------------------------------------------------------------------

# A term on its own: the objective with the term, minus the objective without it.
TERMS = {
    "simple": (dict(lambda_u=0, lambda_layers=0), None),
    "uem": (dict(lambda_layers=0), dict(lambda_u=0, lambda_layers=0)),
    "ual": (dict(lambda_u=0), dict(lambda_u=0, lambda_layers=0)),
}


def term(name: str, *batch, weights="adadiff", **options) -> Tensor:
    with_it, without = TERMS[name]
    value = Objective(weights=weights, **options, **with_it)(*batch)[0]
    return value if without is None else value - Objective(weights=weights, **options, **without)(*batch)[0]


@pytest.mark.parametrize("name", TERMS)
def test_released_losses(name):
    """AdaDiff's three terms per image and what they pull on. Catches sums for means and stops in the wrong place."""
    want = arrays("losses")
    out = golden_input("loss.preds", (4, 3, 2, 4, 4)).double().requires_grad_()
    u = (1 - golden_input("loss.certainty", (4, 3, 2, 4, 4)).double().sigmoid()).requires_grad_()
    noise = golden_input("loss.noise", (3, 2, 4, 4)).double()
    exits = AllExits(points=(1, 2, 3, 4), out=out, u=u)
    loss = term(name, exits, VPLinear(), "noise", torch.zeros_like(noise), noise, torch.full((3,), 0.5, dtype=f8))
    close(loss, want[f"terms.{name}"], 1e-6)
    loss.mean().backward()
    for got, recorded in ((out.grad, "grad_preds"), (-u.grad, "grad_certainty")):
        reference = want[f"terms.{name}.{recorded}"]
        if reference.any():
            close(got, reference, 1e-6)
        else:
            assert got is None or not got.any()


def test_released_losses_of_a_network():
    """The same through a network: x_t, the time unit, the total, and the gradient that reaches backbone and heads."""
    want = arrays("losses")
    network = UViT(img_size=8, patch_size=2, in_chans=3, embed_dim=64, depth=4, num_heads=4)
    model = EarlyExitModel(network, ESTIMATORS["linear"], norm=False)
    shapes = {key: value.shape for key, value in weights.export(model.state_dict(), "adadiff").items()}
    model.load_state_dict(weights.to_ours(golden_weights(shapes)))
    x0, noise = golden_input("loss.x0", (4, 3, 8, 8), 0.5), golden_input("loss.eps", (4, 3, 8, 8))
    process, t = VPLinear(), want["net.t"]
    x = process.noised(x0, t, noise)
    close(x, want["net.xt.f32"], 1e-6)

    def losses(objective: Callable) -> Tensor:
        exits = model(x, process.network_time(t).float())
        return objective(exits, process, "noise", x0, noise, t)

    close(losses(Objective(weights="adadiff"))[0], want["net.total.f32"], 1e-6)
    for name in TERMS:
        loss = losses(lambda *batch, name=name: term(name, *batch))
        close(loss, want[f"net.{name}.f32"], 1e-6)
        model.zero_grad()
        loss.mean().backward()
        for part, module in (("backbone", model.backbone), ("uem", model.uem)):
            grads = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
            norm = float(torch.stack(grads).sum().sqrt()) if grads else 0.0
            recorded = float(want[f"net.{name}.grad_norm_{part}.f32"])
            assert norm == pytest.approx(recorded, rel=1e-5, abs=1e-9)


def test_replication_losses():
    """The replication's terms and what they pull on: the fit of u, with its target not stopped, the weights that are
    the target itself, and the fourth loss, unweighted. Its fit is a sum over exits and images, ours a mean.
    """
    want = arrays("uva")
    heads, output = golden_input("loss.preds", (4, 3, 2, 4, 4)).double(), golden_input("uva.loss.output", (3, 2, 4, 4))
    out = torch.cat([heads, output[None].double()]).requires_grad_()
    u = golden_input("uva.loss.uncertainty", (4, 3)).double().sigmoid().requires_grad_()
    noise = golden_input("loss.noise", (3, 2, 4, 4)).double()
    exits = AllExits(points=(0, 1, 2, 3, 4), out=out, u=torch.cat([u, torch.zeros(1, 3, dtype=f8)]))
    batch = (exits, VPLinear(), "noise", torch.zeros_like(noise), noise, torch.full((3,), 0.5, dtype=f8))
    assert float(term("simple", *batch).mean().detach()) == pytest.approx(float(want["loss.simple"]), rel=1e-6)
    layers = (term("ual", *batch, weights="unweighted") - term("simple", *batch)).mean()
    assert float(layers.detach()) == pytest.approx(float(want["loss.unweighted"]), rel=1e-6)
    grad = torch.autograd.grad(layers, out, retain_graph=True)[0]
    close(grad[:-1], want["loss.unweighted.grad_preds"], 1e-6)
    last = (out[-1] - noise).abs().tanh().flatten(1).mean(1).square()  # no probe at full depth: u = 0
    fit = 5 * term("uem", *batch) - last.detach()
    assert float(fit.sum().detach()) == pytest.approx(float(want["loss.uem_sum"]), rel=1e-6)
    close(torch.autograd.grad(fit.sum(), u)[0], want["loss.uem_sum.grad_uncertainty"], 1e-6)

    fit = 5 * term("uem", *batch, stop_target=False)
    close(torch.autograd.grad(fit.sum(), out)[0][:-1], want["loss.uem_sum.grad_preds"], 1e-6)
    gap = (out[-1] - noise).abs().tanh().flatten(1).mean(1)
    weighted = term("ual", *batch, weights="measured", stop_target=False) - (1 - gap) * term("simple", *batch)
    assert float(weighted.mean().detach()) == pytest.approx(float(want["loss.ual"]), rel=1e-6)
    close(torch.autograd.grad(weighted.mean(), out, retain_graph=True)[0][:-1], want["loss.ual.grad_preds"], 1e-6)
    assert not want["loss.ual.grad_uncertainty"].any()


# ---- processes -----------------------------------------------------------------------------------------------------


def test_process_values():
    """Catches any other schedule, and beta or drift by a factor."""
    want = arrays("process")
    linear, cosine, sd = (PROCESSES[name]() for name in ("vp_linear", "vp_cosine", "sd"))
    inside = want["t"][:-1][want["t"][:-1] <= cosine.t_cap]  # beyond, ours is capped where the released one blows up
    for name, process, t in (
        ("vp_linear", linear, want["t"]),
        ("vp_cosine", cosine, inside),
        ("sd", sd, want["sd.n"].double() / 1000),
    ):
        alpha2, sigma2 = process.alpha(t) ** 2, process.sigma(t) ** 2
        values = {"cum_alpha": alpha2, "cum_beta": sigma2, "snr": alpha2 / sigma2, "nsr": sigma2 / alpha2}
        if name != "sd":  # the discrete schedule's beta_n is no slope
            values |= {"beta": process.beta(t), "drift_of_one": -process.beta(t) / 2}
        for key, got in values.items():
            if f"{name}.{key}" in want:
                torch.testing.assert_close(got, want[f"{name}.{key}"][: len(t)], rtol=1e-9, atol=1e-15)


def test_solver_schedules():
    """Between the levels too, where DPM-Solver calls a discrete model. Below level 1 ours ends at alpha = 1."""
    want = arrays("process")
    for name in ("vp_linear", "sd"):
        process = PROCESSES[name]()
        held = want["solver.t"] >= process.t_min
        t = want["solver.t"][held]
        for key, got in (
            ("log_alpha", process.log_alpha(t)),
            ("lambda", process.lam(t)),
            ("sigma", process.sigma(t)),
        ):
            torch.testing.assert_close(got, want[f"solver.{name}.{key}"][held], rtol=1e-9, atol=1e-12)
        times = want[f"solver.{name}.t_of_lambda"]
        held = (times >= process.t_min) & (times <= 1)
        assert held.sum() >= 3
        got = process.t_of_lam(want["solver.lambda_in"])
        torch.testing.assert_close(got[held], times[held], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pred", ["noise", "x0"])
def test_conversions(pred):
    """noise, x0 and score from a network's output, and the time it was given."""
    want, process = arrays("process"), VPLinear()
    t, out, x = want["convert.t"], *(golden_input(f"process.{name}", (4, 2, 3, 3)).double() for name in ("out", "x"))
    eps = process.eps(pred, out, x, t)
    for name, got in (
        ("eps", eps),
        ("x0", process.x0(eps, x, t)),
        ("score", -eps / process.sigma(t).view(-1, 1, 1, 1)),
    ):
        close(got, want[f"convert.{pred}_pred.{name}"], 1e-9)
    torch.testing.assert_close(process.network_time(t), want["convert.network_time"])


# ---- samplers ------------------------------------------------------------------------------------------------------

TIGHT = 1e-11  # float64
# Recorded float32 runs computed their tables in float32 too: near t = 1e-4 that costs dpm_solver up to 2e-4 in ten
# steps. Ours are in float64, so our float32 runs are also held against the recorded float64 ones, to 1e-5.
RECORDED_IN_F32 = 2e-4
ALGORITHMS = {
    "em_ode": ("euler_maruyama_ode", "vp_linear", {}),
    "em_sde": ("euler_maruyama_sde", "vp_linear", {}),
    "dpm_solver": ("dpm_solver", "vp_linear", {}),
    "dpm_solver_pp": ("dpm_solver_pp", "sd", {}),
    "dpm_solver_1_time_uniform": ("ddim", "vp_linear", {}),
    "dpm_solver_pp_1_time_uniform": ("dpm_solver_pp", "sd", {"order": 1}),
    "dpm_solver_pp_2m_time_uniform": ("dpm_solver_pp_2m", "sd", {"lower_order_final": False}),
    "dpm_solver_pp_2m_logsnr": ("dpm_solver_pp_2m", "sd", {"lower_order_final": False, "skip": "logsnr"}),
}


class RecordedNoise:
    """The noise of step k by name, in place of a seed's."""

    def __init__(self, name: str, shape, dtype, first: int = 0):
        self.name, self.shape, self.dtype, self.k = name, shape, dtype, first

    def draw(self) -> Tensor:
        self.k += 1
        return golden_input(f"{self.name}.{self.k - 1}", self.shape).to(self.dtype)


def recorded_runs(who: str) -> list[str]:
    return sorted(key.removesuffix(".x") for key in arrays(f"samplers_{who}") if key.endswith(".x"))


def recorded_plan(run: str):
    """(plan, process name, guided, dtype) of <who>.<sampler>[_guided].<evaluations>.<dtype>"""
    _, name, steps, dtype = run.split(".")
    guided = name.endswith("_guided")
    algorithm, process, options = ALGORITHMS[name.removesuffix("_guided")]
    if name == "dpm_solver_1_time_uniform":
        plan = SAMPLERS["dpm_solver_pp"](PROCESSES[process](), steps=int(steps), order=1)  # order 1 is DDIM in both
    else:
        plan = SAMPLERS[algorithm](PROCESSES[process](), steps=int(steps), **options)
    return plan, process, guided, torch.float64 if dtype == "f64" else torch.float32


def check_trajectory(run: str, want: dict, plan, x: Tensor, eps_fn: Callable, tolerance: float) -> None:
    times, inputs = [], []

    def recording(x, t):
        times.append(t[0])
        inputs.append(x)
        return eps_fn(x, t)

    noise = RecordedNoise("sampler.noise", x.shape, x.dtype) if plan.stochastic else None
    got = sample(plan, x, recording, noise)
    close(got, want[f"{run}.x"], tolerance)
    if f"{run}.t" in want:
        close(torch.stack(times), want[f"{run}.t"], TIGHT if x.dtype == f8 else RECORDED_IN_F32)
    if f"{run}.middle" in want:
        close(inputs[len(inputs) // 2], want[f"{run}.middle"], tolerance)
    if x.dtype != f8:
        close(got, want[f"{run.removesuffix('f32')}f64.x"], 1e-5)


@pytest.mark.parametrize("run", recorded_runs("toy"))
def test_trajectories_on_exact_predictions(run):
    """Every solver's times, middle state and end: catches any other coefficient or grid."""
    want = arrays("samplers_toy")
    plan, process, guided, dtype = recorded_plan(run)
    labels, scale = want["toy.labels"], float(want["guidance_scale"])

    def eps_fn(x, t):
        if not guided:
            return toy_eps(x, t, process)
        cond, null = toy_eps(x, t, process, labels), toy_eps(x, t, process)
        return cond + scale * (cond - null)

    x = golden_input("sampler.x", (4, 2, 4, 4)).to(dtype)
    check_trajectory(run, want, plan, x, eps_fn, TIGHT if dtype == f8 else RECORDED_IN_F32)


@pytest.mark.parametrize("run", recorded_runs("net"))
def test_trajectories_of_a_network(run):
    """The same through the conditional U-ViT; float32 runs go through the denoiser that evaluation uses."""
    want = arrays("samplers_net")
    plan, process, guided, dtype = recorded_plan(run)
    labels, null = want["net.labels"], torch.full((2,), 10)
    scale = float(want["guidance_scale"]) if guided else 0.0
    process, network = PROCESSES[process](), recorded_uvit("cond").to(dtype)
    x = golden_input("sampler.x", (2, 4, 8, 8)).to(dtype)
    if dtype == f8:

        def eps_fn(x, t):
            time = process.network_time(t).float()
            cond = network(x, time, labels)
            return cond + scale * (cond - network(x, time, null)) if guided else cond
    else:
        model = EarlyExitModel(network, ESTIMATORS["linear"])
        guidance = Guidance(scale)
        eps_fn = Denoiser(model, process, "noise", EXIT_POLICIES["full"](), cond=labels, null=null, guidance=guidance)
    with torch.no_grad():
        check_trajectory(run, want, plan, x, eps_fn, TIGHT if dtype == f8 else 1e-4)


@pytest.mark.parametrize("name", ["em_ode", "em_ode_guided", "dpm_solver", "dpm_solver_guided"])
def test_released_sampling_with_exits(name):
    """Ten evaluations with the released rule: the layers of every call and the final image.

    Each image alone, as recorded, and both together with the rule applied per image. Catches a batch mean over the
    guidance halves, which the released code runs one after the other, and counts of crossings that mix images.
    """
    want, run = arrays("adadiff_sampling"), f"{name}.10"
    model, process = EarlyExitModel(backbone("uvit", "cond"), ESTIMATORS["linear"], norm=False), VPLinear()
    shapes = {key: value.shape for key, value in weights.export(model.state_dict(), "adadiff").items()}
    model.load_state_dict(weights.to_ours(golden_weights(shapes)))
    plan = SAMPLERS[ALGORITHMS[name.removesuffix("_guided")][0]](process, steps=10)
    x = golden_input("sampler.x", (2, 4, 8, 8))
    for rows in ([0], [1], [0, 1]):
        denoiser = Denoiser(
            model.eval(),
            process,
            "noise",
            EXIT_POLICIES["released_batch_mean"](certainty=float(want[f"{run}.threshold"]), per_image=len(rows) > 1),
            cond=want["labels"][rows],
            null=torch.full((len(rows),), 10),
            guidance=Guidance(0.4 if name.endswith("guided") else 0.0),
        )
        with torch.no_grad():
            got = sample(plan, x[rows], denoiser)
        np.testing.assert_array_equal(denoiser.trace.used, want[f"{run}.used"][:, :, rows].numpy())
        close(got, want[f"{run}.x"][rows], RECORDED_IN_F32)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ancestral_sampling_of_the_replication(variance):
    """DDPM's thousand steps in float64: catches an index shifted by one and noise in the last step."""
    want, process = arrays("uva"), PROCESSES["ddpm"]()
    n = want["ddpm.n"].double()
    torch.testing.assert_close(process.alpha((n + 1) / 1000) ** 2, want["ddpm.alphas_bar"], rtol=1e-6, atol=0)
    torch.testing.assert_close(process.network_time((n + 1) / 1000), n)
    plan = SAMPLERS["ddpm"](process, steps=1000, variance=variance)
    key = "ddpm.beta" if variance == "beta" else "ddpm.beta_tilde"
    noise, middle = RecordedNoise("uva.noise", (4, 2, 4, 4), f8), []

    def eps_fn(x, t):
        if abs(float(t[0]) - 0.5) < 1e-9:
            middle.append(x)
        return toy_eps(x, t, "vp_linear")

    got = sample(plan, noise.draw(), eps_fn, noise)
    with pytest.raises(ValueError, match="variance is 'large'"):
        SAMPLERS["ddpm"](process, steps=1000, variance="large")
    close(middle[0], want[f"{key}.middle"], TIGHT)
    close(got, want[f"{key}.x"], TIGHT)
