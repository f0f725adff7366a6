"""Why images leave where they do, and what the uncertainty knows: numbers in analysis.json, pictures beside it.

`explain.py` turns arrays into numbers, `figures.py` numbers into pictures; here the arrays are measured.

exits      per configured exit policy, closed loop: variance of the exit explained by time, by image and left over;
           agreement with the best static schedule; spread of the depth over images; where in t and logSNR images leave
estimates  on noised training images: u against the true error tanh|eps_k - eps| and the excess tanh|eps_k - eps_K| per
           (time, exit), against a constant per (time, exit); what leaving early changes; the weights of the loss
gradients  which parts of the network each term of the loss moves: from the settings, and from one backward pass
oracle     leaving at the least sufficient exit, which no policy can know
per_image  whether looking at the image pays, at given budgets: per_image.py

t = 1 is noise, t = 0 the data; logSNR = 2 log(alpha / sigma).
"""

from dataclasses import dataclass

import numpy as np
import torch

from libs import rng
from libs.analysis import explain, figures
from libs.analysis.calibrate import DepthBench, distance_of
from libs.analysis.per_image import per_image
from libs.data import batches
from libs.evaluation.sweep import points
from libs.exits import EXIT_POLICIES, oracle
from libs.losses import LAYER_WEIGHTS, Objective
from libs.metrics.paired import Paired
from libs.regimes import Regime
from libs.report.families import BASELINES
from libs.run import Run
from libs.sampling.dense import sample_dense
from libs.sampling.images import Images
from libs.sampling.sampler import Sampler

# ---- exits, closed loop --------------------------------------------------------------------------------------------


def sampled(bench: DepthBench) -> dict[str, tuple[str, Images]]:
    """Of every configured point that decides: slug -> its label and its images, with its own calls and guidance."""
    options = dict(seed=bench.seed, batch_size=bench.config.sample.mini_batch_size)
    chosen = [point for point in points(bench.sampler) if point.family not in BASELINES]
    return {p.slug: (p.label, Images.concatenate(list(p.images(np.arange(bench.n), **options)))) for p in chosen}


def trace_statistics(bench: DepthBench, images: Images) -> dict:
    trace = images.trace
    used = trace.used.reshape(len(trace.calls), -1)  # (calls, branches x n)
    labels = images.labels
    t = torch.from_numpy(trace.t)
    switch = explain.switch_time(trace.t, used)
    return {
        "share_of_macs": bench.share([images]),
        "mean_depth": float(used.mean()),
        "variance": explain.exit_variance(used, None if labels is None else np.tile(labels, trace.used.shape[1])),
        "late": explain.late_images(images.mean_depth, labels, explain.busyness(images.pixels.numpy())),
        "mode_agreement": explain.mode_agreement(used),
        "depth_per_image": explain.sample_spread(trace.used.mean(1)),
        "t": trace.t.tolist(),
        "log_snr": (2 * bench.sampler.regime.process.lam(t)).tolist(),
        "depth_per_call": used.mean(1).tolist(),
        "histogram": explain.exit_histogram(used, trace.depth).tolist(),
        "switch_t": switch,
        "switch_log_snr": None if switch is None else log_snr(bench, switch),
    }


def log_snr(bench: DepthBench, t: float) -> float:
    return float(2 * bench.sampler.regime.process.lam(torch.tensor([t], dtype=torch.float64))[0])


# ---- estimates, on noised training images --------------------------------------------------------------------------


@dataclass(frozen=True)
class Noised:
    """Every exit on training images at given times."""

    t: np.ndarray  # (T,)
    u: np.ndarray  # (T, E, n) mean uncertainty, as are the next two
    error: np.ndarray  # tanh|eps_k - eps|
    excess: np.ndarray  # tanh|eps_k - eps_K|
    to_final: np.ndarray  # (T, E) mean square of eps_k - eps_K
    to_noise: np.ndarray  # (T, E) mean square of eps_k - eps
    weights: np.ndarray  # (T, E) of the configured loss
    weighted: np.ndarray  # (T, E) those times the loss of the exit


def training_images(bench: DepthBench, n: int):
    """x0 (n, C, H, W) and conditions, in the order of a training with this noise seed."""
    regime, device = bench.sampler.regime, bench.sampler.run.device
    workers = bench.config.dataset.workers
    x, stored = next(batches(regime.dataset(), batch_size=n, seed=bench.seed, workers=workers))
    z = rng.latent_noise(bench.seed, 0, n, regime.shape, slice(0, n)).to(device) if regime.codec.draws else None
    cond = regime.conditions.for_training(stored.to(device), torch.ones(n, device=device), 0.0)
    return regime.codec.sample(x.to(device), z), cond


@torch.inference_mode()
def noised_statistics(bench: DepthBench, n_times: int) -> Noised:
    """The images go through the network at the middles of `n_times` equal bins of t, each time with fresh noise."""
    x0, cond = training_images(bench, bench.n)
    times = (np.arange(n_times) + 0.5) / n_times
    parts = np.array_split(np.arange(bench.n), -(-bench.n // bench.config.sample.mini_batch_size))
    columns = []
    for number, time in enumerate(times):
        noise = rng.draw_rows(rng.numbered_streams("analysis", bench.seed, number, ids=range(bench.n)), x0.shape[1:])
        rows = [noised_batch(bench, x0[p], None if cond is None else cond[p], noise[p], float(time)) for p in parts]
        columns.append([np.concatenate(values, axis=1) for values in zip(*rows, strict=True)])
    u, error, excess, *means = (np.stack(values) for values in zip(*columns, strict=True))
    return Noised(times, u, error, excess, *(values.mean(2) for values in means))


def noised_batch(bench: DepthBench, x0, cond, noise, time: float) -> list[np.ndarray]:
    """What `Noised` holds for one batch at one time: seven arrays (E, b)."""
    process, pred, objective = bench.sampler.regime.process, bench.config.pred, bench.config.loss
    noise = noise.to(x0)
    t = torch.full((len(x0),), time, dtype=torch.float64)
    moved = t.to(x0)
    x = process.noised(x0, moved, noise)
    exits = bench.model(x, process.network_time(t).to(x0), cond)
    eps = torch.stack([process.eps(pred, out, x, moved) for out in exits.out])  # (E, b, C, H, W)
    k = torch.tensor(exits.points, device=x.device, dtype=torch.float32)
    gap = (eps - (noise if objective.target == "error" else eps[-1])).abs().tanh().flatten(2).mean(2)  # (E, b)
    weights = LAYER_WEIGHTS[objective.weights](exits.mean_u, k, gap)  # (E, b)
    loss = (exits.out - process.target(pred, x0, noise, moved)).square()
    arrays = [
        exits.mean_u,
        (eps - noise).abs().tanh(),
        (eps - eps[-1]).abs().tanh(),
        (eps - eps[-1]).square(),
        (eps - noise).square(),
        weights,
        weights * loss.flatten(2).mean(2),
    ]
    return [(a.flatten(2).mean(2) if a.dim() > 2 else a).double().cpu().numpy() for a in arrays]


def estimate_statistics(bench: DepthBench, found: Noised) -> dict:
    """Q15-Q17 and Q25: tables are (times, exits)."""
    targets, exits = {"error": found.error, "excess": found.excess}, range(found.u.shape[1])
    return {
        "t": found.t.tolist(),
        "log_snr": [log_snr(bench, t) for t in found.t],
        "exits": list(bench.model.points),
        "images": f"{bench.n} training images, noised afresh at every time; fitted on one half, scored on the other",
        "fitted_to": bench.config.loss.target,
        "mean": {name: a.mean(2).tolist() for name, a in (targets | {"u": found.u}).items()},
        "explained_by_time": {
            name: [explain.explained_by_time(a[:, e]) for e in exits] for name, a in (targets | {"u": found.u}).items()
        },
        "scores": {name: explain.score_tables(found.u, target) for name, target in targets.items()},
        "calibration": {
            name: [explain.calibration_curve(found.u[:, e].ravel(), target[:, e].ravel()) for e in exits]
            for name, target in targets.items()
        },
        "mse_to_final": found.to_final.tolist(),
        "mse_to_noise": found.to_noise.tolist(),
        "loss_weights": found.weights.tolist(),
        "weighted_loss": found.weighted.tolist(),
    }


# ---- gradients -----------------------------------------------------------------------------------------------------


def gradient_flow(bench: DepthBench) -> dict:
    """The parts of the network that each term of the configured loss moves, expected and found."""
    config, model, process = bench.config, bench.model, bench.sampler.regime.process
    x0, cond = training_images(bench, 8)
    t = process.times((torch.arange(8, dtype=torch.float64) + 0.5) / 8).to(x0.device)  # spread evenly
    noise = rng.draw_rows(rng.numbered_streams("analysis", bench.seed, ids=range(len(x0))), x0.shape[1:]).to(x0)
    model.requires_grad_(True)
    if config.train.freeze_backbone:
        model.freeze_backbone()
    exits = model(process.noised(x0, t, noise), process.network_time(t), cond)
    kinds = dict(weights=config.loss.weights, target=config.loss.target)

    def loss(**lambdas):
        terms = {"lambda_u": 0.0, "lambda_layers": 0.0, "lambda_extra": 0.0} | lambdas
        return Objective(**kinds, **terms)(exits, process, config.pred, x0, noise, t)[0].sum()

    simple = loss()
    terms = {"simple": simple, "uem": loss(lambda_u=1.0) - simple, "layers": loss(lambda_layers=1.0) - simple}
    if config.loss.lambda_extra:
        terms["extra"] = loss(lambda_extra=1.0) - simple
    expected = explain.expected_reach(
        config.loss.weights, own_heads=len(model.heads) > 0, frozen=config.train.freeze_backbone, extra="extra" in terms
    )
    found = {name: moved_parts(model, term) for name, term in terms.items()}
    model.requires_grad_(False)
    coefficients = {name: config.loss[f"lambda_{short}"] for name, short in (("uem", "u"), ("layers", "layers"))}
    return {"expected": expected, "found": found, "agree": expected == found, "coefficients": coefficients, **kinds}


def moved_parts(model, term) -> list[str]:
    """Which of `explain.MODEL_PARTS` get a gradient that is not zero."""
    if not term.requires_grad:
        return []
    model.zero_grad()
    term.backward(retain_graph=True)
    modules = dict(zip(explain.MODEL_PARTS, (model.backbone, model.heads, model.uem), strict=True))
    grads = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in modules.items()}
    model.zero_grad()
    return [name for name in explain.MODEL_PARTS if any(bool(grad.any()) for grad in grads[name])]


# ---- the oracle ----------------------------------------------------------------------------------------------------


def oracle_statistics(bench: DepthBench, taus: list[float]) -> list[dict]:
    """Full depth and the oracle at every tolerance: what it would spend if it knew, and the quality it would keep."""
    distance = distance_of(bench.config, bench.sampler.regime, bench.sampler.run)
    full = bench.images(EXIT_POLICIES["full"](), bench.seed)
    records = [{"tau": None, "share_of_macs": 1.0, "mean_depth": float(bench.model.depth), "distance": distance(full)}]
    for tau in taus:
        images = [
            sample_dense(
                bench.sampler,
                ids,
                lambda call, tau=tau: oracle(call.eps, bench.model.points, tau),
                seed=bench.seed,
                plan=bench.plan,
            )
            for ids in bench.batches
        ]
        paired = Paired(Images.concatenate(full))
        for batch in images:
            paired.update(batch)
        depth = float(np.mean([batch.trace.used.mean() for batch in images]))
        cost = {"tau": tau, "share_of_macs": bench.share(images), "mean_depth": depth}
        records.append(cost | {"distance": distance(images)} | paired.compute(bench.sampler.run))
    return records


# ---- all of it -----------------------------------------------------------------------------------------------------


def analyze(
    config, regime: Regime, run: Run, *, n_images: int, seed: int, n_times: int, taus: list[float], budgets=()
) -> dict:
    """Write analysis.json and the pictures into the run's directory; returns the numbers.

    Args:
        n_images: images per measurement.
        seed: noise seed; `budgets` also take the four after it.
        n_times: equal bins of t at whose middles the estimates are measured.
        taus: tolerances of the oracle.
        budgets: shares of full depth's MACs at which per-image exits are held against static depths (per_image.py).
    """
    for name, value, least in (("images", n_images, 4), ("times", n_times, 1)):
        if value < least:
            raise ValueError(f"--{name}={value}: it must be at least {least}")
    if any(not tau >= 0 for tau in taus):
        raise ValueError(f"--oracle={','.join(map(str, taus))}: tolerances of |eps_k - eps_K| are numbers >= 0")
    if run.world > 1:
        raise ValueError(f"analysis runs in one process; {run.world} were started")
    bench = DepthBench(Sampler.open(config, regime, run), n_images, seed)
    found = {"config": config.to_dict(), "n_images": n_images, "seed": seed, "depth": bench.model.depth}
    run.say(f"exits of {n_images} images")
    images = sampled(bench)
    found["exits"] = {
        slug: {"label": label, **trace_statistics(bench, of_point)} for slug, (label, of_point) in images.items()
    }
    run.say(f"estimates at {n_times} times")
    found["estimates"] = estimate_statistics(bench, noised_statistics(bench, n_times))
    found["gradients"] = gradient_flow(bench)
    if taus:
        run.say("oracle")
        found["oracle"] = oracle_statistics(bench, taus)
    if budgets:
        run.say("per-image exits against static depths")
        found["per_image"] = per_image(bench, list(budgets))
    run.write_json("analysis.json", found)
    found["pictures"] = figures.draw_analysis(found, images, run.dir)
    return found


def answers(found: dict) -> dict:
    """The numbers that answer the usual questions, for the last line."""
    scores = found["estimates"]["scores"]
    average = {
        f"{name}_{score}": float(np.mean(np.array(scores[name][score])[:, :-1]))
        for name in scores
        for score in ("r2_refit", "spearman")
    }
    exits = {
        slug: {
            "mean_depth": point["mean_depth"],
            **{f"variance_{name}": share for name, share in point["variance"].items() if name != "total"},
            "mode_agreement": point["mode_agreement"],
            "switch_log_snr": point["switch_log_snr"],
        }
        for slug, point in found["exits"].items()
    }
    gains = {
        f"{record['budget']:g}": {name: record[name] for name in ("gain", "oracle_gain", "seconds")}
        for record in found.get("per_image", ())
    }
    told = {"exits": exits, "estimates": average, "gradients_agree": found["gradients"]["agree"]}
    return told | ({"per_image": gains} if gains else {})
