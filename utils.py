"""Starting a command: flags, the resolved config, the run directory, errors that a person can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from absl import app, flags
from accelerate import Accelerator
from ml_collections import config_flags

from libs.checkpoints import file_of
from libs.exits.policy import max_u_of
from libs.run import PATIENCE, Run

FLAGS = flags.FLAGS


def define_flags(kind: str) -> None:
    """Flags of the public U-ViT and AdaDiff scripts. `kind`: "train", "eval", "sample", "analyze" or "calibrate"."""
    config_flags.DEFINE_config_file("config", None, "Experiment file (configs/*.py), settings as --config.a.b=value.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_bool("dry_run", False, "Print the resolved config and the cost of every exit, then stop.")
    if kind == "train":
        flags.DEFINE_string("workdir", None, "Directory of the run. Default: workdir/<config>/<overrides>.")
        flags.DEFINE_string("pretrained_weight", None, "Start from these U-ViT, AdaDiff, DDPM or own weights.")
    else:
        flags.DEFINE_string("nnet_path", None, "Weights to evaluate: a file or a <step>.ckpt folder.")
        where = "the weights' own" if kind == "calibrate" else f"<config>-{kind} below the weights' folder"
        flags.DEFINE_string("output_path", None, f"Directory for results. Default: {where}.")
    if kind == "sample":
        flags.DEFINE_alias("output", "output_path")
    if kind in ("eval", "sample", "analyze"):
        flags.DEFINE_list(
            "exit_threshold", None, "Certainties in (0, 1]: leave when 1 - u exceeds it; 1 = never. A list sweeps."
        )
    flags.DEFINE_bool("is_train", None, "Accepted for old scripts; has no effect.")


def launch(work: Callable, regime: Callable, kind: str) -> None:
    """Run `work(config, regime(config), run)` as the main program; mistakes in settings become one clear line."""

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: settings are given as --config.name=value")
        try:
            config = resolve(kind)
            if FLAGS.dry_run:
                return dry_run(config)
            directory = workdir(config, kind)
            run = Run(directory, make_accelerator(config, directory))
            run.accelerator.init_trackers(
                "adaptive-depth-diffusion", flat(config.to_dict()), init_kwargs={"wandb": {"dir": directory}}
            )
            with run.stopping:
                work(config, regime(config), run)
            run.accelerator.end_training()
        except (ValueError, FileNotFoundError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    define_flags(kind)
    app.run(main)


def resolve(kind: str):
    """The config with the command's own flags folded in, locked."""
    config = FLAGS.config
    if FLAGS.is_train is not None:
        print("note: --is_train has no effect: training never exits early and sampling may", file=sys.stderr)
    if kind == "train":
        config.pretrained_weight = FLAGS.pretrained_weight or config.pretrained_weight
    else:
        config.nnet_path = FLAGS.nnet_path or config.nnet_path
        if "exit_threshold" in FLAGS and FLAGS.exit_threshold:
            config.eval.thresholds = tuple(certainty(text) for text in FLAGS.exit_threshold)
            if "certainty" not in (config.exit.get(config.exit.name) or {}):
                config.exit.name = "threshold"
    return config


def certainty(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    try:
        max_u_of(value)
    except ValueError:
        raise ValueError(
            f"--exit_threshold={text}: it is a certainty and must be a number in (0, 1], 1 = never exit early"
        ) from None
    return value


def workdir(config, kind: str) -> Path:
    stem = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    if kind != "train":
        if not config.nnet_path:
            raise ValueError("--nnet_path is missing: give the weights to evaluate (a file or a <step>.ckpt folder)")
        beside = file_of(config.nnet_path).parent
        default = beside if kind == "calibrate" else Path(config.nnet_path).parent / f"{stem}-{kind}"
        return Path(FLAGS.output_path or default)
    return Path(FLAGS.workdir or Path("workdir", stem, run_name()))


def run_name() -> str:
    """ "default", or the overrides as key=value joined by dashes, with the last part of each key (U-ViT's rule)."""
    values = config_flags.get_override_values(FLAGS["config"])
    parts = [f"{key.split('.')[-1]}={value}" for key, value in values.items() if not key.endswith("path")]
    return "-".join(parts).replace("/", "_").replace(" ", "") or "default"


def make_accelerator(config, directory: Path) -> Accelerator:
    trackers = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}
    if config.tracker not in trackers:
        raise ValueError(f"tracker is {config.tracker!r}; it must be one of {', '.join(trackers)}")
    if config.mixed_precision not in ("", "no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision is {config.mixed_precision!r}; it must be no, fp16, bf16, or empty")
    if config.tracker == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision or None,
        log_with=trackers[config.tracker],
        project_dir=directory,
        kwargs_handlers=[PATIENCE],
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision is fp16, which runs on GPUs only; use bf16 or no on a CPU")
    return accelerator


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as one level of name -> number or text, which every tracker accepts."""
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= (
            flat(value, f"{name}.")
            if isinstance(value, dict)
            else {name: value if isinstance(value, int | float) else str(value)}
        )
    return out


def dry_run(config) -> None:
    from libs.models.build import build_model

    print(config)
    with torch.device("meta"):  # shapes only: the largest models take no memory
        model = build_model(config)
    macs = model.macs()
    n = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n:,} parameters; GMACs of one call per image by the exit taken (attention products and head counted):")
    for k in model.points:
        print(f"  after {k:2d} of {model.depth} layers: {macs.at(k) / 1e9:.4f}")
