"""Weights into networks: what fits is loaded, what does not is refused by the names of settings and tensors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from libs.build import flat, listed
from libs.checkpoints.files import about, file_of, read_weights, shorten, whole
from libs.checkpoints.infer import ASSUMED, experiment, settings_of
from libs.checkpoints.layouts import ESTIMATOR, GAUSSIAN, HEADS, complete, kind, to_ours
from libs.files import read_json
from libs.models import DDPM, DiT, EarlyExitModel, UNet

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def load_weights(model: EarlyExitModel, path: str | Path, *, start: bool = False, full_depth: bool = False) -> str:
    """Load a weight file of any kind into a model; returns a sentence that says what came from where.

    Every key must fit, but for these cases. `start`, fine-tuning: estimators that the file lacks, or has under another
    uem.name, keep their initial weights, exit 0's too where it is new (nnet.gaussian), and own heads that it lacks
    start as copies of the loaded one. `full_depth`, sampling without exits: the model drops the estimators that the
    file lacks.

    Raises:
        ValueError: the file is refused (`read`), or it and the network differ; the message names both sides.
    """
    state = read_weights(path)
    path = file_of(path)
    try:
        what = kind(state)
        state = to_ours(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    own = model.state_dict()
    theirs, ours = (state.get(f"{ESTIMATOR}exits.bias") for state in (state, own))  # one that looks ahead knows them
    other = theirs is not None and ours is not None and theirs.shape != ours.shape
    if start and (other or settings_of(state).get("uem.name") != settings_of(own).get("uem.name")):
        state = {key: value for key, value in state.items() if not key.startswith(ESTIMATOR)}
    if what in ("ddpm", "diffusers_dit"):
        check_beside(path, model)
        state = complete(state, own)
    lacks = [part for part in (ESTIMATOR, HEADS) if not any(key.startswith(part) for key in state)]
    dropped = full_depth and not start and ESTIMATOR in lacks
    no_heads = dropped and HEADS in lacks and bool(model.heads)
    if dropped:
        model.drop_exits(heads=no_heads, gaussian=not any(key.startswith(GAUSSIAN) for key in state))
        own = model.state_dict()
    fresh = []
    if start:  # the Gaussian is the data's, which may be others now, and a network may get an exit 0
        was = any(key.startswith(GAUSSIAN) for key in state)
        foreign = (GAUSSIAN, f"{HEADS}0.") if model.gaussian is not None else (GAUSSIAN,)
        state = {key: value for key, value in state.items() if not key.startswith(foreign)}
        if was and model.gaussian is None:
            state = {key: state[key] for key in state if key in own or not (key.startswith(ESTIMATOR) and ".0." in key)}
        new = model.gaussian is not None and {key for key in own if key.startswith(ESTIMATOR) and ".0." in key}
        fresh = [key for key in own if key.startswith((GAUSSIAN, *lacks)) or new and key in new - state.keys()]
    check_fit(path, what, state, {key: value for key, value in own.items() if key not in fresh})
    model.load_state_dict({**{key: own[key] for key in fresh}, **state})
    if any(key.startswith(HEADS) for key in fresh):
        model.copy_heads()
    fresh = [key for key in fresh if not key.startswith(GAUSSIAN)]  # which the training sets
    note = f"; {len(fresh)} estimator and head tensors start fresh" if fresh else ""
    if dropped:
        note = "; it has no uncertainty estimators, so nothing leaves early"
        note += ", and no heads of single exits: fixed layers and schedules use the common one" * no_heads
    return f"loaded {len(state)} tensors ({what} weights) from {path}{note}"


def known(path: str | Path) -> dict[str, object]:
    """Settings of the network that the tensors do not say but the file or its neighbours do, config leaf -> value.

    The config that this code base writes, the replication's `args`, or diffusers' config.json.
    """
    path = file_of(path)
    written = about(path).get("config")
    if written:
        return flat({key: written[key] for key in ("nnet", "pred", "process") if key in written})
    found = {}
    if path.suffix != ".safetensors":
        content = whole(path)
        arguments = (
            vars(content["args"]) if isinstance(content, dict) and hasattr(content.get("args"), "__dict__") else {}
        )
        if isinstance(arguments.get("normalize_timesteps"), bool):
            found["nnet.time_scale"] = 1e-3 if arguments["normalize_timesteps"] else 1.0
        if type(arguments.get("num_heads")) is int:
            found["nnet.num_heads"] = arguments["num_heads"]
    beside = path.with_name("config.json")
    if beside.is_file():
        theirs = read_json(beside, "the network's description")
        if "UNet2DModel" in str(theirs.get("_class_name", "")):
            names = {"sample_size": "nnet.img_size", "norm_num_groups": "nnet.groups"}
        elif "DiTTransformer2DModel" in str(theirs.get("_class_name", "")):
            names = {"sample_size": "nnet.img_size", "num_attention_heads": "nnet.num_heads"}
        else:
            names = {}
        found |= {ours: theirs[name] for name, ours in names.items() if type(theirs.get(name)) is int}
    return found


# Settings of the network that change how it is computed, not what.
FREE = ("nnet.attention", "nnet.use_checkpoint", "nnet.init", "nnet.dropout")


def check_config(path: str | Path, config: ConfigDict, start: bool = False) -> None:
    """Refuse a config under which the weights would mean something else than under the one they were trained with.

    Args:
        config: the settings; `nnet`, `pred` and `process` are compared with what was written beside the weights.
        start: a training starts from them and may change what it learns: only what the tensors mean is compared.

    Raises:
        ValueError: they differ; the message has both values of every setting.
    """
    theirs = known(path)
    ours = flat({"nnet": config.nnet.to_dict(), "pred": config.pred, "process": config.process})
    if start:  # a U-Net takes images of any size
        ours = {key: ours[key] for key in ASSUMED[config.nnet.name] if key != "nnet.img_size"}
    differ = [
        key
        for key, value in theirs.items()
        if key in ours and key not in FREE and listed(ours[key]) != listed(value) and value is not None
    ]
    if differ:
        lines = [f"  {key}: {theirs[key]!r} in the file, {ours[key]!r} in the config" for key in differ]
        remedy = f"set {flags({key: theirs[key] for key in differ})}" if start else "leave --config out to take these"
        lines += [f"  {remedy}; scripts.export_checkpoint --bare forgets them"]
        raise ValueError("\n".join([f"{path} was trained with other settings:", *lines]))


def check_beside(path: Path, model: EarlyExitModel) -> None:
    """Refuse weights of diffusers whose config.json, if it lies beside them, describes another network than ours."""
    beside, network = path.with_name("config.json"), model.backbone
    if not beside.is_file():
        return
    if isinstance(network, UNet):
        ours, what = DDPM | {"norm_num_groups": network.settings["groups"]}, "U-Net"
    elif isinstance(network, DiT):
        ours, what = {"sample_size": network.img_size, "num_attention_heads": network.num_heads}, "DiT"
        ours |= {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero"}
    else:
        return
    theirs = read_json(beside, "the network's description")
    differ = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
    if differ:
        found = ", ".join(f"{key} {theirs[key]!r} instead of {ours[key]!r}" for key in differ)
        raise ValueError(f"{path} holds another {what} than the configured one: its config.json has {found}")


def check_fit(
    path: str | Path,
    what: str,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    network: str = "the configured network",
) -> None:
    """Refuse a file whose keys or shapes differ from the network's, naming settings first, then tensors."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{path} ({what} weights) does not fit {network}:"]
    theirs, ours = settings_of(state), settings_of(own)
    name = "nnet.name"
    if theirs and ours and theirs[name] != ours[name]:
        raise ValueError(
            f"{lines[0]} it is a {theirs[name]} and nnet.name is {ours[name]!r}; take {experiment(theirs)}, or see "
            f"which experiments fit: python -m scripts.inspect_checkpoint {path}"
        )
    told = [key for key in theirs if key in ours and key not in ASSUMED[theirs[name]]] if theirs else []
    differ = [key for key in told if ours[key] != theirs[key]]
    lines += [f"  {key}: {theirs[key]!r} in the file, {ours[key]!r} in the config" for key in differ]
    if differ:
        lines.append(f"  the file asks for {flags({key: theirs[key] for key in theirs if key in differ})}")
    lines += [
        f"  {label}: {shorten(keys)}" for label, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    lines += [
        f"  {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network" for key in shapes[:5]
    ]
    if not any(key.startswith(ESTIMATOR) for key in state) and any(key.startswith(ESTIMATOR) for key in missing):
        lines.append(
            "  the file has no uncertainty estimators: start fine-tuning with --pretrained_weight, or evaluate it at "
            "full depth, without thresholds"
        )
    raise ValueError("\n".join(lines))


def flags(settings: Mapping[str, object]) -> str:
    """Settings as the flags of a command line."""
    return " ".join(shlex.quote(f"--config.{key}={str(value).replace(' ', '')}") for key, value in settings.items())
