"""Weight files of this code base, U-ViT and AdaDiff: told apart by their keys, read and written without executing code."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from libs.models import EarlyExitModel

# AdaDiff's "lte" heads predict certainty 1 - u through a sigmoid. Since 1 - sigmoid(z) = sigmoid(-z), their weights are
# negated on the way in and out, and the code knows one convention only.
ADADIFF = re.compile(r"lte_classifer\.(\d+)\.lte\.(weight|bias)")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, on the CPU. Refuses anything that is not a flat dict of tensors."""
    path = file_of(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights: it is truncated, no tensor file, or holds pickled code, which is never "
            f"executed ({reason})"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a flat dict of tensors")
    return state


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


def kind(state: dict[str, Tensor]) -> str:
    """ "ours", "adadiff" or "uvit", by what the keys say."""
    if any(key.startswith("backbone.") for key in state):
        return "ours"
    if any(ADADIFF.fullmatch(key) for key in state):
        return "adadiff"
    if "mid_block.attn.qkv.weight" in state:
        return "uvit"
    raise ValueError(
        f"unknown weights: none of this code base's, AdaDiff's or U-ViT's keys (first key: {next(iter(state))})"
    )


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A U-ViT or AdaDiff state dict under this code base's names."""
    if kind(state) == "ours":
        return state
    ours = {}
    for key, value in state.items():
        if match := ADADIFF.fullmatch(key):
            ours[f"uem.maps.{int(match[1]) + 1}.{match[2]}"] = -value
        else:
            ours[f"backbone.{key}"] = value
    return ours


def export(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """This code base's state dict in the released layout "uvit" (drops the estimator) or "adadiff"."""
    if layout not in ("uvit", "adadiff"):
        raise ValueError(f"layout is {layout!r}; it must be uvit or adadiff")
    released = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    if layout == "adadiff":
        foreign = [key for key in state if key.startswith(("heads.", "uem.")) and not key.startswith("uem.maps.")]
        if foreign:
            raise ValueError(
                f"AdaDiff files hold shared heads and plain linear maps only; this model also has {foreign[0]} "
                "(nnet.heads=shared, uem.name=linear, uem.linear.norm=False would fit)"
            )
        for key, value in state.items():
            if key.startswith("uem.maps."):
                k, name = key.removeprefix("uem.maps.").split(".")
                released[f"lte_classifer.{int(k) - 1}.lte.{name}"] = -value
    return released


def load(model: EarlyExitModel, path: str | Path, *, start: bool = False) -> str:
    """Load a weight file of any known kind; returns a sentence that says what came from where.

    Every key must fit. With `start` (fine-tuning), a file without estimators or own heads may begin a run: the
    estimators keep their initial weights and own heads start as copies of the loaded one.
    """
    state = read(path)
    what = kind(state)
    state = to_ours(state)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    fresh = [key for key in missing if key.startswith(("uem.", "heads."))] if start else []
    missing = [key for key in missing if key not in fresh]
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        lines = [f"{path} ({what} weights) does not fit the configured network:"]
        lines += [
            f"  {label}: {shorten(keys)}" for label, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        lines += [
            f"  {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
            for key in sorted(shapes)[:5]
        ]
        if not start and any(key.startswith("uem.") for key in missing) and not unexpected and not shapes:
            lines.append(
                "  a plain U-ViT file has no uncertainty estimator: start fine-tuning with --pretrained_weight"
            )
        raise ValueError("\n".join(lines))
    model.load_state_dict({**{key: own[key] for key in fresh}, **state})
    if any(key.startswith("heads.") for key in fresh):
        model.copy_heads()
    note = f"; {len(fresh)} estimator and head tensors start fresh" if fresh else ""
    return f"loaded {len(state)} tensors ({what} weights) from {path}{note}"


def shorten(keys: list[str], n: int = 5) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")
