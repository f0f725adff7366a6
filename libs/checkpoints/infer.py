"""What a network's settings are, from its tensors."""

import math
from collections.abc import Mapping

from torch import Tensor

from libs.checkpoints.layouts import DIT_MARK, ESTIMATOR, GAUSSIAN, HEADS, NET, kind, numbered, to_ours
from libs.models import DIT_SIZES, SIZES

# What the tensors of a network do not say. It is guessed, and never held against a config.
ASSUMED = {
    "uvit": {
        "nnet.num_heads": "as published for this width, else embed_dim / 64",
        "nnet.num_clip_token": "77, CLIP's, where the position table allows it",
        "nnet.time_scale": "1/1000 in the replication but its first files, else 1",
    },
    "unet": {
        "nnet.img_size": "32, DDPM's for CIFAR-10, or the least for so many levels",
        "nnet.groups": "32, or the least width if that is smaller",
    },
    "dit": {
        "nnet.num_heads": "as published for this width, else embed_dim / 64",
        "nnet.convention": "dit: a SiT has the same tensors, and needs sit",
    },
}


def infer(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The settings that a network's tensors (of any kind, also on the meta device) imply, as config leaf -> value.

    Those in ASSUMED are guesses. Nothing is said about exits where the file has none.

    Raises:
        ValueError: no network has these tensors.
    """
    try:
        return infer_network(state)
    except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"no network has these tensors ({type(error).__name__}: {str(error)[:120]})") from error


def infer_network(state: Mapping[str, Tensor]) -> dict[str, object]:
    scaled = kind(state) == "uva" and not any(key.startswith("in_blocks_classifiers.") for key in state)
    state = to_ours(state)
    if any(key.startswith(NET) for key in state):
        return infer_unet(state)
    if DIT_MARK in state:
        return infer_dit(state)
    net = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    try:
        width, channels, patch, _ = net["patch_embed.proj.weight"].shape
        depth = 2 * numbered(net, "out_blocks.")
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
        "nnet.time_scale": 1e-3 if scaled else 1.0,
        "nnet.num_classes": classes,
        "nnet.clip_dim": clip,
        "nnet.conv": "final_layer.weight" in net,
        "nnet.skip": "out_blocks.0.skip_linear.weight" in net,
    }
    if clip:
        found["nnet.num_clip_token"] = tokens - 1 - patches
    return found | infer_exits(state, depth + 1)


def infer_unet(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`infer` for DDPM's U-Net, whose names are ours already."""
    net = {key.removeprefix(NET): value for key, value in state.items() if key.startswith(NET)}
    depth, n_blocks = numbered(net, "down_blocks."), numbered(net, "down_blocks.0.resnets.")
    try:
        widths = tuple(len(net[f"down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(depth))
        channels = net["conv_in.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"these weights are no U-Net's: {error.args[0]} is missing") from error
    label, basis = net.get("class_embedding.weight"), state.get(f"{GAUSSIAN}basis")
    found = {
        "nnet.name": "unet",
        "nnet.img_size": max(32, 2 ** (depth - 1)) if basis is None else math.isqrt(basis.shape[1] // channels),
        "nnet.in_chans": channels,
        "nnet.widths": widths,
        "nnet.n_blocks": n_blocks,
        "nnet.attention": tuple(i for i in range(depth) if numbered(net, f"down_blocks.{i}.attentions.")),
        "nnet.groups": min(32, *widths),
        "nnet.num_classes": -1 if label is None else len(label),
    }
    parts = {part for key in state if key.startswith(HEADS) for part in key.split(".")[2:3]}
    if parts:
        of_parts = {"proj": "bridge", "weight": "duplicate", "bias": "duplicate"}
        found["nnet.missing"] = of_parts.get(sorted(parts)[0], "interpolate")
    return found | infer_exits(state, depth)


def infer_dit(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`infer` for DiT and SiT. Without a table of positions (diffusers) the latents are taken for ImageNet-256's."""
    net = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    try:
        width, channels, patch, _ = net["x_embedder.proj.weight"].shape
        hidden, outputs = len(net["blocks.0.mlp.fc1.bias"]), len(net["final_layer.linear.bias"])
    except KeyError as error:
        raise ValueError(f"these weights are no DiT's: {error.args[0]} is missing") from error
    depth, label = numbered(net, "blocks."), net.get("y_embedder.embedding_table.weight")
    table = net.get("pos_embed")
    if table is not None and not is_square(table.shape[1]):
        raise ValueError(f"these weights are no DiT's: {table.shape[1]} positions are no square grid of patches")
    published = {size["embed_dim"]: size["num_heads"] for size in DIT_SIZES.values()}
    found = {
        "nnet.name": "dit",
        "nnet.img_size": 32 if table is None else math.isqrt(table.shape[1]) * patch,
        "nnet.patch_size": patch,
        "nnet.in_chans": channels,
        "nnet.embed_dim": width,
        "nnet.depth": depth,
        "nnet.num_heads": published.get(width, max(1, width // 64)),
        "nnet.mlp_ratio": hidden / width,
        "nnet.num_classes": -1 if label is None else len(label),
        "nnet.learn_sigma": outputs == 2 * patch * patch * channels,
        "nnet.convention": "dit",
    }
    return found | infer_exits(state, depth)


def experiment(settings: Mapping[str, object]) -> str:
    """The file of configs/ for a network with these settings, as far as its size tells."""
    name = settings["nnet.name"]
    if name == "dit" and settings["nnet.embed_dim"] == DIT_SIZES["XL"]["embed_dim"]:
        size = 8 * settings["nnet.img_size"]
        return f"configs/imagenet{size}_dit_xl.py (SiT: configs/imagenet{size}_sit_xl.py)"
    return f"configs/*_{name}_*.py"


def infer_exits(state: Mapping[str, Tensor], depth: int) -> dict[str, object]:
    """The settings of heads and estimators; {} for a network without exits."""
    uem = {key.removeprefix(ESTIMATOR): value for key, value in state.items() if key.startswith(ESTIMATOR)}
    if not uem:
        return {}
    parts = {key.split(".")[0] for key in uem}
    maps = {int(key.split(".")[1]): value for key, value in uem.items() if key.startswith("maps.")}
    heads = {int(key.split(".")[1]) for key in state if key.startswith(HEADS)}
    points = tuple(sorted({*maps, *heads, depth}))  # every network can be left after its last layer
    if "map" in parts:  # one classifier for all exits: own heads tell how many there are
        points = points if heads else None
    elif not maps:  # it looks ahead, and has an output for every exit
        n = len(uem["exits.bias"])
        if not heads:
            points = tuple(range(depth + 1 - n, depth + 1)) if n in (depth, depth + 1) else None
        elif len(points) < n:  # before its first level a U-Net's exit has nothing of its own
            points = (0, *points)
    basis = state.get(f"{GAUSSIAN}basis")
    found: dict[str, object] = {
        "nnet.heads": "own" if heads else "shared",
        "nnet.gaussian": 0 if basis is None else basis.shape[2],
    }
    if points is not None:
        every = tuple(range(basis is None, depth + 1))
        found["nnet.points"] = () if points == every else points[:-1] or points

    norm = "norms" in parts
    if "map" in parts:
        name, options = "shared", {}
    elif any(key.endswith(".q") for key in uem):
        name, options = "attention_probe", {}
    elif "exits" in parts:
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


def settings_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`infer`, or {} for an unknown network."""
    try:
        return infer(state)
    except ValueError:
        return {}
