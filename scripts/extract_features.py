"""Compute once what latent and text-to-image training read at every step: moments of images, contexts of prompts.

    python -m scripts.extract_features imagenet --images assets/datasets/ImageNet \\
        --out assets/datasets/imagenet256_features
    python -m scripts.extract_features coco --split train --images train2014 --captions captions_train2014.json \\
        --out assets/datasets/coco256_features
    python -m scripts.extract_features empty --out assets/datasets/coco256_features
    python -m scripts.extract_features prompts --out assets/datasets/coco256_features       # for U-ViT's code only
    accelerate launch --multi_gpu --num_processes 8 -m scripts.extract_features imagenet ...

Several processes share the work shard by shard (two on a CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2).
A run that was killed is continued by the same command: finished shards are kept, and the result is the same to the
byte. Told to stop (SIGTERM, Ctrl-C), it ends after the batch at hand. At the end every file is read back and compared
with what was computed. The last line is a JSON summary.

--layout sharded (default) is what training reads fastest (libs/data/features.py); --layout npy is one file per image
for U-ViT's public code (libs/data/features_npy.py says what that code needs).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

import scripts
from libs.codecs import KL, ClipText
from libs.data import Dataset
from libs.data.coco import CocoImages
from libs.data.extract import extract, write_empty, write_prompts
from libs.data.features_npy import BATCH, Npy
from libs.data.imagenet import ImageNet
from libs.data.images import ImageFolder
from libs.data.shards import Sharded
from libs.files import read_lines
from libs.run import PROCESS_TIMEOUT, Run

PROMPTS = (
    "A lighthouse on a rocky coast at dusk",
    "A brown dog catching a frisbee in a park",
    "Two zebras drinking from a river",
    "A bowl of fruit on a wooden table",
    "A red double-decker bus crossing a bridge",
    "A child flying a kite on the beach",
    "A plate with pancakes and blueberries",
    "A snowy mountain behind a wooden cabin",
    "An old bicycle leaning against a brick wall",
    "A tabby cat asleep on a laptop keyboard",
    "A sailing boat under a cloudy sky",
    "A kitchen with white cupboards and a large window",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = scripts.parser("extract_features", __doc__)
    common, images, texts = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    common.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the features go")
    common.add_argument("--layout", choices=("sharded", "npy"), default="sharded", help="default: sharded")
    common.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")

    images.add_argument("--images", metavar="DIR", required=True, help="ImageNet (with train/), or folders by class")
    images.add_argument("--resolution", metavar="PIXELS", type=int, default=256, help="default: 256")
    path = "assets/stable-diffusion/autoencoder_kl.pth"
    images.add_argument("--autoencoder", metavar="FILE", default=path, help=f'default: {path}; "random" to try it out')
    images.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of it (default: fp32)")
    images.add_argument("--dtype", choices=("float16", "float32"), help="stored; default: float16, npy always float32")
    images.add_argument("--batch_size", metavar="N", type=int, default=32, help="images at once (default: 32)")
    images.add_argument("--shard_size", metavar="N", type=int, help="images; default: 2048, and 256 for COCO and npy")
    images.add_argument("--flips", action=argparse.BooleanOptionalAction, help="mirror images; default: ImageNet only")
    images.add_argument("--workers", metavar="N", type=int, default=4, help="decoding processes (default: 4)")
    texts.add_argument("--clip", metavar="MODEL", default="openai/clip-vit-large-patch14", help="folder or hub name")

    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("imagenet", parents=[common, images], help="moments and labels of images in class folders")
    coco = commands.add_parser("coco", parents=[common, images, texts], help="moments and contexts of COCO's captions")
    coco.add_argument("--captions", metavar="FILE", required=True, help="captions_train2014.json or _val2014.json")
    coco.add_argument("--split", choices=("train", "val"), required=True, help="folder below --out")
    prompts = commands.add_parser("prompts", parents=[common, texts], help="run_vis/, which only U-ViT's code needs")
    prompts.add_argument("--prompts", metavar="FILE", help="one per line; default: twelve built-in ones")
    commands.add_parser("empty", parents=[common, texts], help="the context of the empty prompt, for guidance")
    options = parser.parse_args(arguments)
    if hasattr(options, "images"):
        settle(options, parser.error)
    return options


def settle(options: argparse.Namespace, error: Callable) -> None:
    """Fill in the defaults that depend on command and layout; refuse what the npy layout cannot hold."""
    npy, imagenet = options.layout == "npy", options.command == "imagenet"
    if npy and options.dtype == "float16":
        error("--layout npy stores float32, which U-ViT's code expects; leave --dtype out.")
    if npy and options.flips not in (None, imagenet):
        error(f"--layout npy has {'always' if imagenet else 'no'} mirror images for {options.command}.")
    if npy and imagenet and options.shard_size not in (None, BATCH):
        error(f"--layout npy groups ImageNet by {BATCH} images, as U-ViT does; leave --shard_size out.")
    if options.flips is None:
        options.flips = imagenet
    if options.shard_size is None:
        options.shard_size = 2048 if imagenet and not npy else BATCH
    for name, least in (("batch_size", 1), ("shard_size", 1), ("workers", 0), ("resolution", 8)):
        if getattr(options, name) < least:
            error(f"--{name} is {getattr(options, name)}; it must be at least {least}.")
    if options.resolution % 8:
        error(f"--resolution is {options.resolution}; it must be a multiple of 8, the autoencoder's factor.")


def open_images(options: argparse.Namespace) -> Dataset:
    if options.command == "coco":
        return CocoImages(path=options.images, captions=options.captions, resolution=options.resolution)
    kind = ImageNet if os.path.isdir(os.path.join(options.images, "train")) else ImageFolder
    data = kind(path=options.images, resolution=options.resolution)
    if not data.n_classes:
        raise ValueError(f"--images {options.images} has no class folders; labels are needed, one folder per class.")
    return data


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # Exact and the same every time: features are made once and read for months.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    out = options.out / options.split if options.command == "coco" else options.out
    # Processes wait for the slowest one's shard.
    run = Run(out, Accelerator(cpu=options.cpu, kwargs_handlers=[PROCESS_TIMEOUT]))
    with run.stopping:
        summary = work(options, out, run)
    if run.is_main:
        print(json.dumps(summary))


def work(options: argparse.Namespace, out: Path, run: Run) -> dict | None:
    """What the command asks for; returns its summary."""
    text = None if options.command == "imagenet" else ClipText(path=options.clip, device=run.device)
    if options.command in ("imagenet", "coco"):
        return extract(
            open_images(options),
            KL(path=options.autoencoder, precision=options.precision, chunk=options.batch_size, device=run.device),
            text,
            out,
            run,
            layout=Npy() if options.layout == "npy" else Sharded("<f4" if options.dtype == "float32" else "<f2"),
            flips=options.flips,
            batch_size=options.batch_size,
            shard_size=options.shard_size,
            workers=options.workers,
        )
    if not run.is_main:
        return None
    if options.command == "empty":
        return write_empty(text, out)
    prompts = read_lines(options.prompts, "--prompts") if options.prompts else PROMPTS
    if not prompts:
        raise ValueError(f"--prompts is {options.prompts!r}, which has no prompts; one per line is needed.")
    return write_prompts(text, prompts, out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"extract_features: {error}")
