"""The configured solver, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from libs.build import lookup, settings
from libs.sampling.plans import SAMPLERS, Plan, forecasting, regular
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
    forecast = {"every": 1, **(config_sample.get("forecast") or {})}
    forecast |= {key: solver[f"forecast.{key}"] for key in forecast if f"forecast.{key}" in solver}
    solver = {key: value for key, value in solver.items() if not key.startswith("forecast.")}
    known = settings(builder, omit=("steps", "grid"))
    if foreign := sorted(solver.keys() - set(known)):
        raise ValueError(f"{foreign[0]} is no setting of {algorithm}; it has {', '.join(known) or 'none'}")
    options = {**(config_sample.get(algorithm) or {}), **solver}
    steps = config_sample.sample_steps if steps is None else steps
    plan = builder(process, steps=steps, grid=config_sample.get("grid", "") if grid is None else grid, **options)
    if forecast["every"] == 1:
        return plan
    return forecasting(plan, process, regular(plan.rows, forecast["every"], forecast["tail"]), forecast["order"])
