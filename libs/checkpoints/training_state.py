"""Training state on disk, in U-ViT's folder form: <workdir>/ckpts/<step>.ckpt/ with plain state dicts."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from libs import files
from libs.build import MAY_CHANGE, differences, in_use
from libs.checkpoints.files import ABOUT, write_weights


@dataclass
class TrainState:
    """Everything that a resumed run needs; randomness and data order derive from `step` alone."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None  # fp16 only
    step: int = 0
    best: float = float("inf")  # lowest monitored distance so far
    looked: bool = True  # whether the samples and the monitoring due at `step` are done


def save_state(state: TrainState, directory: Path, meta: dict, keep: int) -> Path:
    """Write <step>.ckpt completely or not at all, point last.ckpt at it, then drop all but the newest `keep`.

    Raises:
        OSError: nothing of it could be written, as on a full disk; it names the file, and nothing half-written stays.
    """
    folder = directory / "ckpts"
    folder.mkdir(exist_ok=True)
    part, final = folder / f"{state.step}.part", folder / f"{state.step}.ckpt"
    parts = {"nnet": state.model, "nnet_ema": state.ema, "optimizer": state.optimizer}
    parts |= {"lr_scheduler": state.lr_scheduler, "scaler": state.scaler}
    if again := final.exists():  # after a stop in a look the network is the same, and the folder stays complete
        part, parts = final, {}
    else:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    try:
        for name, of in parts.items():
            if of is not None:
                save_tensors(of.state_dict(), part / f"{name}.pth")
        save_tensors({"step": state.step, "best": state.best, "looked": state.looked}, part / "step.pth")
        files.write_json(part / "meta.json", meta)
    except BaseException:
        if not again:
            shutil.rmtree(part, ignore_errors=True)
        raise
    part.rename(final)
    sync(folder)
    tidy(directory, keep)
    return final


def tidy(directory: Path, keep: int) -> None:
    """Point last.ckpt at the newest checkpoint; drop all but the newest `keep` and what is half-written.

    The end of a save, and the start of a run: the one before may have been killed in its last save. The caller holds
    the directory (see `Run`).
    """
    checkpoints = found(directory)
    if checkpoints:
        link = directory / "last.part"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoints[-1].relative_to(directory))
        link.replace(directory / "last.ckpt")
    for old in [*checkpoints[:-keep], *directory.glob("ckpts/*.part")]:
        shutil.rmtree(old, ignore_errors=True)
    for folder in (directory / "samples", *checkpoints[-keep:]):
        files.remove_parts(folder)


def save_tensors(value, path: Path) -> None:
    """torch.save, atomically. A failed write inside torch's zip writer surfaces as RuntimeError: it is the disk's."""
    try:
        with files.atomic_write(path) as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause = error.__context__ or error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        raise OSError(number, f"it could not be written completely ({cause or error})", str(path)) from error


def sync(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_best(directory: Path, ema: nn.Module, meta: dict) -> None:
    """Write the EMA weights, with what meta.json knows about them, to <workdir>/best.pth.

    To be called before `save_state`: a run that is killed between the two comes by here again; its checkpoint is older.
    """
    known = {key: meta[key] for key in ABOUT if key in meta}
    write_weights({key: value.cpu() for key, value in ema.state_dict().items()}, directory / "best.pth", known)


def found(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = [
        (int(match[1]), path)
        for path in directory.glob("ckpts/*.ckpt")
        if (match := re.match(r"(\d+)\.ckpt$", path.name))
    ]
    return [path for _, path in sorted(steps)]


def read_meta(directory: Path) -> dict:
    """meta.json of the newest checkpoint; {} where there is none."""
    checkpoints = found(directory)
    path = checkpoints[-1] / "meta.json" if checkpoints else None
    return files.read_json(path, "--workdir's newest checkpoint") if path and path.is_file() else {}


def changes_since(meta: Mapping, now: Mapping, directory: Path, step: int) -> list[dict]:
    """What differs between the run of `meta` and the one that goes on with it, both as in meta.json.

    Returns:
        the list `changes` for the next meta.json: {"step", "set": {name: [old, new]}} for every change so far.

    Raises:
        ValueError: a difference that changes the result (see MAY_CHANGE in configs/base.py), with both values.
    """
    changes = differences(meta.get("config", {}), now["config"])
    if changes.get("mixed_precision", ("",))[0] == "":  # left to the launcher, and not recorded by older versions
        changes.pop("mixed_precision", None)
    free = {key: pair for key, pair in changes.items() if allowed(key, now["config"])}
    refused = {key: pair for key, pair in changes.items() if key not in free}
    if "data" in meta and meta["data"] != now["data"]:
        old = meta["config"]["dataset"]["path"]
        refused["dataset.path"] = (f"{old} with other data", now["config"]["dataset"]["path"])
    if meta.get("depths") != now["depths"] and "train.depths" not in refused and "depths" in meta:
        refused["exit"] = tuple(f"{in_use(of['config']['exit'])}" for of in (meta, now))
    if refused:
        lines = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in refused.items())
        raise ValueError(
            f"{directory} holds another experiment: {lines}. Give this one another --workdir, or set back what differs"
        )
    recorded = {key: list(pair) for key, pair in free.items() if key.split(".")[0] not in ("eval", "exit", "sample")}
    return [*meta.get("changes", []), *([{"step": step, "set": recorded}] if recorded else [])]


# what the monitor's numbers depend on besides the weights and the solver's settings: only equal ones can be compared
MONITORED = (
    *("eval.extractor", "eval.reference", "eval.real", "eval.selection_seed"),
    *("sample.algorithm", "sample.grid", "sample.forecast.", "sample.labels", "sample.prompts"),
)


def allowed(key: str, config: Mapping) -> bool:
    """Whether a resumed run may change the setting `key`."""
    monitored = (*MONITORED, f"sample.{config['sample']['algorithm']}.")
    if config["train"]["eval_interval"] and key.startswith(monitored):
        return False
    if key == "train.accumulate" and config["loss"]["weights"] == "adadiff":
        return False  # its weights are means over a micro-batch
    return any(key == name or name.endswith(".") and key.startswith(name) for name in MAY_CHANGE)


def resume(state: TrainState, directory: Path) -> str:
    """Continue from the newest checkpoint of `directory`, if there is one, with the optimiser's settings of now."""
    checkpoints = found(directory)
    if not checkpoints:
        return "starting at step 0"
    newest = checkpoints[-1]

    def read(name):
        try:
            with files.open_regular(newest / name) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{newest / name} cannot be read ({error}); remove {newest} to go on from an older one"
            ) from error

    try:
        state.model.load_state_dict(read("nnet.pth"))
        state.ema.load_state_dict(read("nnet_ema.pth"))
    except RuntimeError as error:
        raise ValueError(f"{newest} holds another network than the config: use another workdir ({error})") from error
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups
    ]
    try:
        state.optimizer.load_state_dict(one_optimizer(read("optimizer.pth")))
    except (ValueError, KeyError, TypeError) as error:
        if str(newest) in str(error):
            raise
        raise ValueError(f"{newest / 'optimizer.pth'} does not fit optimizer.name and the network ({error})") from error
    for group, options in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(options)
    if state.scaler is not None:
        state.scaler.load_state_dict(read("scaler.pth"))
    progress = read("step.pth")
    state.step, state.best, state.looked = progress["step"], progress["best"], progress.get("looked", True)
    schedule = state.lr_scheduler
    schedule.last_epoch, schedule._step_count = state.step, state.step + 1
    for group, base, factor in zip(state.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(state.step)
    return f"resumed {newest}"


def one_optimizer(saved: dict) -> dict:
    """The state of timm's Muon; older checkpoints hold torch's Muon and AdamW as two `parts`."""
    if "parts" not in saved:
        return saved
    states: dict[int, dict] = {}
    groups = []
    for part, use_muon in zip(saved["parts"], (True, False), strict=True):
        first = len(states)
        states |= {first + i: part["state"][i] | {"use_muon": use_muon} for i in sorted(part["state"])}
        groups.append({**part["param_groups"][0], "params": list(range(first, len(states)))})
    return {"state": states, "param_groups": groups}


def truncate_log(path: Path, state: TrainState) -> None:
    """Drop what a killed run logged after its last checkpoint, so that no step and no look stand in the log twice.

    Raises:
        ValueError: a line is none of a training log; nothing is dropped then.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(files.read_text(path, "the run's log").splitlines(), 1):
        if not line.endswith("}"):  # the last line of a killed run may be half a line
            continue
        try:
            record = json.loads(line)
            before, at = record["step"] < state.step, record["step"] == state.step
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is no line of a training log ({str(error)[:80]}): mend or remove it"
            ) from None
        if before or at and ("loss" in record or state.looked):
            kept.append(line)
    files.write_file(path, "".join(f"{line}\n" for line in kept))
