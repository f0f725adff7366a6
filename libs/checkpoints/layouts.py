"""The layouts of weight files, told apart by their keys and renamed into this code base's own.

With k the layers used before an exit, K of them in all:

    ours      backbone.<U-ViT key> or backbone.net.<diffusers' key>, uem.*, heads.{k}.*, gaussian.*
    uvit      U-ViT's keys: no exits
    adadiff   U-ViT's keys and lte_classifer.{k - 1}.lte.*, k = 1..K: what they predict is certainty, 1 - u
    uva       uvit.<U-ViT key>, matrix.{k}.* (MLP or attention probes), k = 0..K - 1, and a head for each of these
              exits; in its first files {in,out}_blocks_classifiers.{i}.* and mid_block_classifier.*
    ddpm      the keys of diffusers' UNet2DModel (google/ddpm-cifar10-32): no exits; read, not written
    dit       the keys of DiT's and SiT's .pt files, which are the same: no exits
    diffusers_dit   those of diffusers' DiTTransformer2DModel, which has no table of positions: read, not written
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from libs.build import lookup
from libs.checkpoints.files import shorten

LAYOUTS = ("uvit", "adadiff", "uva", "dit")
ESTIMATOR, HEADS, NET, GAUSSIAN = "uem.", "heads.", "backbone.net.", "gaussian."
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of `modern_attention`
DIT_MARK = "backbone.x_embedder.proj.weight"  # every DiT has it, and nothing else
DIFFUSERS_DIT = (  # diffusers' prefixes -> DiT's; {i} stands in both for the number of a block
    ("pos_embed.proj.", "x_embedder.proj."),
    ("transformer_blocks.{i}.norm1.linear.", "blocks.{i}.adaLN_modulation.1."),
    ("transformer_blocks.{i}.attn1.to_out.0.", "blocks.{i}.attn.proj."),
    ("transformer_blocks.{i}.ff.net.0.proj.", "blocks.{i}.mlp.fc1."),
    ("transformer_blocks.{i}.ff.net.2.", "blocks.{i}.mlp.fc2."),
    ("proj_out_1.", "final_layer.adaLN_modulation.1."),
    ("proj_out_2.", "final_layer.linear."),
)
CONDITION = (  # parts that diffusers stores once more in every block
    ("timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("class_embedder.embedding_table.", "y_embedder.embedding_table."),
)


def kind(state: Mapping[str, Tensor]) -> str:
    """ "ours", "ddpm", "diffusers_dit" or one of LAYOUTS, by what the keys say."""
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
    if "x_embedder.proj.weight" in state:
        return "dit"
    if "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in state:
        return "diffusers_dit"
    raise ValueError(
        "unknown weights: the keys are none of this code base's, U-ViT's, AdaDiff's, the replication's, DDPM's, DiT's "
        f"or SiT's ({shorten(list(state), 3)})"
    )


def weight_names(layout: str, half: int, attention: bool = False) -> list[tuple[str, str]]:
    """(their prefix, our prefix) of a network with `half` in-blocks; the first pair that fits a key applies.

    `attention`: the replication's probes are the attentive ones.
    """
    exits = range(2 * half + 1)
    if layout == "uvit":
        return [("", "backbone.")]
    if layout == "adadiff":
        return [*((f"lte_classifer.{k}.lte.", f"uem.maps.{k + 1}.") for k in exits), ("", "backbone.")]
    heads = [f"in_blocks_heads.{i}." for i in range(half)] + ["mid_block_head."]
    heads += [f"out_blocks_heads.{i}." for i in range(half)]
    pairs = [("uvit.", "backbone.")]
    for k, head in enumerate(heads):
        pairs += [(f"matrix.{k}.{'' if attention else 'classifier.0.'}", f"uem.maps.{k}."), (head, f"heads.{k}.")]
    return pairs


def modern_attention(key: str) -> str:
    """A tensor's name with what diffusers calls the attention's maps today, whatever it called them first."""
    return re.sub(
        rf"(attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\.", lambda m: f"{m[1]}.{ATTENTION_NAMES[m[2]]}.", key
    )


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The replication's state with `matrix.{k}` for its probes, as its later files have it.

    The first files have a probe for the middle block that was never run: the public code asked the last in-block's
    there once more, and so does this.

    Raises:
        ValueError: one probe for each timestep.
    """
    if any("," in key for key in state) or "matrix.999.classifier.0.weight" in state:
        raise ValueError(
            "these probes are one for each timestep. The public code trained them with the timestep of the batch's "
            "first row for all rows, so they say nothing about the others: train uem.name=time_bank instead"
        )
    half, renamed = numbered(state, "uvit.in_blocks."), {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "in_blocks_classifiers":
            renamed[f"matrix.{rest}"] = value
            if rest.startswith(f"{half - 1}."):
                renamed[f"matrix.{half}.{rest.partition('.')[2]}"] = value
        elif part == "out_blocks_classifiers":
            i, _, name = rest.partition(".")
            renamed[f"matrix.{half + 1 + int(i)}.{name}"] = value
        elif part != "mid_block_classifier":
            renamed[key] = value
    return renamed


def convert(state: Mapping[str, Tensor], pairs: list[tuple[str, str]], negated: str | None) -> dict[str, Tensor]:
    """Rename prefixes; the values under the old prefix `negated` change sign. Nothing is rounded."""
    renamed = {}
    for key, value in state.items():
        old, new = next(((old, new) for old, new in pairs if key.startswith(old)), (None, None))
        if old is None:
            raise ValueError(f"the key {shorten([key])} has no place in this layout")
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
        return {NET + modern_attention(key): value for key, value in state.items()}
    if layout == "dit":
        return convert(state, [("", "backbone.")], negated=None)
    if layout == "diffusers_dit":
        return from_diffusers_dit(state)
    if layout == "uva":
        state = modern(state)
        return convert(
            state, weight_names(layout, numbered(state, "uvit.in_blocks."), "matrix.0.q" in state), negated=None
        )
    half = numbered(state, "in_blocks.")
    if layout == "adadiff":  # with an odd depth the public code makes one head more than it runs
        unused = re.compile(rf"lte_classifer\.{2 * half + 1}\.")
        state = {key: value for key, value in state.items() if not unused.match(key)}
    return convert(state, weight_names(layout, half), negated="lte_classifer.")


def from_diffusers_dit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' names -> ours. Queries, keys and values are one map in DiT, and the embeddings of time and label one.

    Raises:
        ValueError: a key has no place, or two blocks embed the time or the label differently.
    """
    blocks = range(numbered(state, "transformer_blocks."))
    pairs = [
        (old.format(i=i), new.format(i=i)) for old, new in DIFFUSERS_DIT for i in (blocks if "{i}" in old else (0,))
    ]
    pairs += [(f"transformer_blocks.0.norm1.emb.{old}", new) for old, new in CONDITION]
    state, joined = dict(state), {}
    for i in blocks:
        for part in ("weight", "bias"):
            maps = [state.pop(f"transformer_blocks.{i}.attn1.to_{name}.{part}") for name in "qkv"]
            joined[f"backbone.blocks.{i}.attn.qkv.{part}"] = torch.cat(maps)
    for key in [key for key in state if re.match(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.", key)]:
        first, copy = state.get(re.sub(r"\.\d+\.", ".0.", key, count=1)), state.pop(key)
        if first is None or not (copy.is_meta or torch.equal(first, copy)):
            raise ValueError(f"{key} differs from block 0's; a DiT embeds the time and the label once for all blocks")
    return convert(state, [(old, f"backbone.{new}") for old, new in pairs], negated=None) | joined


def complete(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with what its layout leaves out because it is constant: a DiT's table of positions, from the network."""
    key = "backbone.pos_embed"
    return {key: own[key], **state} if DIT_MARK in state and key in own else dict(state)


def export(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """This code base's state dict in a released layout.

    "uvit" and "dit" drop estimators and own heads; in the others all must fit.
    """
    if lookup(LAYOUTS, layout, "layout") == "dit":
        if DIT_MARK not in state:
            raise ValueError("layout dit holds a DiT or SiT; these weights are another network's")
        network = {key: value for key, value in state.items() if key.startswith("backbone.")}
        return convert(network, [("backbone.", "")], negated=None)
    half = numbered(state, "backbone.in_blocks.")
    if not half:
        raise ValueError(f"layout {layout} holds a U-ViT; these weights are another network's")
    if layout == "uvit":
        state = {key: value for key, value in state.items() if key.startswith("backbone.")}
    if layout == "adadiff":
        check_adadiff(state, 2 * half + 1)
    if layout == "uva" and {key.split(".")[2] for key in state if key.startswith("uem.maps.")} != {
        str(k) for k in range(2 * half + 1)
    }:
        raise ValueError(
            "the replication's files hold uem.name=probe or attention_probe at exits 0..K - 1; this model has others"
        )
    pairs = [(ours, theirs) for theirs, ours in weight_names(layout, half, "uem.maps.0.q" in state)]
    return convert(state, pairs, negated=ESTIMATOR if layout == "adadiff" else None)


def check_adadiff(state: Mapping[str, Tensor], depth: int) -> None:
    """AdaDiff's files hold a shared head and one plain linear map after every layer."""
    wanted = {f"uem.maps.{k}.{name}" for k in range(1, depth + 1) for name in ("weight", "bias")}
    found = {key for key in state if key.startswith((ESTIMATOR, HEADS))}
    if found != wanted:
        raise ValueError(
            "AdaDiff's files hold a shared head and one linear map after every layer; this model differs in "
            f"{shorten(sorted(found ^ wanted))} (nnet.heads=shared, nnet.points=(), nnet.gaussian=0, uem.name=linear "
            "and uem.linear.norm=False would fit)"
        )
    if len(state["uem.maps.1.bias"]) != len(state["backbone.decoder_pred.bias"]):
        raise ValueError("AdaDiff's maps estimate every pixel; this model has uem.linear.output=scalar")


def numbered(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix` among the keys."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
