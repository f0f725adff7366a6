"""The configured solver, as a table."""

from __future__ import annotations

from libs.build import lookup
from libs.sampling.plans import SAMPLERS, Plan, forecasting, regular
from sde import Process


def make_plan(
    process: Process,
    config_sample,
    steps: int | None = None,
    algorithm: str | None = None,
    grid: str | None = None,
) -> Plan:
    """The solver of config.sample; `steps` (network evaluations), `algorithm` and `grid` (grids.py) override it."""
    algorithm = algorithm or config_sample.algorithm
    builder = lookup(SAMPLERS, algorithm, "sample.algorithm")
    options = dict(config_sample.get(algorithm) or {})
    steps = config_sample.sample_steps if steps is None else steps
    plan = builder(process, steps=steps, grid=config_sample.get("grid", "") if grid is None else grid, **options)
    forecast = config_sample.get("forecast") or {"every": 1}
    if forecast["every"] == 1:
        return plan
    return forecasting(plan, process, regular(plan.rows, forecast["every"], forecast["tail"]), forecast["order"])
