"""From config to object: the chosen variant's own keyword-only parameters ARE its settings.

group("train.", keep=Number(2, 1))      settings with their ranges                      {keep: 2}
settings(Threshold)                     a variant's parameters and their defaults       {certainty: 0.95}
menu(EXIT_POLICIES, "threshold")        a choice, and the settings of every variant     {name, threshold: {...}, ...}
chosen(config.exit)                     the chosen variant's settings, as a dict        {certainty: 0.95}
in_use(config)                          the whole tree, less the variants not chosen
build(EXIT_POLICIES, config.exit, ...)  the object
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict  # imported where a tree is made: benchmarks run without it

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "tuple": tuple}


# ---- numbers and their ranges --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """The default of a setting that is a number, or several, and what it may be: `least` to `most`, or `below`."""

    default: float | tuple
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __str__(self) -> str:
        bounds = [
            ("at least", self.least, -math.inf),
            ("at most", self.most, math.inf),
            ("below", self.below, math.inf),
        ]
        kind = "numbers" if isinstance(self.default, tuple) else "a number"
        ends = " and ".join(f"{word} {end}" for word, end, open_ in bounds if end != open_)
        return f"must be {kind}{', ' * bool(ends)}{ends}"

    def allows(self, value) -> bool:
        if isinstance(self.default, tuple):
            return isinstance(value, tuple | list) and all(self.inside(one) for one in value)
        return self.inside(value)

    def inside(self, value) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and self.least <= value <= self.most and value < self.below


RANGES: dict[str, Number] = {}  # by the setting's full name; `group` fills it
MAY_CHANGE: set[str] = set()  # what a resumed run may change; configs/base.py says it


def group(prefix: str, **values) -> ConfigDict:
    """A group of settings, `prefix` in front of their names; a `Number` brings its range along."""
    for name, value in values.items():
        if isinstance(value, Number):
            RANGES[f"{prefix}{name}"] = value
    from ml_collections import ConfigDict

    return ConfigDict({name: value.default if isinstance(value, Number) else value for name, value in values.items()})


def check_ranges(config) -> None:
    """ValueError for the first number of `config` that lies outside of its declared range, and for unfit seeds."""
    values = flat(config.to_dict())
    for name, number in RANGES.items():
        if name in values and not number.allows(values[name]):
            raise ValueError(f"{name} is {values[name]}; it {number}")
    seeds, selection = tuple(config.eval.seeds), config.eval.selection_seed
    if not seeds or len(set(seeds)) < len(seeds) or selection in seeds:
        raise ValueError(
            f"eval.seeds is {seeds}; it must hold at least one seed, none twice, and not eval.selection_seed, "
            f"{selection}, which chooses and is not reported"
        )


def check_at_least(prefix: str, least: float = 1, **settings: float) -> None:
    """Refuse a setting below `least`: name=value, `prefix` in front of the name."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{prefix}{name} is {value}; it must be at least {least}")


# ---- trees of settings ---------------------------------------------------------------------------------------------


def settings(variant: Callable, omit: tuple[str, ...] = ()) -> ConfigDict:
    """The keyword-only parameters of `variant` with their defaults; required ones are typed placeholders."""
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    tree = ConfigDict()
    for name, parameter in inspect.signature(variant).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in omit:
            continue
        default = parameter.default
        if default is parameter.empty or default is None:
            annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
            tree[name] = placeholder(TYPES[annotation.split("[")[0].split("|")[0].strip()])
        else:
            tree[name] = default
    return tree


VARIANTS: set[str] = set()  # what stands on a menu; `menu` fills it


def menu(registry: Mapping[str, Callable], name: str, omit: tuple[str, ...] = ()) -> ConfigDict:
    """A config group: the chosen `name` plus one sub-tree per variant that has settings (those in `omit` left out)."""
    from ml_collections import ConfigDict

    VARIANTS.update(registry)
    tree = ConfigDict({"name": name})
    for key, variant in registry.items():
        options = settings(variant, omit)
        if len(options):
            tree[key] = options
    return tree


def lookup(choices: Collection[str], name: str, setting: str):
    """What `name` stands for among the choices, itself where they are mere names; a ValueError if it is none."""
    if name not in choices:
        near = nearest(name, choices)
        raise ValueError(f"{setting} is {name!r}; it must be one of {', '.join(sorted(choices))}{near}")
    return choices[name] if isinstance(choices, Mapping) else name


def build(registry: Mapping[str, Callable], group: Mapping, *args, setting: str, **kwargs):
    """Call the variant that `group.name` picks with its sub-tree; `setting` is the group's name in error messages."""
    variant = lookup(registry, group["name"], f"{setting}.name")
    options, parameters = chosen(group) | kwargs, inspect.signature(variant).parameters
    for name in (key for key in kwargs if key not in parameters):
        others = ", ".join(key for key in registry if name in inspect.signature(registry[key]).parameters)
        raise ValueError(
            f"{setting}.{name} is {kwargs[name]!r}, which {setting}.name={group['name']} does not take; {others} do"
        )
    for name, parameter in parameters.items():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and options.get(name) is None:
            raise ValueError(f"{setting}.{group['name']}.{name} must be set")
    return variant(*args, **options)


def chosen(group: Mapping) -> dict:
    """The chosen variant's settings as a plain dict."""
    options = group.get(group["name"]) or {}
    return {key: value for key, value in options.items() if value is not None}


def flat(tree: Mapping, prefix: str = "") -> dict:
    """Nested settings as one level, full name -> value."""
    out: dict = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def in_use(tree: Mapping) -> dict:
    """Nested settings without the menus' variants that are not chosen."""
    chosen_name = tree.get("name", tree.get("algorithm"))
    return {
        key: in_use(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not isinstance(value, Mapping) or chosen_name in (None, key) or key not in VARIANTS
    }


def differences(old: Mapping, new: Mapping) -> dict[str, tuple]:
    """Settings in use that both trees have with other values: full name -> (old, new). Tuples equal lists (JSON)."""
    a, b = flat(in_use(old)), flat(in_use(new))
    plain = {key: (listed(a[key]), listed(b[key])) for key in b if key in a}
    return {key: pair for key, pair in plain.items() if pair[0] != pair[1]}


def listed(value):
    """With lists in place of tuples, as JSON has it."""
    return [listed(one) for one in value] if isinstance(value, tuple | list) else value


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?" for a misspelt name, "" if nothing is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
