"""Training state on disk, in U-ViT's folder form: <workdir>/ckpts/<step>.ckpt/ with plain state dicts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from libs.checkpoints import files


@dataclass
class State:
    """Everything that a resumed run needs; randomness and data order derive from `step` alone."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None  # fp16 only
    step: int = 0
    best: float = float("inf")  # lowest monitored distance so far


def save(state: State, directory: Path, meta: dict, keep: int) -> Path:
    """Write <step>.ckpt completely or not at all, point last.ckpt at it, then drop all but the newest `keep`."""
    folder = directory / "ckpts"
    folder.mkdir(exist_ok=True)
    part, final = folder / f"{state.step}.part", folder / f"{state.step}.ckpt"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    torch.save(state.model.state_dict(), part / "nnet.pth")
    torch.save(state.ema.state_dict(), part / "nnet_ema.pth")
    torch.save(state.optimizer.state_dict(), part / "optimizer.pth")
    torch.save(state.lr_scheduler.state_dict(), part / "lr_scheduler.pth")
    torch.save({"step": state.step, "best": state.best}, part / "step.pth")
    if state.scaler is not None:
        torch.save(state.scaler.state_dict(), part / "scaler.pth")
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    link = directory / "last.part"
    link.unlink(missing_ok=True)
    link.symlink_to(final.relative_to(directory))
    link.replace(directory / "last.ckpt")
    for old in found(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def keep_best(directory: Path, checkpoint: Path) -> None:
    """Copy the EMA weights of `checkpoint` to <workdir>/best.pth."""
    files.write(files.read(checkpoint / "nnet_ema.pth"), directory / "best.pth", files.about(checkpoint))


def found(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = [
        (int(match[1]), path)
        for path in directory.glob("ckpts/*.ckpt")
        if (match := re.match(r"(\d+)\.ckpt$", path.name))
    ]
    return [path for _, path in sorted(steps)]


def resume(state: State, directory: Path) -> str:
    """Continue from the newest checkpoint of `directory`, if there is one."""
    checkpoints = found(directory)
    if not checkpoints:
        return "starting at step 0"
    newest = checkpoints[-1]

    def read(name):
        try:
            return torch.load(newest / name, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{newest / name} cannot be read ({error}); remove {newest} to go on from an older one"
            ) from error

    try:
        state.model.load_state_dict(read("nnet.pth"))
        state.ema.load_state_dict(read("nnet_ema.pth"))
    except RuntimeError as error:
        raise ValueError(f"{newest} holds another network than the config: use another workdir ({error})") from error
    state.optimizer.load_state_dict(read("optimizer.pth"))
    state.lr_scheduler.load_state_dict(read("lr_scheduler.pth"))
    if state.scaler is not None:
        state.scaler.load_state_dict(read("scaler.pth"))
    progress = read("step.pth")
    state.step, state.best = progress["step"], progress["best"]
    return f"resumed {newest}"
