"""Rewrite a weight file in the layout of U-ViT, AdaDiff, the UvA replication or DiT, or in this code base's own.

    python -m scripts.export_checkpoint workdir/run/last.ckpt adadiff.pth --layout=adadiff
    python -m scripts.export_checkpoint adadiff.pth uvit.safetensors --layout=uvit
    python -m scripts.export_checkpoint runs/digits/last.ckpt assets/released/digits.safetensors --layout=released

The numbers stay as they are to the last bit, apart from the sign of AdaDiff's certainty heads. "uvit" and "dit" drop
estimators and own heads; the other layouts refuse a network that they cannot hold. "released" is our own in float16,
with the plans of scripts.calibrate that lie beside the weights, and without the settings of the training's machine.
"""

from pathlib import Path

import scripts
from libs import checkpoints
from libs.files import read_json, write_json
from libs.sampling.stored import plan_name

OF_THE_MACHINE = {"cpu": False, "tracker": "none", "nnet_path": "", "pretrained_weight": ""}


def release(state: dict, source: Path, output: Path) -> None:
    """Write the weights in float16 with what is known about them, and their plans under names of their own.

    Raises:
        ValueError: the weights do not know their experiment.
    """
    about = checkpoints.about(source)
    if not about.get("config"):
        raise ValueError(f"{source} does not say which experiment it belongs to; give a <step>.ckpt folder")
    about["config"] |= OF_THE_MACHINE
    about["config"]["dataset"]["path"] = ""
    checkpoints.write_weights({key: value.half() for key, value in state.items()}, output, about)
    file = checkpoints.file_of(source)
    for path in file.parent.glob(plan_name(file, "*")):
        what = path.stem.partition("plan-")[2]
        content = read_json(path, "a plan beside the weights") | {"nnet_path": output.name}
        content.pop("command", None)  # it names folders of the training's machine
        write_json(output.parent / plan_name(output, what), content)


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("export_checkpoint", __doc__)
    parser.add_argument("file", type=Path, help="weight file, or <step>.ckpt folder (its EMA weights)")
    parser.add_argument("output", type=Path, help="file to write, ending in .pth or .safetensors")
    parser.add_argument("--layout", required=True, choices=("ours", "released", *checkpoints.LAYOUTS))
    parser.add_argument("--bare", action="store_true", help="leave out the config that was written with the weights")
    args = parser.parse_args(argv)
    endings = (".safetensors",) if args.layout == "released" else (".pth", ".safetensors")
    if args.output.suffix not in endings:
        parser.error(f"{args.output} must end in {' or '.join(endings)}")
    try:
        state = checkpoints.to_ours(checkpoints.read_weights(args.file))
        if args.layout == "released":
            release(state, args.file, args.output)
        else:
            about = checkpoints.about(args.file) if args.layout == "ours" and not args.bare else None
            state = state if args.layout == "ours" else checkpoints.export(state, args.layout)
            checkpoints.write_weights(state, args.output, about)
    except ValueError as error:
        parser.error(str(error) if str(args.file) in str(error) else f"{args.file}: {error}")
    print(f"{args.output}: {len(state)} tensors in the layout of {args.layout}")


if __name__ == "__main__":
    main()
