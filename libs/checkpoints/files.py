"""Weight files (.pth, .safetensors, <step>.ckpt folders) and what is known about them. Nothing in them is executed."""

import argparse
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from libs.files import atomic_write, first_line, read_json

# Under these names public training states keep their weights; the averaged ones come first.
WRAPPERS = ("ema", "model_ema", "state_dict", "model_state_dict", "model", "nnet")
ABOUT = ("config", "class_names")
INSIDE = "archive/extra/about.json"  # the member of a .pth file that holds them


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, <step>.ckpt folder or run directory, on the CPU.

    A training state around them ({"state_dict": ...}, {"ema": ...} and the like) and the `module.` that DDP puts before
    every key are taken off.

    Raises:
        ValueError: anything else, with the file's name and the reason.
    """
    path = file_of(path)
    return flat_state(whole(path), path)


def whole(path: Path):
    """What the file holds, before anything is taken off."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise no_weights(path, error.strerror) from error
    if not head:
        raise no_weights(path, "it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise no_weights(path, "it is a Git LFS pointer, not the file that it points to")
    if head.lstrip().startswith(b"<"):
        raise no_weights(path, "it is a web page, as download sites send in place of a file")
    if head[8:9] == b"{":
        return read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return read_pickle(path)
    raise no_weights(path, f"it is no .pth or .safetensors file (it starts with {head[:16]!r})")


def no_weights(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} cannot be read as weights: {why}")


def flat_state(state, path: Path) -> dict[str, Tensor]:
    """The flat dict of tensors inside `state`, checked."""
    while isinstance(state, dict) and (wrapper := next((n for n in WRAPPERS if isinstance(state.get(n), dict)), None)):
        state = state[wrapper]
    if not isinstance(state, dict):
        raise no_weights(path, f"it holds a {type(state).__name__}, not a dict of tensors")
    other = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other or not state:
        raise no_weights(path, f"it holds {shorten(other) or 'nothing'}, not a flat dict of tensors")
    for key, value in state.items():
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            what = "no values" if value.is_meta else f"{value.dtype} values in layout {value.layout}"
            raise no_weights(path, f"{shorten([key])} has {what}; plain numbers are needed")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # of damaged files safetensors raises its own kind, and others for headers that lie
        raise no_weights(path, f"it is truncated or damaged ({first_line(error)})") from error


def read_pickle(path: Path):
    """What torch.save wrote, as far as it is tensors and plain containers; argparse's Namespace is one.

    Training files of Lightning name its callbacks, as keys of what these keep; an empty class stands for each.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        callbacks = [(type("Callback", (), {}), n) for n in names if n.startswith("pytorch_lightning.callbacks.")]
        with torch.serialization.safe_globals([argparse.Namespace, *callbacks]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a reference to {found[1][:80]}" if found else "pickled objects"
        why = f"it holds {what}. Only tensors and plain containers are read; anything else could run code"
        raise no_weights(path, why) from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise no_weights(path, f"it is truncated, damaged or another kind of file ({first_line(error)})") from error


def file_of(path: str | Path) -> Path:
    """The file meant by `path`: itself, the EMA weights of a <step>.ckpt folder, those of a run's last.ckpt, or of a
    folder of diffusers.

    Raises:
        ValueError: there is none; where `scripts.download` knows the path, the message has the command.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "last.ckpt" if (path / "last.ckpt").exists() else path
        diffusers = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        inside = [folder / name for name in ("nnet_ema.pth", *diffusers)]
        inside += [folder / "transformer" / name for name in diffusers]  # of a DiT pipeline
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        from libs.checkpoints.assets import how_to_get

        raise ValueError(f"no weight file at {path}{how_to_get(path)}")
    return path


def settled(path: str | Path) -> str:
    """`path` with a run's last.ckpt, which moves on while the run trains, replaced by the checkpoint that it is now."""
    file = file_of(path)
    folder = file.parent
    if not folder.is_symlink():
        return str(path)
    while folder.is_symlink():
        folder = folder.parent / os.readlink(folder)
    return str(folder if Path(path).is_dir() else folder / file.name)


# ---- what is known about the weights -------------------------------------------------------------------------------


def about(path: str | Path) -> dict:
    """What was written with the weights: `config` (nested) and `class_names`; {} for foreign files.

    It stands in the header of a .safetensors file, in the zip archive that a .pth file is, or in the meta.json of a
    <step>.ckpt folder; for a best.pth of older runs, in that of the run's last checkpoint.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    path = file_of(path)
    try:
        text = text_about(path)
        found = {} if text is None else json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError, OverflowError, zipfile.BadZipFile, struct.error, zlib.error) as error:
        raise no_weights(path, f"it is truncated or damaged ({first_line(error)})") from error
    if found:
        return found
    folders = {"nnet.pth": ".", "nnet_ema.pth": ".", "best.pth": "last.ckpt"}
    beside = path.parent / folders.get(path.name, "none") / "meta.json"
    if path.name in folders and beside.is_file():
        found = read_json(beside, f"what is known of {path}")
    return {key: found[key] for key in ABOUT if key in found}


def text_about(path: Path) -> str | bytes | None:
    """The JSON text inside a weight file; None where there is none."""
    with path.open("rb") as file:
        head = file.read(9)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                name = next((name for name in archive.namelist() if name.endswith(INSIDE)), None)
                return None if name is None else archive.read(name)
        if head[8:9] != b"{":
            return None
        length = int.from_bytes(head[:8], "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        file.seek(8)
        header = json.loads(file.read(length))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata.get("about") if isinstance(metadata, dict) else None


def write_weights(state: dict[str, Tensor], path: str | Path, about: dict | None = None) -> None:
    """Write tensors, and what is known `about` them, as one file, atomically; .safetensors picks that format.

    A .pth file stays what torch.load reads everywhere: the JSON is one more member of its zip archive.
    """
    path = Path(path)
    text = json.dumps(about, allow_nan=False) if about else ""
    with atomic_write(path, "w+b") as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            metadata = {"format": "pt"} | ({"about": text} if text else {})
            file.write(save({key: value.contiguous() for key, value in state.items()}, metadata))
            return
        torch.save(state, file)
        if text:
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(INSIDE, text)


def shorten(keys: list, n: int = 5) -> str:
    """The first `n` of them, each cut to what a person reads."""
    text = ", ".join(key if len(key) <= 120 else f"{key[:117]}..." for key in map(str, keys[:n]))
    return text + (f" and {len(keys) - n} more" if len(keys) > n else "")
