"""Plans of sampling in files of scripts.calibrate --budget, which lie beside the weights they were made for."""

from __future__ import annotations

import re
from pathlib import Path

from libs.checkpoints import file_of
from libs.exits.planned import Planned
from libs.sampling.plans import Plan, dpm_solver_pp_2m, forecasting
from sde import Process


def plan_of(process: Process, stored: dict) -> Plan:
    """The table of the "plan" part of a file: DPM-Solver++(2M) at the stored times, with the stored forecasts."""
    nodes = ",".join(map(repr, stored["nodes"]))
    rows = len(stored["nodes"]) - 1
    plan = dpm_solver_pp_2m(process, steps=rows, grid=nodes, lower_order_final=stored["lower_order_final"])
    return plan if all(stored["computed"]) else forecasting(plan, process, stored["computed"], stored["order"])


def plan_name(weights: str | Path, what: str) -> str:
    """The name of the plan `what` ("budget-0.2") of `weights`: a .safetensors file shares its folder with others."""
    file = file_of(weights)
    return f"{file.stem}-plan-{what}.json" if file.suffix == ".safetensors" else f"plan-{what}.json"


def all_beside(weights: str | Path) -> dict[float, Path]:
    """The files of all budgets for which a plan lies beside the weights, ascending."""
    file, found = file_of(weights), {}
    for path in file.parent.glob(plan_name(file, "budget-*")):
        if match := re.search(r"plan-budget-([0-9.]+)\.json$", path.name):
            found[float(match[1])] = path
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
            f"Make one with python -m scripts.calibrate --budget={budget}"
        )
    return Planned(path=str(found[budget]))
