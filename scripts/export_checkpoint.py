"""Rewrite a weight file in the layout of U-ViT, AdaDiff, the UvA replication or DiT, or in this code base's own.

    python -m scripts.export_checkpoint workdir/run/last.ckpt adadiff.pth --layout=adadiff
    python -m scripts.export_checkpoint adadiff.pth uvit.safetensors --layout=uvit

The numbers stay as they are to the last bit, apart from the sign of AdaDiff's certainty heads. "uvit" and "dit" drop
estimators and own heads; the other layouts refuse a network that they cannot hold.
"""

import argparse
from pathlib import Path

from libs import checkpoints


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="weight file, or <step>.ckpt folder (its EMA weights)")
    parser.add_argument("output", type=Path, help="file to write, ending in .pth or .safetensors")
    parser.add_argument("--layout", required=True, choices=("ours", *checkpoints.LAYOUTS))
    parser.add_argument("--bare", action="store_true", help="leave out the config that was written with the weights")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".pth", ".safetensors"):
        parser.error(f"{args.output} must end in .pth or .safetensors")
    try:
        state = checkpoints.to_ours(checkpoints.read(args.file))
        about = checkpoints.about(args.file) if args.layout == "ours" and not args.bare else None
        if args.layout != "ours":
            state = checkpoints.export(state, args.layout)
    except ValueError as error:
        parser.error(str(error) if str(args.file) in str(error) else f"{args.file}: {error}")
    checkpoints.write(state, args.output, about)
    print(f"{args.output}: {len(state)} tensors in the layout of {args.layout}")


if __name__ == "__main__":
    main()
