"""Exit 0: the closed form, the moments it is made of, and what runs where an image leaves there."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny
from test_training import CONFIG, SMALL, finish, start

from configs import digits_uvit_tiny
from libs import Sampler, checkpoints, regimes
from libs.analysis.budget import spend
from libs.checkpoints.infer import infer
from libs.codecs import KL, Identity
from libs.data import DATASETS
from libs.data.moments import moments
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.losses import Depths, Objective
from libs.models import EarlyExitModel, UViT, build_model, gaussian
from libs.models.gaussian import Gaussian, by_class, gathered
from libs.models.uem import Linear
from sde import PROCESSES, VPLinear

SHAPE = (1, 4, 4)


def covariances(n: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(n, 16, 20, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.transpose(1, 2) / 20


def fitted(n_labels=3, rank=16, process=None, pred="x0", n_classes=3):
    found = Gaussian(SHAPE, n_labels, rank, process or VPLinear(), pred)
    means = torch.randn(n_classes, 16, generator=torch.Generator().manual_seed(1)).double()
    found.fit(torch.tensor([10, 20, 30][:n_classes]), means, covariances(n_classes))
    return found, means


def posterior_mean(x, alpha, sigma, mean, covariance):
    """E[x0 | x] of a Gaussian by a dense inverse."""
    precision = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(len(mean)).double())
    return mean + alpha * covariance @ precision @ (x.flatten().double() - alpha * mean)


# ---- the closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_it_is_the_posterior_mean(name):
    """Catches another class's statistics, a wrong weight, a time that is not the process's own, another output kind."""
    process = PROCESSES[name]()
    x, t = torch.randn(4, *SHAPE), torch.tensor([0.9, 0.5, 0.5, 0.1]).double()
    time, labels = process.network_time(t).float(), torch.tensor([0, 1, 2, 1])
    assert torch.allclose(process.of_network_time(process.network_time(t)), t, atol=1e-12)
    for pred in process.predictions:
        own, means = fitted(process=process, pred=pred)
        x0 = process.x0(process.eps(pred, own(x, time, labels), x, t), x, t)
        for i, c in enumerate(labels):
            wanted = posterior_mean(x[i], process.alpha(t[i]), process.sigma(t[i]), means[c], covariances(3)[c])
            assert (x0[i].flatten() - wanted).abs().max() < 3e-4, (pred, i)


def test_a_gather_is_the_product_per_class():
    """Catches a GPU that denoises with other Gaussians than a CPU."""
    d, w, basis = torch.randn(7, 12), torch.rand(7, 5), torch.randn(4, 12, 5)
    which = torch.tensor([3, 0, 0, 2, 3, 0, 2])  # none of class 1
    assert torch.allclose(gathered(d, w, basis, which), by_class(d, w, basis, which), atol=1e-5)


def test_fewer_directions_keep_the_variance():
    """Catches a remainder that is dropped: then its directions would be the mean's, however little noise there is."""
    own, _ = fitted(rank=4)
    values = torch.linalg.eigvalsh(covariances(3))
    assert torch.allclose(own.rest.double(), values[:, :12].mean(1), rtol=1e-5)
    assert torch.allclose(own.variance.double(), values[:, 12:], rtol=1e-4)
    x = torch.randn(3, *SHAPE)
    x0 = own(x, VPLinear().network_time(torch.full((3,), 1e-3)), torch.arange(3))
    assert (x0 - x).abs().max() < 0.05  # almost no noise: the image itself


def test_the_null_class_is_every_image():
    """Catches guidance away from one class, or from the spread within classes alone."""
    own, means = fitted(n_labels=4)
    share = torch.tensor([1, 2, 3]).double() / 6
    mean = (share[:, None] * means).sum(0)
    second = (share[:, None, None] * (covariances(3) + means[:, :, None] * means[:, None])).sum(0)
    x, process, t = torch.randn(1, *SHAPE), VPLinear(), torch.tensor([0.4]).double()
    x0 = own(x, process.network_time(t).float(), torch.tensor([3]))
    wanted = posterior_mean(x[0], process.alpha(t), process.sigma(t), mean, second - mean[:, None] * mean)
    assert (x0.flatten() - wanted).abs().max() < 3e-4


def test_many_classes_share_what_varies_within_them(monkeypatch):
    """Catches a shared covariance that holds the distances between the classes, and a null class that does not."""
    monkeypatch.setattr(gaussian, "PER_CLASS", 0)
    data = DATASETS["digits"]()
    own = Gaussian(data.shape, 11, 64, VPLinear(), "x0")
    own.fit(*moments(data, Identity(), 10, shared=own.shared))
    x = data.gather(torch.arange(len(data)), torch.zeros(len(data), dtype=torch.bool))[0].flatten(1).double()
    within = x - own.mean.double()[data.labels]
    for i, of in enumerate((within, x)):
        assert float(own.variance[i].sum()) == pytest.approx(float(of.var(0, correction=0).sum()), rel=1e-5)
    assert own.basis_of.tolist() == [0] * 10 + [1]


def test_moments_are_those_of_the_images():
    """Catches images that are left out or counted twice, in another order of classes."""
    data = DATASETS["digits"]()
    counts, means, spread = moments(data, Identity(), 10)
    x = data.gather(torch.arange(len(data)), torch.zeros(len(data), dtype=torch.bool))[0].flatten(1).double()
    for c in (0, 7):
        of = x[data.labels == c]
        assert counts[c] == len(of) and torch.allclose(means[c], of.mean(0))
        assert torch.allclose(spread[c], torch.cov(of.T, correction=0), atol=1e-9)
    counts, means, _ = moments(data, Identity(), 0, flip=True)
    assert counts.tolist() == [2 * len(data)]
    image = means[0].view(8, 8)
    assert torch.allclose(image, image.flip(1)) and torch.allclose(
        image, (x.mean(0).view(8, 8) + image.flip(1)) / 2, atol=1
    )


def test_moments_of_latents_hold_their_noise():
    """Catches latents that are taken at their mean: what a network is trained on also varies by the stored variance."""
    data = DATASETS["synthetic_latents"](size=4, n_classes=2)
    codec = KL(path="random", channels=(8, 16), layers=1, groups=4)
    _, means, spread = moments(data, codec, 0)
    stored = data.gather(torch.arange(len(data)), torch.zeros(len(data), dtype=torch.bool))[0].float()
    mean, logvar = stored.chunk(2, 1)
    latents = codec.scale * mean.flatten(1).double()
    added = codec.scale**2 * logvar.exp().flatten(1).mean(0).double()
    assert torch.allclose(means[0], latents.mean(0), atol=5 * float(added.max().sqrt()) / len(data) ** 0.5)
    assert float(spread[0].trace()) > float(latents.var(0, correction=0).sum())


@pytest.mark.parametrize("rank, shape", [(17, SHAPE), (-1, SHAPE), (8, (3, 64, 64))])
def test_ranks_that_there_are_not(rank, shape):
    with pytest.raises(ValueError, match=f"nnet.gaussian is {rank}"):
        Gaussian(shape, 1, rank, VPLinear(), "x0")


@pytest.mark.parametrize("process", PROCESSES)
def test_a_network_is_described_without_memory(process):
    """Catches a process that is made on the meta device, where its tables have no numbers (inspect_checkpoint)."""
    config = digits_uvit_tiny.get_config("quick")
    config.nnet.gaussian, config.process = 8, process
    config.pred = PROCESSES[process]().predictions[0]
    with torch.device("meta"):
        assert build_model(config).points[0] == 0


def test_a_gaussian_dearer_than_a_layer_is_refused():
    """Catches an exit 0 that costs more than exit 1, which no budget is made for."""
    config = digits_uvit_tiny.get_config("quick")
    config.nnet.update(gaussian=64, embed_dim=4, num_heads=2, mlp_ratio=1)
    with pytest.raises(ValueError, match="nnet.gaussian is 64, whose 8,192 MACs"):
        build_model(config)


# ---- as an exit ----------------------------------------------------------------------------------------------------


def with_gaussian(points=(), heads="own", n_labels=3) -> EarlyExitModel:
    torch.manual_seed(0)
    network = UViT(
        img_size=4, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=4, num_classes=n_labels, init="xavier"
    )
    model = EarlyExitModel(network, Linear, points=points, heads=heads, gaussian=fitted(n_labels, pred="noise")[0])
    for parameter in model.uem.parameters():
        parameter.data += 2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def test_exit_0_is_one_of_the_exits():
    """Catches a head of its own at exit 0, which training would never use, and costs of the network's head."""
    model = with_gaussian()
    assert model.points == (0, 1, 2, 3) and sorted(model.heads) == ["1", "2"]
    assert with_gaussian(points=(2,)).points == (0, 2, 3)
    macs = model.macs()
    assert macs.head[0] == 2 * 16 * 16 and macs.at(0) < macs.at(1)
    x, time, labels = torch.randn(5, *SHAPE), torch.full((5,), 500.0), torch.arange(5) % 3
    exits = model(x, time, labels)
    assert torch.equal(exits.out[0], model.gaussian(x, time, labels)) and exits.u.shape[:2] == (4, 5)


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_some_images_leave_before_the_first_layer(heads):
    """Catches images that get another's x or label at exit 0, and rows out of order after it."""
    model = with_gaussian(heads=heads)
    x, t, labels = torch.randn(64, *SHAPE), torch.full((64,), 0.5).double(), torch.arange(64) % 3
    time = VPLinear().network_time(t).float()
    exits = model(x, time, labels)
    policy = EXIT_POLICIES["threshold"](certainty=1 - float(exits.mean_u[0].median()))
    out, used = run_with_exits(model, policy, x, t, time, labels)
    assert 20 < (used == 0).sum() < 44
    assert policy.on(model).at == (1, 2) and replace(policy, at=(0, 2)).on(model).at == (0, 2)
    tied = replace(policy, certainty=0.3).paired("tied").on(model)
    assert tied.asked(model.points) == (1, 2) and policy.on(tiny()) is policy
    for i, k in enumerate(used):
        assert torch.allclose(out[i], exits.out[model.points.index(k), i], atol=1e-5), (i, k)


def test_a_call_of_no_layers_calls_no_network(monkeypatch):
    """Catches an embedding that is made for nobody: it costs more than the closed form."""
    model = with_gaussian()
    monkeypatch.setattr(model.backbone, "embed", None)
    x, t, labels = torch.randn(5, *SHAPE), torch.full((5,), 0.5).double(), torch.arange(5) % 3
    time = VPLinear().network_time(t).float()
    out, used = run_with_exits(model, EXIT_POLICIES["fixed"](layer=0), x, t, time, labels)
    assert torch.equal(out, model.gaussian(x, time, labels)) and not used.any()


def test_nothing_is_trained_at_exit_0():
    """Catches a batch whose deepest exit is 0: its loss has no gradient, and the training would end there."""
    config = digits_uvit_tiny.get_config("quick")
    config.nnet.gaussian = 64
    model, process, objective = build_model(config), VPLinear(), Objective(lambda_u=0.0, lambda_layers=0.0)
    config.train.depths = "random"
    depths = Depths(config, model, process, objective)
    assert {depths.draw(step, torch.rand(4).double())[0] for step in range(50)} == {(k,) for k in model.points[1:]}
    x, time, labels = torch.randn(2, *SHAPE), torch.full((2,), 500.0), torch.arange(2)
    exits = with_gaussian()(x, time, labels)
    loss, parts = Objective(weights="berxit")(exits, process, "noise", x, x, torch.full((2,), 0.5).double())
    assert torch.allclose(parts["layers"], (parts["err_1"] + parts["err_2"] + parts["err_3"]) / 3)
    config.train.depths, config.exit.name, config.exit.fixed.layer = "schedule", "fixed", 0
    assert Depths(config, model, process, objective).draw(0, torch.rand(4).double())[0] == (1,)


# ---- from training to sampling -------------------------------------------------------------------------------------


def test_a_run_takes_its_data_and_keeps_them(tmp_path):
    """Catches a Gaussian that is fitted after the EMA's copy, or again with other data, or lost in a file."""
    flags = [f"--config={CONFIG}", *SMALL, "--config.nnet.gaussian=20", "--config.train.save_interval=2"]
    first = tmp_path / "first"
    finish(start("train.py", *flags, "--config.train.n_steps=2", f"--workdir={first}"))
    _, means, _ = moments(DATASETS["digits"](), Identity(), 10)
    sampler = Sampler.load(first / "last.ckpt", device="cpu")
    assert torch.allclose(sampler.model.gaussian.mean.double(), means, atol=1e-6)
    known = infer(checkpoints.read_weights(first / "last.ckpt"))
    assert known["nnet.gaussian"] == 20 and known["nnet.points"] == ()

    finish(start("train.py", *flags, "--config.train.n_steps=3", f"--workdir={first}"))  # resumed
    again = Sampler.load(first / "last.ckpt", device="cpu").model.gaussian
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), sampler.model.gaussian.buffers(), strict=True))
    finish(
        start(
            "train.py", *flags, "--config.dataset.name=synthetic", "--config.dataset.synthetic.resolution=8",
            "--config.dataset.synthetic.channels=1", "--config.train.n_steps=1", f"--workdir={tmp_path / 'other'}",
            f"--pretrained_weight={first / 'last.ckpt'}",
        )
    )  # fmt: skip
    other = Sampler.load(tmp_path / "other" / "last.ckpt", device="cpu").model.gaussian
    assert (other.mean - again.mean).abs().max() > 0.1

    policy = EXIT_POLICIES["fixed"](layer=0)
    images = sampler(4, plan=sampler.plan(3), policy=policy, labels=[5])
    assert not images.depth.any()


def test_a_network_gets_an_exit_0_later(run):
    """Catches weights without it that a training refuses to start from, and a network without exits that it breaks."""
    config = digits_uvit_tiny.get_config("quick")
    config.nnet.gaussian = 0
    old, path = build_model(config), run.dir / "old.pth"
    checkpoints.write_weights(old.state_dict(), path)
    config.nnet.gaussian = 8
    model = build_model(config)
    said = checkpoints.load_weights(model, path, start=True)
    assert "4 estimator and head tensors start fresh" in said and torch.equal(
        model.heads["1"].norm.bias, old.heads["1"].norm.bias
    )
    with pytest.raises(ValueError, match="--config.nnet.gaussian=0"):
        checkpoints.load_weights(model, path)
    for uem in ("linear", "ahead"):  # and back
        config.uem.name, config.nnet.gaussian = uem, 8
        checkpoints.write_weights(build_model(config).state_dict(), path)
        config.nnet.gaussian = 0
        checkpoints.load_weights(build_model(config), path, start=True)
    config.uem.name, config.nnet.gaussian = "linear", 8
    model = build_model(config)
    backbone = {key: value for key, value in old.state_dict().items() if key.startswith("backbone.")}
    checkpoints.write_weights(backbone, path)
    checkpoints.load_weights(model, path, full_depth=True)
    assert model.points[0] == 1 and model.gaussian is None


def test_plans_of_no_layers_or_all(run):
    """Catches plans that leave elsewhere, the whole network's among them, and a network without an exit 0."""
    config = digits_uvit_tiny.get_config("quick")
    config.nnet.gaussian = 64
    config.sample.update(sample_steps=20, n_samples=16, mini_batch_size=8)
    torch.manual_seed(0)
    model = build_model(config)
    model.gaussian.fit(*moments(DATASETS["digits"](), Identity(), 10))
    config.nnet_path = str(run.dir / "nnet_ema.pth")
    checkpoints.write_weights(model.state_dict(), config.nnet_path)
    (found,) = spend(config, regimes.pixels(config), run, {"budget": [0.1]}, depth="ends", n_images=8)
    assert found["path"].endswith("plan-budget-0.1-ends.json")
    assert set(found["plan"]["layers"]) <= {0, model.depth} and found["report"]["met"]
    assert len(found["plan"]["layers"]) <= 16 and 0 < sum(layers > 0 for layers in found["plan"]["layers"]) <= 2
    assert json.loads((run.dir / "plan-budget-0.1-ends.json").read_text())["plan"] == found["plan"]

    good = found | {"report": found["report"] | {"selected_at": -1.0}}  # nothing is better
    (run.dir / "plan-budget-0.1-ends.json").write_text(json.dumps(good))
    (every,) = spend(config, regimes.pixels(config), run, {"budget": [0.1]}, n_images=8)
    assert every["plan"]["nodes"] == found["plan"]["nodes"], "all exits are no worse than two of them"

    split = found | {"asked": {"budget": [0.09]}, "report": found["report"] | {"budget": 0.09, "selected_at": -1.0}}
    split["plan"] = split["plan"] | {"max_u": [0.4] + [0.0] * (len(split["plan"]["layers"]) - 1)}
    (run.dir / "plan-budget-0.09.json").write_text(json.dumps(split))
    (found,) = spend(config, regimes.pixels(config), run, {"budget": [0.1]}, depth="ends", n_images=8)
    assert not any(found["plan"]["max_u"])  # a split sends images to an exit in between

    config.nnet.gaussian = 0
    checkpoints.write_weights(build_model(config).state_dict(), config.nnet_path)
    with pytest.raises(ValueError, match="nnet.gaussian"):
        spend(config, regimes.pixels(config), run, {"budget": [0.1]}, depth="ends", n_images=8)


def test_a_network_without_it_is_as_before():
    """Catches exits, heads or tensors that a network gets without asking for them."""
    model = tiny(heads="own")
    assert model.points[0] == 1 and model.gaussian is None and not any("gaussian" in key for key in model.state_dict())
