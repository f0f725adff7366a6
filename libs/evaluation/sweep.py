"""What to evaluate: exit policies and their competitors, each with a sampler; and how a sweep names them."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from libs.build import chosen, lookup, settings
from libs.exits import EXIT_POLICIES, ExitPolicy, looking_back
from libs.files import read_json
from libs.models import NoEstimator
from libs.report.families import BASELINES
from libs.sampling.denoiser import Guidance
from libs.sampling.images import Images
from libs.sampling.plans import Plan
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import SAMPLERS
from libs.sampling.stored import make_plan, own_plan


@dataclass(frozen=True)
class Point:
    """One way to sample: an exit policy with a sampler."""

    family: str
    label: str
    policy: ExitPolicy
    sampler: Sampler  # with this point's guidance
    exit: dict  # the policy's name and settings, as records hold them
    plan: Plan
    solver: dict  # name, steps and grid, likewise

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.=+-]", "", re.sub("[ :/]", "-", self.label))

    def images(self, ids: np.ndarray, *, seed: int, batch_size: int, inflight: bool = False) -> Iterator[Images]:
        """This process's share of the images `ids`, batch by batch."""
        options = dict(seed=seed, plan=self.plan, policy=self.policy, batch_size=batch_size, inflight=inflight)
        return self.sampler.images(ids, **options)


@dataclass(frozen=True)
class Method:
    """A point's settings, before there is a model: how an `eval.sweep` entry reads."""

    policy: str = "full"
    settings: dict[str, Any] = field(default_factory=dict)  # differences from config.exit.<policy>
    residual: bool = False
    refresh: int = 0
    pair: str = ""  # of guidance; "" = config.sample.pair
    steps: int | None = None
    sampler: str | None = None
    grid: str | None = None  # None = config.sample.grid
    solver: dict[str, Any] = field(default_factory=dict)  # differences from config.sample.<sampler>; forecast.<setting>

    @property
    def family(self) -> str:
        """Points of one family are one method with a knob."""
        if self.residual or self.refresh:
            name = "residual" if self.residual else "refresh"
        elif any(key.startswith("forecast.") for key in self.solver):
            name = "forecast" if self.policy in BASELINES else f"{self.policy}, forecast"
        elif self.policy == "full":
            placed = self.grid is not None or self.solver
            name = "plain" if placed else "sampler" if self.sampler else "steps" if self.steps else "full"
        else:
            name = self.policy
        return f"{name}, {self.pair} pairs" if self.pair and name not in BASELINES else name

    @property
    def label(self) -> str:
        """`threshold 0.98, residual, refresh 4`: a certainty needs no name, everything else has one."""
        name = "full depth" if self.policy == "full" else self.policy
        for key, value in self.settings.items():
            value = source(value) if key == "path" else shortest(value) if isinstance(value, float) else value
            name += f" {value}" if key == "certainty" else f" {key} {value}"
        parts = [name] + ["residual"] * self.residual + [f"refresh {self.refresh}"] * (self.refresh > 0)
        if self.pair:
            parts.append(f"{self.pair} pairs")
        if self.sampler:
            parts.append(self.sampler)
        if self.steps:
            parts.append(f"{self.steps} steps")
        if self.grid is not None:
            parts.append(f"grid {self.grid or 'published'}")
        parts += [f"{key} {value}" for key, value in self.solver.items()]
        return " ".join(parts) if parts == ["full depth", f"{self.steps} steps"] else ", ".join(parts)


def shortest(value: float) -> str:
    """The shortest text that reads back as `value`: thresholds that differ anywhere are two points."""
    return repr(value).removesuffix(".0")


def source(path: str) -> str:
    """A file by its own name; where all have one, by its folder's: a point's trace, a run's last checkpoint."""
    return Path(path).parent.name if Path(path).stem in ("trace", "last") else Path(path).stem


def points(sampler: Sampler) -> list[Point]:
    """Full depth, the configured policy at each threshold, fixed layers, full depth with fewer steps, and the sweep.

    A point that is asked for twice is evaluated once. Raises ValueError for whatever this model cannot do, and for two
    files of one name, whose results would have one place.
    """
    config, model = sampler.config, sampler.model
    name, configured = config.exit.name, chosen(config.exit)
    back = {"residual": config.sample.residual, "refresh": config.sample.refresh}
    methods = [Method()]
    if isinstance(model.uem, NoEstimator) and "u" in lookup(EXIT_POLICIES, name, "exit.name").reads:
        pass  # weights of a plain U-ViT, and no threshold was asked for (load_model sees to that)
    elif "certainty" in configured:
        thresholds = config.eval.thresholds or (configured["certainty"],)
        pairs = config.eval.pairs if config.sample.scale else ()
        for pair in pairs or ("",):
            methods += [Method(name, {"certainty": float(certainty)}, pair=pair, **back) for certainty in thresholds]
    elif name != "full" or any(back.values()):
        methods.append(Method(name, **back))
    methods += [Method("fixed", {"layer": layer}) for layer in config.eval.fixed]
    methods += [Method(steps=steps) for steps in config.eval.fewer_steps]
    methods += [method for entry in config.eval.sweep for method in read_entry(entry)]
    found: dict[str, Point] = {}
    for method in methods:
        point = make_point(method, sampler)
        files = [one.exit.get("path", "") for one in (found.setdefault(point.slug, point), point)]
        if Path(files[0]).resolve() != Path(files[1]).resolve():
            raise ValueError(
                f"{files[0]} and {files[1]} would both be the point {point.slug!r}: give the files other names (of a "
                "trace or a last checkpoint, the folders)"
            )
    return list(found.values())


def make_point(method: Method, sampler: Sampler) -> Point:
    config, model = sampler.config, sampler.model
    options = chosen({"name": method.policy, method.policy: config.exit.get(method.policy)}) | method.settings
    policy = lookup(EXIT_POLICIES, method.policy, "exit.name")(**options)
    policy = looking_back(policy, residual=method.residual, refresh=method.refresh)
    policy.check(model)  # refused before any work
    if method.pair and not config.sample.scale:
        raise ValueError(f"pair is {method.pair!r} and sample.scale is 0: without guidance there are no pairs")
    name = method.sampler or config.sample.algorithm
    solver = {
        "name": name,
        "steps": config.sample.sample_steps if method.steps is None else method.steps,
        "grid": config.sample.grid if method.grid is None else method.grid,
        **set_apart(config.sample, name),
        **method.solver,
    }
    if plan := own_plan(sampler.regime.process, policy):
        if (method.steps, method.sampler, method.grid) != (None,) * 3 or method.solver:
            raise ValueError(
                f"{options['path']} holds the solver and its calls: leave steps, sampler, grid and so on out"
            )
        solver = {"name": "dpm_solver_pp_2m", "steps": plan.nfe, "grid": ",".join(f"{t:.6g}" for t in plan.t.tolist())}
    else:  # full depth beside a configured plan keeps the configured grid
        plan = make_plan(
            sampler.regime.process, config.sample, method.steps, method.sampler, method.grid, method.solver
        )
        if "forecast" in method.family and plan.nfe == plan.rows:
            raise ValueError(f"{method.label!r} computes each of its {plan.rows} calls: nothing is forecast")
    full_depth = method.policy == "planned" and not policy.asked(model.points)
    exits = {"name": method.policy, **options}
    if method.residual or method.refresh:
        exits |= {"residual": method.residual, "refresh": method.refresh}
    return Point(
        family="plain" if full_depth else method.family,  # only the calls were placed: the rival of early exit
        label=method.label,
        policy=policy,
        sampler=replace(sampler, guidance=Guidance.of(config.sample, method.pair)),
        exit=exits,
        plan=plan,
        solver=solver,
    )


def set_apart(sample, algorithm: str) -> dict:
    """The configured settings of a solver that are not its defaults."""
    own, usual = sample.get(algorithm) or {}, settings(lookup(SAMPLERS, algorithm, "sample.algorithm"))
    found = {key: value for key, value in own.items() if value is not None and value != usual.get(key)}
    if sample.forecast.every > 1:
        found |= {f"forecast.{key}": value for key, value in sample.forecast.items()}
    return found


# ---- sweep entries -------------------------------------------------------------------------------------------------

# Settings of any policy, by type; those of the solvers and of forecasts among them.
SOLVER = {"lower_order_final": True, "order": 3, "eta": 0.0, "variance": ""}
SOLVER |= {"forecast.every": 1, "forecast.order": 1, "forecast.tail": 4}
COMMON = {"residual": False, "refresh": 0, "pair": "", "steps": 1, "sampler": "", "grid": "", **SOLVER}


def read_entry(entry: str | Mapping) -> list[Method]:
    """The methods of one entry of `eval.sweep`: text (see `parse_entry`), a dict, or a JSON file with a list.

    {"policy": "threshold", "certainty": 0.9, "steps": 7, "grid": "power:2.5"} has the policy's own settings and those
    of any policy side by side. "plan=FILE" or {"plan": FILE} is a plan of scripts.calibrate.
    """
    if isinstance(entry, Mapping):
        given = dict(entry)
        if "plan" in given:
            given |= {"policy": "planned", "path": given.pop("plan")}
        policy = given.pop("policy", "full")
        common = {key: given.pop(key) for key in COMMON if key in given}
        return [checked(entry, policy, given, common)]
    if entry.startswith("plan="):  # a file of scripts.calibrate, which holds policy and solver
        return [parse_entry(f"planned.path={entry.removeprefix('plan=')}")]
    if entry.endswith(".json") and "=" not in entry:
        return [method for each in read_json(entry, "eval.sweep", list) for method in read_entry(each)]
    return [parse_entry(entry)]


def parse_entry(entry: str) -> Method:
    """One entry of `eval.sweep`: settings separated by commas, of one policy at most.

    "fixed.layer=3" | "threshold.certainty=0.9,residual=True,refresh=4" | "schedule,pair=tied" | "steps=10,sampler=ddim"
    | "steps=7,grid=power:2.5" | "steps=3,grid=(1,0.6,0.2,0.001)" | "steps=5,grid=power:2,lower_order_final=False"
    | "steps=20,forecast.every=2,forecast.order=1,forecast.tail=4"
    """
    policy, own, common = "", {}, {}
    try:
        for part in re.split(r",(?![^(]*\))", entry):  # not inside a tuple
            key, has_value, text = (piece.strip() for piece in part.partition("="))
            name, _, setting = key.partition(".")
            if key in COMMON and has_value:
                common[key] = text.strip("()") if key == "grid" else value_of(text, COMMON[key], key)
                continue
            lookup(EXIT_POLICIES, name, "the policy")
            if policy not in ("", name):
                raise ValueError(f"it names two policies, {policy} and {name}")
            policy = name
            if setting or has_value:
                known = settings(EXIT_POLICIES[name])
                if setting not in known or not has_value:
                    raise ValueError(f"{part.strip()!r} sets nothing; {name} has the settings {', '.join(known)}")
                own[setting] = value_of(text, known[setting], key)
    except ValueError as error:
        raise ValueError(f"eval.sweep entry {entry!r}: {error}") from error
    return checked(entry, policy or "full", own, common)


def checked(entry: str | Mapping, policy: str, own: dict, common: dict) -> Method:
    """The method with these settings; whatever is wrong is named together with the entry."""
    try:
        known = settings(lookup(EXIT_POLICIES, policy, "the policy"))
        if foreign := sorted(own.keys() - set(known)):
            raise ValueError(f"{foreign[0]} is no setting; {policy} has {', '.join([*known, *COMMON])}")
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        own = {key: float(value) if type(known[key]) is float else value for key, value in own.items()}
        for key, value in common.items():
            if type(value) is not type(COMMON[key]):
                raise ValueError(f"{key} is {value!r}; a value of type {type(COMMON[key]).__name__} is needed")
        lookup(SAMPLERS | {"": None}, common.get("sampler", ""), "sampler")
        if common.get("steps", 1) < 1:
            raise ValueError(f"steps is {common['steps']}; it must be at least 1")
        solver = {key: common.pop(key) for key in SOLVER if key in common}
        return Method(policy, own, **common, solver=solver)
    except ValueError as error:
        raise ValueError(f"eval.sweep entry {entry!r}: {error}") from error


def value_of(text: str, like: Any, key: str) -> Any:
    """`text` as a value of the type of `like`."""
    if isinstance(like, str) and text:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(like):
        raise ValueError(f"{key} is {text!r}; a value of type {type(like).__name__} is needed")
    return value
