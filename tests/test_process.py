"""Noise schedules and the conversions between noise, x0 and v predictions."""

import math

import pytest
import torch

from sde import PROCESSES, DiscreteVP, Flow, VPCosine, VPLinear

f8 = torch.float64
every_process = pytest.mark.parametrize("name", PROCESSES)
every_prediction = pytest.mark.parametrize(
    ("name", "pred"), [(name, pred) for name, process in PROCESSES.items() for pred in process().predictions]
)


def times(process, n=257):
    return torch.linspace(process.t_min, 1, n, dtype=f8)


@pytest.mark.parametrize("name", sorted(PROCESSES.keys() - {"flow"}))
def test_signal_and_noise_power_add_to_one(name):
    """Catches a sigma that is a variance, or an alpha that is a squared one."""
    process, t = PROCESSES[name](), torch.linspace(0, 1, 101, dtype=f8)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


@every_process
@pytest.mark.parametrize("function", ["log_alpha", "alpha", "sigma", "beta", "g2", "lam"])
def test_single_precision_keeps_its_digits(name, function):
    """Catches 1 - alpha^2 in float32, which is wrong by percents at t = 1e-4; and a lost shape or dtype."""
    process = PROCESSES[name]()
    t = times(process, 256).float().reshape(4, 64)
    got, want = getattr(process, function)(t), getattr(process, function)(t.double())
    assert got.dtype == torch.float32 and got.shape == t.shape
    torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=0)


@every_process
def test_lam_decreases_and_has_an_inverse(name):
    """Catches a schedule flat or infinite at t = 1, an inverse of log(snr) instead of its half, and acos near t = 0."""
    process = PROCESSES[name]()
    t = times(process, 2000)
    lam = process.lam(t)
    assert lam.isfinite().all() and (lam.diff() < 0).all()
    torch.testing.assert_close(process.t_of_lam(lam), t, rtol=1e-9, atol=1e-12)
    lam = torch.linspace(float(process.lam(t[-1])), float(process.lam(t[0])), 999, dtype=f8)
    torch.testing.assert_close(process.lam(process.t_of_lam(lam)), lam, rtol=0, atol=1e-8)
    assert process.t_of_lam(lam[5]).shape == ()  # also one number


@every_process
def test_beta_is_the_slope_of_the_schedule(name):
    """Catches an Euler-Maruyama sampler that integrates another process than the one trained (a factor 2, a shift)."""
    process = PROCESSES[name]()
    t = (torch.arange(1, 1000, dtype=f8) + 0.5) / 1000  # between the discrete levels
    dt = 1e-6
    slope = -(process.log_alpha(t + dt) - process.log_alpha(t - dt)) / dt
    torch.testing.assert_close(process.beta(t), slope, rtol=1e-4, atol=0)
    added = (process.sigma(t + dt) ** 2 - process.sigma(t - dt) ** 2) / (2 * dt)
    torch.testing.assert_close(process.g2(t), added + slope * process.sigma(t) ** 2, rtol=1e-4, atol=1e-6)


def test_flow_is_a_straight_line():
    """Catches a path that is bent, that starts without any signal, or a network that reads another time than its s."""
    process, t = Flow(), torch.linspace(0, 1, 50, dtype=f8)
    s = 0.999 * t
    torch.testing.assert_close(process.alpha(t), 1 - s, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t), s, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.network_time(t), 1000 * s)
    x0, eps, t, x = fields(process)
    step = process.noised(x0, t - 1e-4, eps)
    torch.testing.assert_close((x - step) / (0.999 * 1e-4), process.target("velocity", x0, eps, t))


def test_linear_schedule_values():
    """Catches any other linear schedule: exp(-B), B = 0.1 t + 19.9 t^2 / 2, and the half-log-SNR it gives."""
    t = torch.tensor([0.3, 1.0, 1e-4, 1e-3], dtype=f8)
    process = VPLinear()
    torch.testing.assert_close(process.alpha(t) ** 2, torch.exp(-(0.1 * t + 19.9 * t**2 / 2)), rtol=1e-13, atol=0)
    assert process.lam(t)[1:].tolist() == pytest.approx([-5.025, 5.752, 4.558], abs=6e-4)
    assert process.beta(t)[:2].tolist() == pytest.approx([6.07, 20.0])


def test_stable_diffusion_values():
    """Catches linear betas in place of linear square roots, and an index shifted by one."""
    process = PROCESSES["sd"]()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f8) ** 2
    n = torch.arange(1, 1001, dtype=f8)
    torch.testing.assert_close(process.alpha(n / 1000) ** 2, (1 - betas).cumprod(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.beta(n / 1000), -1000 * torch.log1p(-betas), rtol=1e-8, atol=0)
    torch.testing.assert_close(process.beta(torch.linspace(1, 1e-3, 1000, dtype=f8)), process.beta(n / 1000).flip(0))
    assert float(process.alpha(n[-1] / 1000)) ** 2 == pytest.approx(0.00466, abs=5e-6)
    assert process.lam(n[[0, -1]] / 1000).tolist() == pytest.approx([3.535, -2.682], abs=6e-4)
    between = process.log_alpha(torch.tensor([0.0100, 0.0104, 0.0110], dtype=f8))
    assert float(between[1]) == pytest.approx(float(0.6 * between[0] + 0.4 * between[2]), rel=1e-12)
    assert float(process.sigma(torch.zeros((), dtype=f8))) == 0  # not a root of a negative number


def test_cosine_is_cosine_up_to_its_cap():
    """Catches a cap that bends the schedule elsewhere, or a jump of beta at the cap."""
    process, s = VPCosine(), 0.008
    t = torch.linspace(0, process.t_cap, 50, dtype=f8)
    angle = (t + s) / (1 + s) * math.pi / 2
    torch.testing.assert_close(process.alpha(t), angle.cos() / angle[0].cos(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.beta(t), math.pi * angle.tan() / (1 + s), rtol=1e-12, atol=0)
    one = torch.ones((), dtype=f8)
    assert float(process.beta(one)) == pytest.approx(float(process.beta(process.t_cap * one)))
    assert float(process.lam(one)) == pytest.approx(-5.7776, abs=1e-4)
    assert float(process.alpha(one)) == pytest.approx(0.0031, abs=5e-5)


def test_network_time():
    """Catches time in [0, 1] at a network that was trained on 0..999 (continuous) or 1..1000 (discrete)."""
    t = torch.tensor([0.5, 1.0], dtype=f8)
    assert VPLinear().network_time(t).tolist() == [499.5, 999.0]
    assert VPCosine().network_time(t).tolist() == [499.5, 999.0]
    assert PROCESSES["sd"]().network_time(t).tolist() == [500.0, 1000.0]


def test_training_times():
    """Catches level 0 or a missing level N in discrete training, and a level that comes back as 56.999996."""
    u = (torch.arange(4000, dtype=f8) + 0.5) / 4000
    assert torch.equal(VPLinear().times(u), u)
    process = PROCESSES["sd"]()
    n = process.network_time(process.times(u))
    assert torch.equal(n, torch.arange(1, 1001, dtype=f8).repeat_interleave(4))  # each level equally often, exactly
    assert float(process.times(torch.tensor(1 - 1e-17, dtype=f8))) == 1  # rounds to 1: still a level


def fields(process, dtype=f8):
    t = torch.tensor([process.t_min, 0.2, 0.7, 1.0], dtype=f8)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=dtype)
    return x0, eps, t, process.noised(x0, t, eps)


@every_prediction
def test_predictions_round_trip(name, pred):
    """Catches a wrong sign in v, alpha and sigma exchanged, and coefficients given to the wrong sample."""
    process = PROCESSES[name]()
    x0, eps, t, x = fields(process)
    back = process.eps(pred, process.target(pred, x0, eps, t), x, t)
    torch.testing.assert_close(back, eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(process.x0(back, x, t), x0, rtol=0, atol=1e-9)


@every_process
def test_conversions_by_hand(name):
    """Catches definitions that agree with each other only: numbers from the equations, one sample at a time."""
    process = PROCESSES[name]()
    x0, eps, t, x = fields(process)
    for i, time in enumerate(t):
        a, s = float(process.alpha(time)), float(process.sigma(time))
        torch.testing.assert_close(x[i], a * x0[i] + s * eps[i])
        if name != "flow":
            torch.testing.assert_close(process.target("v", x0, eps, t)[i], a * eps[i] - s * x0[i])
        torch.testing.assert_close(process.eps("x0", x0 + 1, x, t)[i], (x[i] - a * (x0[i] + 1)) / s)
    assert process.target("noise", x0, eps, t) is eps and process.target("x0", x0, eps, t) is x0


@every_prediction
def test_conversions_stay_finite_without_noise(name, pred):
    """Catches 0 / 0 at t = 0 and at the first float above it, which training can draw."""
    process = PROCESSES[name]()
    t = torch.tensor([0.0, 1e-45, 1e-12, 1e-7])
    x0, eps = torch.ones(2, 4, 1, 2, 2)
    x = process.noised(x0, t, eps)
    out = process.eps(pred, process.target(pred, x0, eps, t), x, t)
    assert out.isfinite().all() and process.x0(out, x, t).isfinite().all()
    assert out.abs().max() < 1.1 and out.dtype == torch.float32


def test_dtype_follows_the_images():
    """Catches float64 times that turn a half-precision batch into float64."""
    x0, eps, t, x = fields(VPLinear(), torch.float16)
    assert x.dtype == VPLinear().x0(eps, x, t).dtype == VPLinear().eps("v", eps, x, t).dtype == torch.float16


def test_bad_settings_are_refused():
    """Catches step numbers taken for times, and schedules that are none."""
    with pytest.raises(ValueError, match="int64"):
        VPLinear().alpha(torch.tensor([500]))
    with pytest.raises(ValueError, match="int64"):
        VPLinear().noised(torch.zeros(1, 1, 2, 2), torch.tensor([500]), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="'epsilon'.*noise, x0, v"):
        VPLinear().target("epsilon", *torch.zeros(2, 1, 1, 2, 2), torch.ones(1))
    for process, pred in ((VPLinear(), "velocity"), (Flow(), "v")):
        with pytest.raises(ValueError, match=f"pred is '{pred}'; this process knows noise, x0, "):
            process.eps(pred, *torch.zeros(2, 1, 1, 2, 2), torch.ones(1))
    with pytest.raises(ValueError, match="beta_min, beta_max are 20, 0.1"):
        VPLinear(20, 0.1)
    with pytest.raises(ValueError, match="s is 0"):
        VPCosine(0)
    for betas in ([0.1], [0.1, 1.0], [[0.1, 0.2]], [0.0, 0.1]):
        with pytest.raises(ValueError, match="betas"):
            DiscreteVP(betas)
