"""Mean and covariance of a data set's features: what generated images are compared with.

    python -m scripts.reference_stats --dataset=digits --extractor=digits_cnn --output=assets/fid_stats/digits.npz
    python -m scripts.reference_stats --dataset=celeba --extractor=inception --output=assets/fid_stats/celeba64.npz \\
        --set=path=/data/celeba --set=resolution=64
    python -m scripts.reference_stats --images=/data/faces.zip --resolution=64 --extractor=inception --output=faces.npz

Images are read as they are, never mirrored. Progress goes to stderr; the last line, on stdout, is JSON. The result is
used with --config.eval.reference=FILE and refused where extractor, preprocessing or image size differ.
"""

import argparse
import ast
import inspect
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

import scripts
from libs.build import lookup
from libs.data import DATASETS, Dataset
from libs.data.workers import read_in_workers
from libs.metrics.extractors import EXTRACTORS, build_extractor
from libs.metrics.frechet import Moments


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("reference_stats", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help=f"a data set: {', '.join(DATASETS)}")
    source.add_argument("--images", metavar="PATH", help="a folder or zip file of images, at any depth")
    parser.add_argument("--extractor", required=True, metavar="NAME", help=f"{', '.join(EXTRACTORS)}, or of timm")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.npz", help="where the statistics go")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the data set")
    parser.add_argument("--resolution", type=int, default=0, metavar="PIXELS", help="with --images: crop; 0 keeps")
    parser.add_argument("--channels", type=int, default=3, help="with --images: 3 colour, 1 grey (default: 3)")
    parser.add_argument("--batch_size", type=int, default=64, metavar="IMAGES", help="at once (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0, none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        result = make(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    print(json.dumps(result))


def make(args: argparse.Namespace) -> dict:
    """Write the statistics; returns what the JSON line says."""
    if args.output.suffix != ".npz":
        raise ValueError(f"--output={args.output} must end in .npz.")
    if args.batch_size < 1 or args.workers < 0:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1 and --workers={args.workers} at least 0.")
    dataset = open_real(args)
    extractor = build_extractor(args.extractor, dataset.shape, args.device)
    moments = Moments(extractor.n_features, extractor.device)
    rows = [range(i, min(i + args.batch_size, len(dataset))) for i in range(0, len(dataset), args.batch_size)]
    batches = read_in_workers(dataset.stack, rows, args.workers)  # in order, (b, C, H, W) uint8
    for pixels in tqdm(batches, total=len(rows), desc=args.extractor, unit="batch", file=sys.stderr):
        moments.add(extractor(pixels))
    reference = moments.statistics(extractor)
    if reference.n <= extractor.n_features:
        print(
            f"{reference.n} images for {extractor.n_features} features: the covariance is singular, and distances to "
            "it are strongly biased.",
            file=sys.stderr,
        )
    reference.save(args.output)
    return {
        "output": str(args.output),
        "n": reference.n,
        "n_features": extractor.n_features,
        "extractor": reference.extractor,
        "preprocessing": reference.preprocessing,
        "resolution": f"{extractor.resolution}, {extractor.resizing}",
    }


def open_real(args: argparse.Namespace) -> Dataset:
    """The data set of --dataset with its --set settings, or of --images."""
    if args.images:
        if args.set:
            raise ValueError("--set belongs to --dataset; with --images use --resolution and --channels.")
        name = "images"
        settings = {"path": args.images, "resolution": args.resolution, "channels": args.channels, "labels": False}
    else:
        if args.resolution or args.channels != 3:
            raise ValueError("--resolution and --channels belong to --images; with --dataset use --set=resolution=64.")
        name = args.dataset
        allowed = inspect.signature(lookup(DATASETS, name, "--dataset")).parameters
        settings = {}
        for text in args.set:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set={text} must have the form KEY=VALUE.")
            if key not in allowed:
                raise ValueError(f"The data set {name} has no setting {key!r}; it has: {', '.join(allowed) or 'none'}.")
            wanted = type(allowed[key].default)
            with suppress(ValueError, SyntaxError):  # what is no Python literal is text
                value = value if wanted is str else ast.literal_eval(value)
            if not isinstance(value, wanted):
                raise ValueError(f"--set={key}={value} must be of type {wanted.__name__}.")
            settings[key] = value
    return DATASETS[name](**settings)


if __name__ == "__main__":
    main()
