"""What a weight file holds: kind, network settings, what is missing, parameters, and the cost of every exit.

    python -m scripts.inspect_checkpoint assets/uvit/cifar10_uvit_small.pth

Reads .pth and .safetensors files, or a <step>.ckpt folder (its EMA weights), of this code base, U-ViT, AdaDiff, the UvA
replication, of DDPM's U-Net as diffusers stores it, and of DiT and SiT (.pt, or diffusers' folder). Nothing in them
is executed.
"""

import importlib
from pathlib import Path

import torch

import scripts
from configs import base
from libs import checkpoints
from libs.build import flat, listed
from libs.metrics.cost import CONVENTION
from libs.models import build_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("inspect_checkpoint", __doc__)
    parser.add_argument("file", type=Path, help="weight file, or <step>.ckpt folder")
    args = parser.parse_args(argv)
    try:
        print("\n".join(describe(args.file)))
    except ValueError as error:
        parser.error(str(error))


def describe(path: Path) -> list[str]:
    """The lines to print."""
    state = checkpoints.read_weights(path)
    try:
        kind, settings = checkpoints.kind(state), checkpoints.infer(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = base.config(settings["nnet.name"])
    default = flat(config.to_dict())
    written = {key: value for key, value in checkpoints.known(path).items() if key in default}
    settings |= {key: value for key, value in written.items() if key in settings or default[key] != value}
    config.update_from_flattened_dict(settings)
    with torch.device("meta"):
        model = build_model(config)
    exits = "uem.name" in settings
    if not exits:
        model.drop_exits(heads=False)
    own = model.state_dict()
    ours = checkpoints.complete(checkpoints.to_ours(state), own)
    checkpoints.check_fit(path, kind, ours, own, network="the network that its tensors describe")

    guesses = checkpoints.ASSUMED[settings["nnet.name"]]
    assumed = {key: how for key, how in guesses.items() if key not in written}
    types = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    count = sum(value.numel() for value in state.values())
    lines = [f"{path}: {kind} weights, {len(state)} tensors, {count:,} parameters, {', '.join(types)}", "config"]
    for key, value in settings.items():
        note = f"  (assumed: {assumed[key]})" if key in assumed else ""
        lines.append(f"  {key} = {value}{note}")
    differ = {key: value for key, value in settings.items() if default[key] != value}
    lines.append(f"as flags: {checkpoints.flags(differ)}")
    lines.append(f"fits: {', '.join(fitting(settings)) or 'no file of configs/'}")
    if checkpoints.about(path).get("config"):
        lines.append("its config was written with it: --nnet_path alone is enough")
    if exits:
        lines.append("missing: nothing, every exit has its estimator")
    else:
        lines.append(
            "missing: uncertainty estimators; evaluate at full depth, or start fine-tuning with --pretrained_weight"
        )
    lines.append(f"GMACs of one call per image by exit, before questions to the estimator; {CONVENTION}")
    macs = model.macs()
    lines += [f"  after {k:2d} of {model.depth} layers: {macs.at(k) / 1e9:.4f}" for k in model.points]
    if exits:
        lines.append(f"  one question to the estimator: {max(macs.ask) / 1e9:.4f}")
    return lines


def fitting(settings: dict[str, object]) -> list[str]:
    """The experiment files whose networks have these settings, guesses apart."""
    known = {key: value for key, value in settings.items() if key not in checkpoints.ASSUMED[settings["nnet.name"]]}
    found = []
    for path in sorted(CONFIGS.glob("[!_]*_*.py")):
        config = flat(importlib.import_module(f"configs.{path.stem}").get_config().to_dict())
        if all(key in config and listed(config[key]) == listed(value) for key, value in known.items()):
            found.append(f"configs/{path.name}")
    return found


if __name__ == "__main__":
    main()
