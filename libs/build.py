"""From config to object: the chosen variant's own keyword-only parameters ARE its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict  # imported where a tree is made: benchmarks run without it

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "tuple": tuple}


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
            annotation = str(parameter.annotation).split("[")[0].split("|")[0].strip().strip("'")
            tree[name] = placeholder(TYPES[annotation.removeprefix("<class '")])
        else:
            tree[name] = default
    return tree


def menu(registry: Mapping[str, Callable], name: str, omit: tuple[str, ...] = ()) -> ConfigDict:
    """A config group: the chosen `name` plus one sub-tree per variant that has settings (those in `omit` left out)."""
    from ml_collections import ConfigDict

    tree = ConfigDict({"name": name})
    for key, variant in registry.items():
        options = settings(variant, omit)
        if len(options):
            tree[key] = options
    return tree


def lookup(registry: Mapping[str, Callable], name: str, setting: str) -> Callable:
    if name not in registry:
        raise ValueError(f"{setting} is {name!r}; it must be one of {', '.join(sorted(registry))}")
    return registry[name]


def build(registry: Mapping[str, Callable], group: Mapping, *args, setting: str, **kwargs):
    """Call the variant that `group.name` picks with its sub-tree; `setting` is the group's name in error messages."""
    variant = lookup(registry, group["name"], f"{setting}.name")
    options = chosen(group) | kwargs
    required = [
        name
        for name, parameter in inspect.signature(variant).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    ]
    for name in required:
        if options.get(name) is None:
            raise ValueError(f"{setting}.{group['name']}.{name} must be set")
    return variant(*args, **options)


def chosen(group: Mapping) -> dict:
    """The chosen variant's settings as a plain dict."""
    options = group.get(group["name"]) or {}
    return {key: value for key, value in options.items() if value is not None}
