"""Where a sampler calls the network: grids of time from noise (t = 1) to data.

A grid is one string, the setting `sample.grid`:

    time_uniform     t_i = 1 + (t_end - 1) i/n
    power:p          t_i = t_end + (1 - t_end) (1 - i/n)^p: denser near the data; p = 2 is DDIM's "quadratic"
    logsnr           uniform in lam = log(alpha / sigma) (DPM-Solver, section 3.4)
    karras:rho       uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5; rho = 7 there)
    1,0.6,0.2,0.001  the times themselves, n + 1 of them for n calls: the last one is where the sampler stops
    FILE             the same from a file: numbers separated by commas or white space, or a JSON list

and "" is the grid that the sampler was published with.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sde import Process

T_END = 1e-3  # where grids that cannot reach t = 0 stop before they jump there


def time_uniform(process: Process, u: Tensor, t_end: float) -> Tensor:
    return torch.lerp(torch.ones_like(u), torch.full_like(u, t_end), u)


def power(process: Process, u: Tensor, t_end: float, p: float) -> Tensor:
    return t_end + (1 - t_end) * (1 - u) ** p


def logsnr(process: Process, u: Tensor, t_end: float) -> Tensor:
    start, end = process.lam(torch.tensor([1, t_end], dtype=torch.float64))
    return process.t_of_lam(torch.lerp(start, end, u))


def karras(process: Process, u: Tensor, t_end: float, rho: float) -> Tensor:
    start, end = torch.exp(-process.lam(torch.tensor([1, t_end], dtype=torch.float64)) / rho)
    return process.t_of_lam(-rho * torch.lerp(start, end, u).log())


# name -> (u = i/n (n + 1,) in [0, 1] -> times, the default of its parameter or None where it has none)
GRIDS: dict[str, tuple[Callable[..., Tensor], float | None]] = {
    "time_uniform": (time_uniform, None),
    "power": (power, 2.0),
    "logsnr": (logsnr, None),
    "karras": (karras, 7.0),
}


def times(process: Process, n: int, t_end: float, grid: str) -> Tensor:
    """The n + 1 times of `grid` from 1 down to `t_end`, (n + 1,) float64; explicit times end where they end.

    >>> from sde import VPLinear
    >>> for grid in ("time_uniform", "power:2", "logsnr", "karras:7", "1,0.7,0.3,0.1,0.01"):
    ...     print([round(t, 3) for t in times(VPLinear(), 4, 1e-3, grid).tolist()])
    [1.0, 0.75, 0.5, 0.251, 0.001]
    [1.0, 0.563, 0.251, 0.063, 0.001]
    [1.0, 0.722, 0.305, 0.032, 0.001]
    [1.0, 0.843, 0.592, 0.143, 0.001]
    [1.0, 0.7, 0.3, 0.1, 0.01]
    """
    function, options = named(grid)
    if function is None:
        return explicit(grid, n, process.t_min)
    t = function(process, torch.linspace(0, 1, n + 1, dtype=torch.float64), t_end, *options)
    t[-1], t[0] = t_end, 1  # without the rounding of an inverse
    if not bool((t.diff() < 0).all()):
        raise ValueError(f"sample.grid is {grid!r}: with {n} calls its times do not differ any more")
    return t


def times_to_zero(process: Process, n: int, grid: str) -> Tensor:
    """As `times`, for samplers whose last step leads to t = 0.

    Grids in lam, which is infinite there, stop at 1e-3 and jump from there. So does a power whose last call would lie
    below the times that the process knows.
    """
    function, _ = named(grid)
    if function is None:
        return explicit(grid, n, 0.0)
    if function in (time_uniform, power):
        t = times(process, n, 0.0, grid)
        if function is time_uniform or t[-2] >= process.t_min:
            return t
    return torch.cat([times(process, n - 1, max(T_END, process.t_min), grid), torch.zeros(1, dtype=torch.float64)])


def named(grid: str) -> tuple[Callable[..., Tensor] | None, tuple[float, ...]]:
    """The function of a named grid and its parameters; (None, ()) where `grid` holds or names explicit times."""
    name, colon, text = grid.partition(":")
    if name not in GRIDS:
        return None, ()
    function, default = GRIDS[name]
    if default is None and colon:
        raise ValueError(f"sample.grid is {grid!r}; {name} has no parameter")
    if default is None:
        return function, ()
    try:
        value = float(text) if colon else default
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise ValueError(f"sample.grid is {grid!r}; what follows {name}: must be a number above 0 and at most 100")
    return function, (value,)


def explicit(grid: str, n: int, least: float) -> Tensor:
    """The times that `grid` lists, or that the file of this name does; (n + 1,)."""
    allowed = f"sample.grid is {grid!r}; it must be one of {', '.join(GRIDS)} (power:2.5, karras:7), times, or a file"
    try:
        t = numbers_in(grid) if "," in grid else numbers_in(Path(grid).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{allowed} of times ({error})") from error
    if len(t) != n + 1:
        raise ValueError(
            f"sample.grid is {grid!r}: it has {len(t)} times; {n} calls (sample.sample_steps; while training "
            f"train.monitor_steps) need {n + 1}"
        )
    falls = all(a > b for a, b in zip(t[:-1], t[1:], strict=True))
    if t[0] != 1 or not falls or t[-1] < least * (1 - 1e-9):
        raise ValueError(f"sample.grid is {grid!r}: its times must fall from 1 to {least:g} or more; they are {t}")
    return torch.tensor(t, dtype=torch.float64)


def numbers_in(text: str) -> Sequence[float]:
    return [float(value) for value in text.replace(",", " ").strip().strip("[]").split()]
