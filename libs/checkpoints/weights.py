"""Weight files of this code base, U-ViT, AdaDiff, the UvA replication and DDPM's U-Net, told apart by their keys.

Layouts, with k the layers used before an exit, K of them in all:

    ours      backbone.<U-ViT key> or backbone.net.<diffusers' key>, uem.*, heads.{k}.*
    uvit      U-ViT's keys: no exits
    adadiff   U-ViT's keys and lte_classifer.{k - 1}.lte.*, k = 1..K: what they predict is certainty, 1 - u
    uva       uvit.<U-ViT key>, matrix.{k}.classifier.0.* (MLP probes), k = 0..K - 1, and a head for each of these exits
    ddpm      the keys of diffusers' UNet2DModel (google/ddpm-cifar10-32): no exits; read, not written

Files are .pth or .safetensors. Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from libs.models import DDPM, SIZES, EarlyExitModel, UNet

LAYOUTS = ("uvit", "adadiff", "uva")
ESTIMATOR, HEADS, NET = "uem.", "heads.", "backbone.net."
# What the tensors of a network do not say. It is guessed, and never held against a config.
ASSUMED = {
    "uvit": {
        "nnet.num_heads": "as published for this width, else embed_dim / 64",
        "nnet.num_clip_token": "77, CLIP's, where the position table allows it",
        "nnet.time_scale": "1/1000 in the replication, else 1",
    },
    "unet": {
        "nnet.img_size": "32, DDPM's for CIFAR-10, or the least for so many levels",
        "nnet.groups": "32, or the least width if that is smaller",
    },
}
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers' first names


# ---- files ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file or <step>.ckpt folder, on the CPU; the replication's training state holds them too.

    Raises:
        ValueError: anything else, with the file's name and the reason.
    """
    path = file_of(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} cannot be read as weights: it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} cannot be read as weights: it is a Git LFS pointer, not the file that it points to")
    if head.lstrip().startswith(b"<"):
        raise ValueError(
            f"{path} cannot be read as weights: it is a web page, as download sites send in place of a file"
        )
    if head[8:9] == b"{":
        state = read_safetensors(path)
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        state = read_pickle(path)
    else:
        raise ValueError(
            f"{path} cannot be read as weights: it is no .pth or .safetensors file (it starts with {head[:16]!r})"
        )
    if isinstance(state, dict) and "model_state_dict" in state:
        state = state["model_state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} cannot be read as weights: it holds a {type(state).__name__}, not a dict of tensors")
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise ValueError(
            f"{path} cannot be read as weights: it holds {shorten(other) or 'nothing'}, not a flat dict of tensors"
        )
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as weights: it is truncated or damaged ({error})") from error


def read_pickle(path: Path):
    """What torch.save wrote, as far as it is tensors and plain containers; argparse's Namespace is one."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a reference to {found[1]}" if found else "pickled objects"
        raise ValueError(
            f"{path} cannot be read as weights: it holds {what}. Only tensors and plain containers are read; anything "
            "else could run code"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights: it is truncated, damaged or another kind of file ({reason[:200]})"
        ) from error


def file_of(path: str | Path) -> Path:
    """The file meant by `path`: itself, or the EMA weights of a <step>.ckpt folder."""
    path = Path(path)
    path = path / "nnet_ema.pth" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no weight file at {path}")
    return path


def write(state: dict[str, Tensor], path: str | Path) -> None:
    """Atomically; the suffix .safetensors picks that format."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, part)
    else:
        torch.save(state, part)
    os.replace(part, path)


# ---- layouts -------------------------------------------------------------------------------------------------------


def kind(state: Mapping[str, Tensor]) -> str:
    """ "ours", "ddpm" or one of LAYOUTS, by what the keys say."""
    if any(key.startswith("backbone.") for key in state):
        return "ours"
    if any(key.startswith("lte_classifer.") for key in state):
        return "adadiff"
    if "uvit.mid_block.attn.qkv.weight" in state:
        return "uva"
    if "mid_block.attn.qkv.weight" in state:
        return "uvit"
    if "down_blocks.0.resnets.0.conv1.weight" in state:
        return "ddpm"
    raise ValueError(
        "unknown weights: the keys are none of this code base's, U-ViT's, AdaDiff's, the replication's or DDPM's "
        f"({shorten(list(state), 3)})"
    )


def names(layout: str, half: int) -> list[tuple[str, str]]:
    """(their prefix, our prefix) of a network with `half` in-blocks; the first pair that fits a key applies."""
    exits = range(2 * half + 1)
    if layout == "uvit":
        return [("", "backbone.")]
    if layout == "adadiff":
        return [*((f"lte_classifer.{k}.lte.", f"uem.maps.{k + 1}.") for k in exits), ("", "backbone.")]
    heads = [f"in_blocks_heads.{i}." for i in range(half)] + ["mid_block_head."]
    heads += [f"out_blocks_heads.{i}." for i in range(half)]
    pairs = [("uvit.", "backbone.")]
    for k, head in enumerate(heads):
        pairs += [(f"matrix.{k}.classifier.0.", f"uem.maps.{k}."), (head, f"heads.{k}.")]
    return pairs


def convert(state: Mapping[str, Tensor], pairs: list[tuple[str, str]], negated: str | None) -> dict[str, Tensor]:
    """Rename prefixes; the values under the old prefix `negated` change sign. Nothing is rounded."""
    renamed = {}
    for key, value in state.items():
        old, new = next(((old, new) for old, new in pairs if key.startswith(old)), (None, None))
        if old is None:
            raise ValueError(f"the key {key} has no place in this layout (of the replication's, MLP probes are read)")
        renamed[new + key.removeprefix(old)] = -value if negated and key.startswith(negated) else value
    return renamed


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any kind under this code base's names.

    AdaDiff's heads predict certainty 1 - u through a sigmoid. As 1 - sigmoid(z) = sigmoid(-z), their weights are
    negated here and in `export`, and the code knows one convention only.
    """
    layout = kind(state)
    if layout == "ours":
        return dict(state)
    if layout == "ddpm":
        old = re.compile(rf"(attentions\.\d+)\.({'|'.join(ATTENTION)})\.")
        return {NET + old.sub(lambda m: f"{m[1]}.{ATTENTION[m[2]]}.", key): state[key] for key in state}
    half = count(state, "uvit.in_blocks." if layout == "uva" else "in_blocks.")
    return convert(state, names(layout, half), negated="lte_classifer.")


def export(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """This code base's state dict in a released layout; "uvit" drops estimators and own heads, all else must fit."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    half = count(state, "backbone.in_blocks.")
    if not half:
        raise ValueError(f"layout {layout} holds a U-ViT; these weights are another network's")
    if layout == "uvit":
        state = {key: value for key, value in state.items() if key.startswith("backbone.")}
    if layout == "adadiff":
        check_adadiff(state, 2 * half + 1)
    if layout == "uva" and {key.split(".")[2] for key in state if key.startswith("uem.maps.")} != {
        str(k) for k in range(2 * half + 1)
    }:
        raise ValueError("the replication's files hold uem.name=probe at exits 0..K - 1; this model has others")
    pairs = [(ours, theirs) for theirs, ours in names(layout, half)]
    return convert(state, pairs, negated=ESTIMATOR if layout == "adadiff" else None)


def check_adadiff(state: Mapping[str, Tensor], depth: int) -> None:
    """AdaDiff's files hold a shared head and one plain linear map after every layer."""
    wanted = {f"uem.maps.{k}.{name}" for k in range(1, depth + 1) for name in ("weight", "bias")}
    found = {key for key in state if key.startswith((ESTIMATOR, HEADS))}
    if found != wanted:
        raise ValueError(
            "AdaDiff's files hold a shared head and one linear map after every layer; this model differs in "
            f"{shorten(sorted(found ^ wanted))} (nnet.heads=shared, nnet.points=(), uem.name=linear and "
            "uem.linear.norm=False would fit)"
        )
    if len(state["uem.maps.1.bias"]) != len(state["backbone.decoder_pred.bias"]):
        raise ValueError("AdaDiff's maps estimate every pixel; this model has uem.linear.output=scalar")


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix` among the keys."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


# ---- what a network's settings are, from its tensors ---------------------------------------------------------------


def infer(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The settings that a network's tensors (of any kind, also on the meta device) imply, as config leaf -> value.

    Those in ASSUMED are guesses. Nothing is said about exits where the file has none.
    """
    replication = kind(state) == "uva"
    state = to_ours(state)
    if any(key.startswith(NET) for key in state):
        return infer_unet(state)
    net = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    try:
        width, channels, patch, _ = net["patch_embed.proj.weight"].shape
        depth = 2 * count(net, "out_blocks.")
        hidden, tokens = net["mid_block.mlp.fc1.weight"].shape[0], net["pos_embed"].shape[1]
    except KeyError as error:
        raise ValueError(f"these weights are no U-ViT's: {error.args[0]} is missing") from error
    classes = len(net["label_emb.weight"]) if "label_emb.weight" in net else -1
    clip = net["context_embed.weight"].shape[1] if "context_embed.weight" in net else 0
    patches = tokens - 1 - (classes > 0)
    if clip:
        patches = patches - 77 if is_square(patches - 77) else math.isqrt(patches - 1) ** 2
    if not is_square(patches):
        raise ValueError(f"these weights are no U-ViT's: a table of {tokens} positions holds no square grid of patches")
    published = {size["embed_dim"]: size["num_heads"] for size in SIZES.values()}
    found = {
        "nnet.name": "uvit",
        "nnet.img_size": math.isqrt(patches) * patch,
        "nnet.patch_size": patch,
        "nnet.in_chans": channels,
        "nnet.embed_dim": width,
        "nnet.depth": depth,
        "nnet.num_heads": published.get(width, max(1, width // 64)),
        "nnet.mlp_ratio": hidden / width,
        "nnet.qkv_bias": "mid_block.attn.qkv.bias" in net,
        "nnet.mlp_time_embed": "time_embed.0.weight" in net,
        "nnet.time_scale": 1e-3 if replication else 1.0,
        "nnet.num_classes": classes,
        "nnet.clip_dim": clip,
        "nnet.conv": "final_layer.weight" in net,
    }
    if clip:
        found["nnet.num_clip_token"] = tokens - 1 - patches
    return found | infer_exits(state, depth + 1)


def infer_unet(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`infer` for DDPM's U-Net, whose names are ours already."""
    net = {key.removeprefix(NET): value for key, value in state.items() if key.startswith(NET)}
    depth, n_blocks = count(net, "down_blocks."), count(net, "down_blocks.0.resnets.")
    try:
        widths = tuple(len(net[f"down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(depth))
        channels = net["conv_in.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"these weights are no U-Net's: {error.args[0]} is missing") from error
    label = net.get("class_embedding.weight")
    found = {
        "nnet.name": "unet",
        "nnet.img_size": max(32, 2 ** (depth - 1)),
        "nnet.in_chans": channels,
        "nnet.widths": widths,
        "nnet.n_blocks": n_blocks,
        "nnet.attention": tuple(i for i in range(depth) if count(net, f"down_blocks.{i}.attentions.")),
        "nnet.groups": min(32, *widths),
        "nnet.num_classes": -1 if label is None else len(label),
    }
    return found | infer_exits(state, depth)


def infer_exits(state: Mapping[str, Tensor], depth: int) -> dict[str, object]:
    """The settings of heads and estimators; {} for a network without exits."""
    uem = {key.removeprefix(ESTIMATOR): value for key, value in state.items() if key.startswith(ESTIMATOR)}
    if not uem:
        return {}
    parts = {key.split(".")[0] for key in uem}
    maps = {int(key.split(".")[1]): value for key, value in uem.items() if key.startswith("maps.")}
    heads = {int(key.split(".")[1]) for key in state if key.startswith(HEADS)}
    points = tuple(sorted({*maps, *heads, depth}))  # every network can be left after its last layer
    if not maps:  # one estimator for all exits: it tells how many there are
        n = len(uem["exits.bias"])
        if not heads:
            points = tuple(range(depth + 1 - n, depth + 1)) if n in (depth, depth + 1) else None
        elif len(points) < n:  # before its first level a U-Net's exit has nothing of its own
            points = (0, *points)
    found: dict[str, object] = {"nnet.heads": "own" if heads else "shared"}
    if points is not None:
        found["nnet.points"] = () if points == tuple(range(1, depth + 1)) else points[:-1] or points

    norm = "norms" in parts
    if "exits" in parts:
        name, options = "ahead", {"hidden": len(uem["hidden.bias"])}
    elif "queries" in parts:
        name, options = "attention", {"hidden": len(uem[f"hidden.{depth}.bias"])}
    elif "shifts" in parts:
        name, options = "time_bank", {"bins": len(uem[f"shifts.{depth}.weight"]), "norm": norm}
    elif depth not in maps:
        name, options = "probe", {}
    else:
        name = "time" if "time_maps" in parts else "linear"
        options = {"norm": norm, "output": "scalar" if len(uem[f"maps.{depth}.bias"]) == 1 else "map"}
    return found | {"uem.name": name} | {f"uem.{name}.{key}": value for key, value in options.items()}


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


# ---- loading -------------------------------------------------------------------------------------------------------


def load(model: EarlyExitModel, path: str | Path, *, start: bool = False, full_depth: bool = False) -> str:
    """Load a weight file of any kind into a model; returns a sentence that says what came from where.

    Every key must fit, but for these cases. `start`, fine-tuning: estimators that the file lacks, or has under another
    uem.name, keep their initial weights, and own heads that it lacks start as copies of the loaded one. `full_depth`,
    sampling without exits: the model drops the estimators that the file lacks.

    Raises:
        ValueError: the file is refused (`read`), or it and the network differ; the message names both sides.
    """
    state = read(path)
    try:
        what = kind(state)
        state = to_ours(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    own = model.state_dict()
    if start and settings_of(state).get("uem.name") != settings_of(own).get("uem.name"):
        state = {key: value for key, value in state.items() if not key.startswith(ESTIMATOR)}
    if what == "ddpm":
        check_ddpm(file_of(path), model)
    lacks = [part for part in (ESTIMATOR, HEADS) if not any(key.startswith(part) for key in state)]
    dropped = full_depth and not start and ESTIMATOR in lacks
    no_heads = dropped and HEADS in lacks and bool(model.heads)
    if dropped:
        model.drop_exits(heads=no_heads)
        own = model.state_dict()
    fresh = [key for key in own if start and key.startswith(tuple(lacks))]
    check_fit(path, what, state, {key: value for key, value in own.items() if key not in fresh})
    model.load_state_dict({**{key: own[key] for key in fresh}, **state})
    if any(key.startswith(HEADS) for key in fresh):
        model.copy_heads()
    note = f"; {len(fresh)} estimator and head tensors start fresh" if fresh else ""
    if dropped:
        note = "; it has no uncertainty estimators, so nothing leaves early"
        note += ", and no heads of single exits: fixed layers and schedules use the common one" * no_heads
    return f"loaded {len(state)} tensors ({what} weights) from {path}{note}"


def check_ddpm(path: Path, model: EarlyExitModel) -> None:
    """Refuse weights of diffusers whose config.json, if it lies beside them, describes another network than DDPM's."""
    file = path.with_name("config.json")
    if not (file.is_file() and isinstance(model.backbone, UNet)):
        return
    theirs, ours = json.loads(file.read_text()), DDPM | {"norm_num_groups": model.backbone.settings["groups"]}
    differ = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
    if differ:
        found = ", ".join(f"{key} {theirs[key]!r} instead of {ours[key]!r}" for key in differ)
        raise ValueError(f"{path} holds another U-Net than the configured one: its config.json has {found}")


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
        raise ValueError(f"{lines[0]} it is a {theirs[name]} and nnet.name is {ours[name]!r}; take another experiment")
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


def settings_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`infer`, or {} for an unknown network."""
    try:
        return infer(state)
    except ValueError:
        return {}


def flags(settings: Mapping[str, object]) -> str:
    """Settings as the flags of a command line."""
    return " ".join(shlex.quote(f"--config.{key}={str(value).replace(' ', '')}") for key, value in settings.items())


def shorten(keys: list[str], n: int = 5) -> str:
    return ", ".join(map(str, keys[:n])) + (f" and {len(keys) - n} more" if len(keys) > n else "")
