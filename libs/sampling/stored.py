"""Plans of sampling: the configured solver, and files of scripts.calibrate --budget, which lie beside the weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from libs.build import lookup, settings
from libs.checkpoints import file_of
from libs.exits.planned import Planned
from libs.exits.policy import ExitPolicy, Wrapped
from libs.files import read_json
from libs.sampling.plans import Plan, forecasting, regular
from libs.sampling.solvers import SAMPLERS, dpm_solver_pp_2m
from sde import Process


def make_plan(
    process: Process,
    config_sample,
    steps: int | None = None,
    algorithm: str | None = None,
    grid: str | None = None,
    solver: Mapping = MappingProxyType({}),
) -> Plan:
    """The solver of config.sample; `steps` (network evaluations), `algorithm` and `grid` (grids.py) override it.

    `solver` overrides settings of the algorithm, config.sample.<algorithm>, or "forecast.<setting>" of
    config.sample.forecast; one that there is not is a ValueError.
    """
    algorithm = algorithm or config_sample.algorithm
    builder = lookup(SAMPLERS, algorithm, "sample.algorithm")
    forecast = dict(config_sample.forecast)
    forecast |= {key: solver[f"forecast.{key}"] for key in forecast if f"forecast.{key}" in solver}
    solver = {key: value for key, value in solver.items() if not key.startswith("forecast.")}
    known = settings(builder, omit=("steps", "grid"))
    if foreign := sorted(solver.keys() - set(known)):
        raise ValueError(f"{foreign[0]} is no setting of {algorithm}; it has {', '.join(known) or 'none'}")
    options = {**(config_sample.get(algorithm) or {}), **solver}
    steps = config_sample.sample_steps if steps is None else steps
    plan = builder(process, steps=steps, grid=config_sample.grid if grid is None else grid, **options)
    if forecast["every"] == 1:
        return plan
    return forecasting(plan, process, regular(plan.rows, forecast["every"], forecast["tail"]), forecast["order"])


def plan_of(process: Process, stored: dict) -> Plan:
    """The table of the "plan" part of a file: DPM-Solver++(2M) at the stored times, with the stored forecasts."""
    nodes = ",".join(map(repr, stored["nodes"]))
    rows = len(stored["nodes"]) - 1
    plan = dpm_solver_pp_2m(process, steps=rows, grid=nodes, lower_order_final=stored["lower_order_final"])
    return plan if all(stored["computed"]) else forecasting(plan, process, stored["computed"], stored["order"])


def own_plan(process: Process, policy: ExitPolicy) -> Plan | None:
    """The table of a `policy` that is planned, whatever is wrapped around it; None for any other."""
    while isinstance(policy, Wrapped):
        policy = policy.inner
    return plan_of(process, policy.stored) if isinstance(policy, Planned) else None


OF_A_RUN = ("nnet.pth", "nnet_ema.pth", "best.pth")


def name_beside(weights: str | Path, name: str) -> str:
    """`name` of a file beside `weights`, with theirs in front unless they are a run's, with a folder of their own."""
    file = file_of(weights)
    return name if file.name in OF_A_RUN else f"{file.stem}-{name}"


def plan_name(weights: str | Path, what: str) -> str:
    """The name of the plan `what` ("budget-0.2") of `weights`."""
    return name_beside(weights, f"plan-{what}.json")


def all_beside(weights: str | Path) -> dict[float, Path]:
    """The files of all budgets for which a plan lies beside the weights, ascending."""
    file, found = file_of(weights), {}
    for path in file.parent.glob(plan_name(file, "budget-*")):
        if match := re.search(r"plan-budget-([0-9.]+)\.json$", path.name):
            found[float(match[1])] = path
    for path in file.parent.glob("plan-budget-*.json"):  # as earlier versions named those of any .pth file
        match = re.fullmatch(r"plan-budget-([0-9.]+)\.json", path.name)
        if match and file.suffix != ".safetensors" and file.name not in OF_A_RUN:
            if Path(read_json(path, "a plan beside the weights").get("nnet_path", "")).name == file.name:
                found.setdefault(float(match[1]), path)
    return dict(sorted(found.items()))


def beside(weights: str | Path, budget: float) -> Planned:
    """The plan of `budget` that lies beside the weights.

    Raises:
        ValueError: there is none; the message lists those that are there.
    """
    found = all_beside(weights)
    if budget not in found:
        there = ", ".join(f"{value:g}" for value in found) or "none"
        raise ValueError(
            f"budget is {budget}; beside {weights} there are plans for: {there}. "
            f"Make one with python -m scripts.calibrate --nnet_path={weights} --budget={budget}"
        )
    return Planned(path=str(found[budget]))
