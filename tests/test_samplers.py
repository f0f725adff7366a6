"""Samplers against closed forms, textbook solvers and a dense integration; NFE, noise and samples at different rows.

Data are Gaussians or mixtures of Gaussians in one dimension, whose noise prediction is known exactly. Everything is in
float64 unless a test says otherwise.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from libs.rng import SeededNoise
from libs.sampling.plans import State, advance, forecasting, regular, sample
from libs.sampling.solvers import SAMPLERS, fast_orders
from sde import PROCESSES, DiscreteVP, VPLinear

f8 = torch.float64
STOCHASTIC = {"euler_maruyama_sde", "ddpm", "sde_dpm_solver_pp_2m"}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
GRIDS = ("time_uniform", "power:2.5", "logsnr", "karras:7")
every_grid = pytest.mark.parametrize("grid", GRIDS)
every_process = pytest.mark.parametrize("process", [build() for build in PROCESSES.values()], ids=list(PROCESSES))


def column(values):
    return torch.as_tensor(values, dtype=f8).view(-1, 1, 1, 1)


def start(n=16):
    return column(torch.linspace(-2.2, 2.3, n))


# ---- data with an exact noise prediction ---------------------------------------------------------------------------

MEAN, STD = column([0.4, -0.7, 0.2]), column([0.6, 0.3, 1.5])  # three Gaussians at a time


def gaussian(process, mean=MEAN, std=STD):
    """E[eps | x_t] = sigma (x - alpha mean) / (alpha^2 std^2 + sigma^2)."""

    def eps(x, t):
        alpha, sigma = column(process.alpha(t)), column(process.sigma(t))
        return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    return eps


def moments(process, t, mean=MEAN, std=STD):
    """Mean and variance of x_t."""
    t = torch.tensor(t, dtype=f8)
    return process.alpha(t) * mean, (process.alpha(t) * std) ** 2 + process.sigma(t) ** 2


def flow(process, x, t_end):
    """The probability flow from t = 1 to t_end: a Gaussian keeps its quantiles."""
    (mean_1, var_1), (mean, var) = moments(process, 1.0), moments(process, t_end)
    return mean + (x - mean_1) * torch.sqrt(var / var_1)


def mixture(process):
    """Three narrow modes: a strongly nonlinear prediction, with the textbook formula for each mode's weight."""
    modes, std = torch.tensor([-0.9, -0.2, 0.8], dtype=f8), 0.2

    def eps(x, t):
        alpha, sigma = column(process.alpha(t))[..., None], column(process.sigma(t))[..., None]
        gap, var = x[..., None] - alpha * modes, (alpha * std) ** 2 + sigma**2
        weight = torch.softmax(-(gap**2) / (2 * var), dim=-1)
        return (sigma * weight * gap / var).sum(-1)

    return eps


# ---- cost and settings ---------------------------------------------------------------------------------------------


@every_process
@every_sampler
def test_nfe_is_steps(name, process):
    """Catches a step count that means solver intervals, and calls at times the process does not have."""
    for steps in [*range(1, 14), 20, 50, 1000]:
        plan, calls = SAMPLERS[name](process, steps=steps), []
        if steps < 1000:
            sample(plan, torch.zeros(1, 1, 1, 1), lambda x, t: calls.append(t) or x, SeededNoise(0, [0], (1, 1, 1)))  # noqa: B023
            assert torch.equal(torch.cat(calls), plan.t)
        t = plan.t
        assert plan.nfe == len(t) == steps
        assert t.dtype == f8 and t[0] == 1 and (t.diff() < 0).all() and t[-1] >= process.t_min * (1 - 1e-9)
        assert plan.stochastic == (name in STOCHASTIC and not (steps == 1 and name != "sde_dpm_solver_pp_2m"))
        assert plan.table.isfinite().all()


@every_process
@every_sampler
@every_grid
def test_every_solver_takes_every_grid(grid, name, process):
    """Catches a solver that drops sample.grid, makes more or fewer calls on it, or calls at times without a network."""
    zero = name in ("ddpm", "ddim", "euler_maruyama_sde", "euler_maruyama_ode")
    for steps in (1, 2, 7, 12):
        plan = SAMPLERS[name](process, steps=steps, grid=grid)
        assert plan.nfe == steps and plan.t[0] == 1 and (plan.t.diff() < 0).all() and plan.table.isfinite().all()
        assert plan.t[-1] >= process.t_min * (1 - 1e-9)
    places = {
        g: SAMPLERS[name](process, steps=7, grid=g).t for g in ("time_uniform", "power:2.5", "logsnr", "karras:7")
    }
    assert all(g == grid or not torch.allclose(t, places[grid]) for g, t in places.items())
    nodes = [1.0, 0.8, 0.5, 0.3, 0.15, 0.05, 0.01, 0.0 if zero else 0.002]
    plan = SAMPLERS[name](process, steps=7, grid=",".join(map(str, nodes)))
    assert plan.t.tolist() == nodes[:-1]


def test_named_grids_are_their_formulas():
    """Catches p or rho at the wrong end: written again, number by number."""
    process, n = VPLinear(), 6
    noise, data = (math.exp(-linear_schedule(t)[2]) for t in (1.0, 1e-3))
    want = {
        "time_uniform": [1 + (1e-3 - 1) * i / n for i in range(n)],
        "power:2.5": [1e-3 + (1 - 1e-3) * (1 - i / n) ** 2.5 for i in range(n)],
        "power": [1e-3 + (1 - 1e-3) * (1 - i / n) ** 2 for i in range(n)],
        "logsnr": [time_of(-math.log(noise) + (math.log(noise) - math.log(data)) * i / n) for i in range(n)],
        "karras:3": [
            time_of(-3 * math.log(noise ** (1 / 3) * (1 - i / n) + data ** (1 / 3) * i / n)) for i in range(n)
        ],
    }
    for grid, t in want.items():
        got = SAMPLERS["dpm_solver_pp_2m"](process, steps=n, grid=grid).t
        torch.testing.assert_close(got, torch.tensor(t, dtype=f8), rtol=0, atol=1e-9)
    quadratic = SAMPLERS["ddim"](process, steps=n, grid="power:2").t
    torch.testing.assert_close(quadratic, torch.tensor([(1 - i / n) ** 2 for i in range(n)], dtype=f8))


def test_times_from_a_file(tmp_path):
    """Catches a file that is read in one of its forms only, and one that cannot be."""
    path, want = tmp_path / "times", [1.0, 0.5, 0.01]
    for text in ("1 0.5\n0.01\n", "1, 0.5, 0.01", "[1, 0.5, 0.01]"):
        path.write_text(text)
        assert SAMPLERS["dpm_solver"](VPLinear(), steps=2, grid=str(path)).t.tolist() == want[:2]
    for text in ("one half", "[[1, 0.5], [0.01]]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"sample.grid is .*of times \(could not convert"):
            SAMPLERS["ddim"](VPLinear(), steps=2, grid=str(path))


@pytest.mark.parametrize(
    "grid, message",
    [
        ("powr:2", "'powr:2'.*time_uniform, power"),
        ("power:-1", "'power:-1'.*above 0"),
        ("karras:x", "'karras:x'.*above 0"),
        ("logsnr:2", "logsnr has no parameter"),
        ("1,0.5", "2 times; 5 calls .* need 6"),
        ("0.9,0.8,0.7,0.5,0.4,0.3", "fall from 1"),
        ("1,0.8,0.9,0.5,0.4,0.3", "fall from 1"),
        ("1,0.8,0.7,0.5,0.4,0", "fall from 1 to 0.0001"),
        ("1,0.8,0.7,0.5,0.4,nan", "fall from 1"),
        ("1,0.8,0.7,0.5,0.4,x", "could not convert"),
    ],
)
def test_bad_grids_are_refused(grid, message):
    """Catches a grid that silently is another one."""
    with pytest.raises(ValueError, match=message):
        SAMPLERS["dpm_solver_pp_2m"](VPLinear(), steps=5, grid=grid)


def test_fast_orders():
    """Catches a remainder spent on the wrong order, or a first step of order 1."""
    assert fast_orders(50, 3) == [3] * 16 + [2]
    assert fast_orders(20, 3) == [3] * 6 + [2]
    assert fast_orders(10, 3) == [3] * 3 + [1]
    assert fast_orders(12, 3) == [3] * 3 + [2, 1]
    assert [fast_orders(n, 3) for n in (1, 2, 3)] == [[1], [2], [2, 1]]
    assert fast_orders(5, 2) == [2, 2, 1] and fast_orders(4, 2) == [2, 2] and fast_orders(3, 1) == [1, 1, 1]
    for steps in range(1, 200):
        assert all(sum(fast_orders(steps, order)) == steps for order in (1, 2, 3))


def test_released_grids():
    """Catches a grid over evaluations where the released code has one over solver steps, and other end points."""
    linear, sd = PROCESSES["vp_linear"](), PROCESSES["sd"]()
    lam = linear.lam(SAMPLERS["dpm_solver"](linear, steps=50).t)
    starts = torch.linspace(-5.0250, 5.7515, 18, dtype=f8)[:-1]  # 17 steps, uniform in lam
    torch.testing.assert_close(lam[::3], starts, rtol=0, atol=1e-3)
    torch.testing.assert_close(lam[1::3][:16], starts[:16] + lam.diff()[0], rtol=0, atol=1e-3)
    t = SAMPLERS["dpm_solver_pp"](sd, steps=50).t
    torch.testing.assert_close(t, torch.linspace(1, 1e-3, 51, dtype=f8)[:-1])
    t = SAMPLERS["euler_maruyama_sde"](linear, steps=1000).t
    torch.testing.assert_close(t, torch.linspace(1e-3, 1, 1000, dtype=f8).flip(0))


@pytest.mark.parametrize(
    "name, process, settings, message",
    [
        *((name, "vp_linear", {"steps": 0}, "steps is 0") for name in SAMPLERS),
        ("ddim", "vp_linear", {"steps": 5, "eta": 1.5}, r"eta is 1.5.*\[0, 1\]"),
        ("ddim", "vp_linear", {"steps": 5, "eta": -0.1}, r"eta is -0.1.*\[0, 1\]"),
        ("ddim", "sd", {"steps": 1001}, "steps is 1001.*at most 1000"),
        ("ddpm", "vp_linear", {"steps": 10001}, "steps is 10001.*at most 10000"),
        ("dpm_solver", "sd", {"steps": 5, "t_end": 1e-4}, r"t_end is 0.0001.*\[0.001, 1\)"),
        ("dpm_solver_pp", "vp_linear", {"steps": 5, "t_end": 0.0}, "t_end is 0.0"),
        ("euler_maruyama_ode", "vp_linear", {"steps": 5, "t_end": 1.0}, "t_end is 1.0"),
        ("dpm_solver", "vp_linear", {"steps": 5, "order": 4}, "order is 4.*1, 2 or 3"),
        ("dpm_solver_pp_2m", "vp_linear", {"steps": 5, "skip": "karras"}, "skip is 'karras'.*time_uniform or logsnr"),
        ("dpm_solver_pp_2m", "vp_linear", {"steps": 5, "skip": "logsnr", "grid": "power"}, "skip is 'logsnr' and"),
        ("dpm_solver", "vp_linear", {"steps": 1, "t_end": 0.1, "grid": "1,0.1"}, "t_end is 0.1 and sample.grid"),
        ("ddim", "sd", {"steps": 2, "grid": "1,0.0001,0"}, "steps is 2.*last call would be at"),
    ],
)
def test_bad_settings_are_refused(name, process, settings, message):
    """Catches settings that would silently do something else."""
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](PROCESSES[process](), **settings)


def test_stochastic_sampling_needs_noise():
    """Catches a stochastic sampler that runs without noise, as a worse deterministic one."""
    process, x = VPLinear(), torch.zeros(2, 1, 1, 1)
    plan = SAMPLERS["ddpm"](process, steps=4)
    with pytest.raises(ValueError, match="noise"):
        sample(plan, x, lambda x, t: x)
    with pytest.raises(ValueError, match="noise"):
        advance(plan, State.start(x), x)


def test_options_do_something():
    """Catches options that are read and dropped."""
    process = VPLinear()
    two_m = SAMPLERS["dpm_solver_pp_2m"]
    assert two_m(process, steps=5).cm[-1, 1] == 0 and two_m(process, steps=5, lower_order_final=False).cm[-1, 1] != 0
    assert not torch.allclose(two_m(process, steps=5).t, two_m(process, steps=5, skip="logsnr").t)
    assert (SAMPLERS["dpm_solver_pp"](process, steps=6, order=1).commit).all()
    assert SAMPLERS["ddim"](process, steps=5, eta=0.3).stochastic and not SAMPLERS["ddim"](process, steps=5).stochastic
    a, b = SAMPLERS["ddim"](process, steps=5, eta=1.0), SAMPLERS["ddpm"](process, steps=5)
    assert torch.equal(a.table, b.table)


# ---- orders of convergence -----------------------------------------------------------------------------------------


def final_error(process, plan, t_end, rows):
    """Largest error of the flow over samples and targets, after `rows` rows."""
    x = column([-1.5, 0.3, 1.7])
    state, eps = State.start(x), gaussian(process)
    for _ in range(rows):
        state = advance(plan, state, eps(state.x, plan.t[state.row]))
    return float((state.x - flow(process, x, t_end)).abs().max())


# The remainder of "fast" is one last step of order 1 (local error h^2) unless steps % 3 == 2 (order 2, local h^3).
ORDERS = [
    ("ddim", {}, 0, 1),
    ("ddim", {"grid": "power:1.1"}, 0, 1),
    *(
        (name, {"grid": grid}, extra, order)
        for grid in GRIDS
        for name, extra, order in (("dpm_solver_pp_2m", 0, 2), ("dpm_solver_pp", 2, 3), ("dpm_solver", 2, 3))
    ),
    *((name, {"order": 1}, 0, 1) for name in ("dpm_solver", "dpm_solver_pp")),
    *((name, {"order": 2}, 0, 2) for name in ("dpm_solver", "dpm_solver_pp")),
    *(
        (name, {}, extra, order)
        for name in ("dpm_solver", "dpm_solver_pp")
        for extra, order in ((0, 2), (1, 2), (2, 3))
    ),
    *(
        ("dpm_solver_pp_2m", {"skip": skip, "lower_order_final": lower}, 0, 2)
        for skip in ("time_uniform", "logsnr")
        for lower in (True, False)
    ),
]


@pytest.mark.parametrize("process", ["vp_linear", "sd"])
@pytest.mark.parametrize("name, options, extra, order", ORDERS)
def test_order_of_convergence(name, options, extra, order, process):
    """Catches a wrong coefficient: it costs an order, while the images still look fine."""
    process = PROCESSES[process]()
    t_end = 0.0 if name == "ddim" else 0.1
    options = options if name == "ddim" else options | {"t_end": t_end}
    errors = []
    for steps in (240, 480):
        plan = SAMPLERS[name](process, steps=steps + extra, **options)
        errors.append(final_error(process, plan, t_end, plan.nfe))
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.2, f"measured order {slope:.2f}, expected {order}"


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine"])
def test_order_of_euler_ode(process):
    """As above. Its last step, from 1e-3 to 0, does not shrink with the number of steps, so it is left out."""
    process, errors = PROCESSES[process](), []
    for intervals in (240, 480):
        plan = SAMPLERS["euler_maruyama_ode"](process, steps=intervals + 1)
        errors.append(final_error(process, plan, 1e-3, intervals))
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.2


class Impulses:
    """Noise that is 1 for one sample at one row: sample 2 + k at row k. Samples 0 and 1 get none."""

    def __init__(self, rows):
        self.rows, self.k = rows, -1

    def draw(self):
        self.k += 1
        return column(torch.arange(self.rows + 2) == self.k + 2)


def exact_moments(process, plan, rows, mean, std):
    """Mean and variance after `rows` rows, without Monte Carlo: on a Gaussian everything is affine in x_T and noise."""
    state, eps, noise = State.start(column([0, 1] + [0] * plan.nfe)), gaussian(process, mean, std), Impulses(plan.nfe)
    for _ in range(rows):
        state = advance(plan, state, eps(state.x, plan.t[state.row]), noise.draw())
    offset, gains = state.x.flatten()[0], state.x.flatten()[1:] - state.x.flatten()[0]
    mean_1, var_1 = moments(process, 1.0, mean, std)
    return float(offset + gains[0] * mean_1), float(gains[0] ** 2 * var_1 + (gains[1:] ** 2).sum())


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine"])
@pytest.mark.parametrize(
    "name, options, t_end, order",
    [
        ("euler_maruyama_sde", {}, 1e-3, 1),
        ("ddpm", {}, 0.0, 1),
        ("ddim", {"eta": 0.5}, 0.0, 1),
        ("sde_dpm_solver_pp_2m", {"t_end": 0.1}, 0.1, 2),
        ("sde_dpm_solver_pp_2m", {"t_end": 0.1, "skip": "logsnr"}, 0.1, 2),
        ("sde_dpm_solver_pp_2m", {"t_end": 0.1, "grid": "power:2"}, 0.1, 2),
        ("ddpm", {"grid": "power:1.1"}, 0.0, 1),
    ],
)
def test_order_of_the_variance(name, options, t_end, order, process):
    """Catches noise of the wrong size, such as beta for beta tilde or a lost factor of sqrt(dt)."""
    process, mean, std = PROCESSES[process](), 0.4, 0.6
    want_mean, want_var = moments(process, t_end, mean, std)
    errors = []
    for intervals in (240, 480):
        last = name == "euler_maruyama_sde"  # leave out its last step, see above
        plan = SAMPLERS[name](process, steps=intervals + last, **options)
        got_mean, got_var = exact_moments(process, plan, intervals, mean, std)
        errors.append(abs(got_var - float(want_var)))
        assert abs(got_mean - float(want_mean)) < (2e-3 if last else 1e-12)  # the others carry the mean exactly
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.2, f"measured order {slope:.2f}, expected {order}"


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_samples_have_the_right_moments(name):
    """Catches seeded noise that repeats between rows or images: the moments above do not see it.

    8192 values; bounds of 5 standard errors plus the known discretisation error: false alarms in 1e-6 of seeds.
    """
    process, mean, std = VPLinear(), 0.4, 0.6
    plan = SAMPLERS[name](process, steps=60)
    noise = SeededNoise(0, range(128), (1, 8, 8))
    x = noise.draw().double()
    mean_1, var_1 = moments(process, 1.0, mean, std)
    x = sample(plan, mean_1 + torch.sqrt(var_1) * x, gaussian(process, mean, std), noise)
    want_mean, want_var = exact_moments(process, plan, plan.nfe, mean, std)
    assert abs(want_mean - mean) < 0.01 and abs(want_var / std**2 - 1) < 0.2  # 60 steps are near the truth
    n = x.numel()
    assert abs(float(x.mean()) - want_mean) < 5 * math.sqrt(want_var / n)
    assert abs(float(x.var()) / want_var - 1) < 5 * math.sqrt(2 / n)
    neighbours = ((x[1:] - want_mean) * (x[:-1] - want_mean)).mean() / want_var
    assert abs(float(neighbours)) < 5 / math.sqrt(n - 64)


# ---- textbook solvers, written from the equations, number by number ------------------------------------------------


def linear_schedule(t):
    """alpha, sigma, lam of VPLinear without sde.py."""
    log_alpha = -19.9 * t**2 / 4 - 0.1 * t / 2
    alpha = math.exp(log_alpha)
    sigma = math.sqrt(-math.expm1(2 * log_alpha))
    return alpha, sigma, log_alpha - math.log(sigma)


def time_of(lam):
    """Bisection: no closed form to get wrong."""
    low, high = 1e-6, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if linear_schedule(middle)[2] > lam else (low, middle)
    return (low + high) / 2


def dpm_solver_fast(eps, x, steps):
    """DPM-Solver-fast with noise prediction, orders 1, 2 and 3."""
    rounds = steps // 3 + 1
    orders = {0: [3] * (rounds - 2) + [2, 1], 1: [3] * (rounds - 1) + [1], 2: [3] * (rounds - 1) + [2]}[steps % 3]
    lams = np.linspace(linear_schedule(1.0)[2], linear_schedule(1e-4)[2], rounds + 1)
    for order, lam_s, lam_t in zip(orders, lams[:-1], lams[1:], strict=True):
        h, s, t = lam_t - lam_s, time_of(lam_s), time_of(lam_t)
        (a_s, _, _), (a_t, s_t, _) = linear_schedule(s), linear_schedule(t)
        e_s = eps(x, s)
        out = a_t / a_s * x - s_t * math.expm1(h) * e_s
        if order == 2:
            s1 = time_of(lam_s + h / 2)
            a_1, s_1, _ = linear_schedule(s1)
            u = a_1 / a_s * x - s_1 * math.expm1(h / 2) * e_s
            out = out - s_t * math.expm1(h) * (eps(u, s1) - e_s)
        if order == 3:
            t1, t2 = time_of(lam_s + h / 3), time_of(lam_s + 2 * h / 3)
            (a_1, s_1, _), (a_2, s_2, _) = linear_schedule(t1), linear_schedule(t2)
            u1 = a_1 / a_s * x - s_1 * math.expm1(h / 3) * e_s
            d1 = eps(u1, t1) - e_s
            r2h = 2 * h / 3
            u2 = a_2 / a_s * x - s_2 * math.expm1(r2h) * e_s - 2 * s_2 * (math.expm1(r2h) / r2h - 1) * d1
            out = out - 1.5 * s_t * (math.expm1(h) / h - 1) * (eps(u2, t2) - e_s)
        x = out
    return x


def dpm_solver_pp_fast(eps, x, steps):
    """DPM-Solver++ with data prediction; r1 and r2 from the nodes, which are uniform in time."""
    grid, i = np.linspace(1, 1e-3, steps + 1), 0
    rest = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    for order in [3] * ((steps - sum(rest)) // 3) + rest:
        points = [linear_schedule(t) for t in grid[i : i + order + 1]]
        (_, s_s, l_s), (a_t, s_t, l_t) = points[0], points[-1]

        def data(x, j, points=points, i=i):
            return (x - points[j][1] * eps(x, grid[i + j])) / points[j][0]

        h, m_s = l_t - l_s, data(x, 0)
        out = s_t / s_s * x - a_t * math.expm1(-h) * m_s
        if order > 1:
            a_1, s_1, l_1 = points[1]
            r1 = (l_1 - l_s) / h
            m_1 = data(s_1 / s_s * x - a_1 * math.expm1(-r1 * h) * m_s, 1)
        if order == 2:
            out = out - 1 / (2 * r1) * a_t * math.expm1(-h) * (m_1 - m_s)
        if order == 3:
            a_2, s_2, l_2 = points[2]
            r2 = (l_2 - l_s) / h
            u2 = s_2 / s_s * x - a_2 * math.expm1(-r2 * h) * m_s
            u2 = u2 + r2 / r1 * a_2 * (math.expm1(-r2 * h) / (r2 * h) + 1) * (m_1 - m_s)
            out = out + 1 / r2 * a_t * (math.expm1(-h) / h + 1) * (data(u2, 2) - m_s)
        x, i = out, i + order
    return x


def dpm_solver_pp_2m(eps, x, steps):
    """Algorithm 2 of DPM-Solver++, last step first order."""
    grid, before = [linear_schedule(t) for t in np.linspace(1, 1e-3, steps + 1)], None
    for i, t in enumerate(np.linspace(1, 1e-3, steps + 1)[:-1]):
        (a_s, s_s, l_s), (a_t, s_t, l_t) = grid[i], grid[i + 1]
        h, m = l_t - l_s, (x - s_s * eps(x, t)) / a_s
        d = m
        if before is not None and i < steps - 1:
            r = (l_s - grid[i - 1][2]) / h
            d = (1 + 1 / (2 * r)) * m - 1 / (2 * r) * before
        x, before = s_t / s_s * x - a_t * math.expm1(-h) * d, m
    return x


def euler_ode(eps, x, steps):
    """dx = (-beta x / 2 + beta eps / (2 sigma)) dt on [0] ++ linspace(1e-3, 1, steps)."""
    grid = np.concatenate([[0], np.linspace(1e-3, 1, steps)])[::-1]
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        beta = 0.1 + 19.9 * t
        score = -eps(x, t) / linear_schedule(t)[1]
        x = x + (-beta / 2 * x - beta / 2 * score) * (t_next - t)
    return x


TEXTBOOK = {
    "dpm_solver": dpm_solver_fast,
    "dpm_solver_pp": dpm_solver_pp_fast,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "euler_maruyama_ode": euler_ode,
}


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 10, 12, 20])
def test_textbook_solver(name, steps):
    """Catches rows that read the wrong memory, keep the wrong anchor or sit at the wrong time."""
    process = VPLinear()
    eps, x = mixture(process), start()
    want = TEXTBOOK[name](lambda x, t: eps(x, torch.full((len(x),), float(t), dtype=f8)), x, steps)
    got = sample(SAMPLERS[name](process, steps=steps), x, eps)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_textbook_euler_sde():
    """Catches a wrong sign of the score or noise at the step to 0."""
    process, x, steps = VPLinear(), start(), 12
    eps, noise = (
        mixture(process),
        torch.randn(steps, *start().shape, dtype=f8, generator=torch.Generator().manual_seed(1)),
    )
    grid = np.concatenate([[0], np.linspace(1e-3, 1, steps)])[::-1]
    want = x
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        beta, dt = 0.1 + 19.9 * t, t_next - t
        score = -eps(want, torch.full((len(x),), t, dtype=f8)) / linear_schedule(t)[1]
        want = want + (-beta / 2 * want - beta * score) * dt
        if t_next > 0:
            want = want + math.sqrt(beta * -dt) * noise[k]
    state, plan = State.start(x), SAMPLERS["euler_maruyama_sde"](process, steps=steps)
    for k in range(steps):
        state = advance(plan, state, eps(state.x, plan.t[state.row]), noise[k])
    torch.testing.assert_close(state.x, want, rtol=0, atol=1e-10)


def test_textbook_ddpm():
    """Catches an index shifted by one, and beta for beta tilde: ancestral sampling through every level."""
    betas = torch.linspace(1e-3, 0.3, 40, dtype=f8)
    process, x = DiscreteVP(betas), start()
    eps, noise = mixture(process), torch.randn(40, *start().shape, dtype=f8, generator=torch.Generator().manual_seed(2))
    bar = torch.cat([torch.ones(1, dtype=f8), (1 - betas).cumprod(0)])
    want = x
    for k, n in enumerate(range(40, 0, -1)):
        beta = betas[n - 1]
        prediction = eps(want, torch.full((len(x),), n / 40, dtype=f8))
        want = (want - beta / torch.sqrt(1 - bar[n]) * prediction) / torch.sqrt(1 - beta)
        want = want + torch.sqrt((1 - bar[n - 1]) / (1 - bar[n]) * beta) * noise[k]  # 0 at n = 1
    state, plan = State.start(x), SAMPLERS["ddpm"](process, steps=40)
    for k in range(40):
        state = advance(plan, state, eps(state.x, plan.t[state.row]), noise[k])
    torch.testing.assert_close(state.x, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine"])
@pytest.mark.parametrize(
    "name, steps, options",
    [
        ("dpm_solver", 302, {"t_end": 1e-3}),
        ("dpm_solver_pp", 602, {}),
        ("dpm_solver_pp_2m", 600, {"skip": "logsnr"}),
        ("dpm_solver_pp_2m", 1000, {}),
    ],
)
def test_against_dense_integration(name, steps, options, process):
    """Catches solvers that converge, all together, to something else than the probability flow in t."""
    process, x = PROCESSES[process](), start()
    eps = mixture(process)

    def slope(t, x):
        t = torch.tensor(t, dtype=f8)
        score = -eps(column(x), t.expand(len(x))).flatten() / process.sigma(t)
        return (-process.beta(t) / 2 * (torch.from_numpy(x) + score)).numpy()

    dense = solve_ivp(slope, (1, 1e-3), x.flatten().numpy(), method="DOP853", rtol=1e-9, atol=1e-11).y[:, -1]
    got = sample(SAMPLERS[name](process, steps=steps, **options), x, eps)
    torch.testing.assert_close(got, column(dense), rtol=0, atol=1e-4)


# ---- forecasts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecasts_are_exact_on_polynomials(order):
    """Catches memory that forecasts shift, wrong weights, and v read at another row than it was written.

    A network whose v is a polynomial of degree `order` in the row's number, whatever x is, is forecast without error.
    """
    process, x = VPLinear(), start()
    plan = SAMPLERS["dpm_solver_pp_2m"](process, steps=12)
    rows = {t: i for i, t in enumerate(plan.t.tolist())}

    def eps(x, t):
        i = rows[float(t[0])]
        v = column(sum((0.3, -0.2 * i, 0.05 * i**2, -0.01 * i**3)[: order + 1]))
        return column(process.sigma(t)) * x + column(process.alpha(t)) * v

    ahead = forecasting(plan, process, [True] * 4 + regular(8, 3, 2), order)
    assert ahead.rows == 12 and ahead.nfe == 4 + 4
    torch.testing.assert_close(sample(ahead, x, eps), sample(plan, x, eps), rtol=0, atol=1e-10)


def test_a_plan_that_computes_all_is_the_plan():
    """Catches a memory that changes what is computed: equal to the last bit."""
    process, x = VPLinear(), start().float()
    for name in ("dpm_solver", "dpm_solver_pp_2m"):
        plan = SAMPLERS[name](process, steps=9)
        assert torch.equal(sample(forecasting(plan, process, [True] * 9), x, toy), sample(plan, x, toy))


@pytest.mark.parametrize(
    "computed, order, message",
    [([True] * 4, 1, "4 rows for 5"), ([False] + [True] * 4, 1, "first one computed"), ([True] * 5, 4, "order is 4")],
)
def test_bad_forecasts_are_refused(computed, order, message):
    """Catches a forecast from nothing."""
    with pytest.raises(ValueError, match=message):
        forecasting(SAMPLERS["ddim"](VPLinear(), steps=5), VPLinear(), computed, order)
    with pytest.raises(ValueError, match="every is 0"):
        regular(5, 0, 1)


# ---- batches -------------------------------------------------------------------------------------------------------


def toy(x, t):
    """A nonlinear float32 'network' that treats every element alike."""
    t = t.to(x.dtype).view(-1, 1, 1, 1)
    return x * (0.3 + 0.5 * t) / (1 + 0.1 * x * x)


def joined(a: State, b: State) -> State:
    """One batch of both, for a plan without forecasts."""
    history = tuple(map(torch.cat, zip(a.history, b.history, strict=True)))
    return State(torch.cat([a.x, b.x]), torch.cat([a.anchor, b.anchor]), history, torch.cat([a.row, b.row]))


@every_sampler
def test_samples_at_different_rows_share_a_batch(name):
    """Catches solver state kept per batch: images admitted later would continue another image's step.

    Nine images pass through four slots; each leaves after its last row and the next takes its place. The result equals
    all nine in lockstep, bit for bit.
    """
    process, shape, ids = VPLinear(), (1, 3, 3), list(range(9))
    options = {"eta": 0.7} if name == "ddim" else {}
    plan = SAMPLERS[name](process, steps=11, **options)
    noise = SeededNoise(5, ids, shape)
    want = sample(plan, noise.draw(), toy, noise)

    waiting, inside, got, rows = list(ids), [], {}, set()
    state = noise = None
    while waiting or inside:
        if waiting and len(inside) < 4:  # one at a time, so that rows are staggered
            new = SeededNoise(5, [waiting[0]], shape)
            arrival = State.start(new.draw())
            if state is None:
                state, noise = arrival, new
            else:
                state = joined(state, arrival)
                noise.generators += new.generators
            inside.append(waiting.pop(0))
        rows.add(tuple(state.row.tolist()))
        state = advance(plan, state, toy(state.x, plan.t[state.row]), noise.draw() if plan.stochastic else None)
        done = state.done(plan)
        for i in done.nonzero().flatten().tolist():
            got[inside[i]] = state.x[i]
        stay = (~done).nonzero().flatten()
        state, noise = state.keep(stay), noise.keep(stay)
        inside = [i for i, gone in zip(inside, done.tolist(), strict=True) if not gone]
    assert any(len(set(r)) == 4 for r in rows)  # four samples, four different rows
    assert want.isfinite().all() and torch.equal(torch.stack([got[i] for i in ids]), want)


@every_sampler
def test_images_do_not_depend_on_their_batch(name):
    """Catches noise drawn per batch, and coefficients taken from the first sample."""
    plan = SAMPLERS[name](VPLinear(), steps=7, **({"eta": 1.0} if name == "ddim" else {}))

    def images(ids):
        noise = SeededNoise(1, ids, (1, 4, 4))
        return sample(plan, noise.draw(), toy, noise)

    together, pair = images([3, 8, 5, 0]), images([5, 3])
    assert pair.isfinite().all() and torch.equal(torch.stack([together[2], together[0]]), pair)


def test_kept_samples_go_on():
    """Catches an index that reaches some of the tensors only."""
    plan = SAMPLERS["dpm_solver"](VPLinear(), steps=8)
    state = State.start(torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    for _ in range(2):  # in the middle of a step of order 3: x, anchor and history all differ
        state = advance(plan, state, toy(state.x, plan.t[state.row]))
    index, whole = torch.tensor([2, 0]), state
    kept = state.keep(index)
    for _ in range(2):
        kept = advance(plan, kept, toy(kept.x, plan.t[kept.row]))
        whole = advance(plan, whole, toy(whole.x, plan.t[whole.row]))
    assert torch.equal(kept.x, whole.x[index]) and torch.equal(kept.row, whole.row[index])


@every_sampler
def test_single_precision_follows_double(name):
    """Catches coefficients that lose their digits in float32, such as h or 1 - alpha^2 near t = 1e-4."""
    process = VPLinear()
    plan = SAMPLERS[name](process, steps=20)
    eps, x = mixture(process), start(9)
    noise = [SeededNoise(0, range(9), (1, 1, 1)) for _ in range(2)]
    double = sample(plan, x, eps, noise[0])
    single = sample(plan, x.float(), lambda x, t: eps(x.double(), t).float(), noise[1])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_half_precision_predictions_keep_the_state_in_float32():
    """Catches a state that takes over the dtype of a network under autocast and accumulates rounding."""
    plan = SAMPLERS["dpm_solver_pp_2m"](VPLinear(), steps=5)
    assert sample(plan, torch.ones(2, 1, 2, 2), lambda x, t: x.bfloat16()).dtype == torch.float32
