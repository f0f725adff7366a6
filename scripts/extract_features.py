"""Compute once what latent and text-to-image training read at every step: moments of images, contexts of prompts.

    python -m scripts.extract_features imagenet --images assets/datasets/ImageNet \\
        --out assets/datasets/imagenet256_features
    python -m scripts.extract_features coco --split train --images train2014 --captions captions_train2014.json \\
        --out assets/datasets/coco256_features
    python -m scripts.extract_features empty --out assets/datasets/coco256_features
    python -m scripts.extract_features prompts --out assets/datasets/coco256_features
    accelerate launch --multi_gpu --num_processes 8 -m scripts.extract_features imagenet ...

Several processes share the work shard by shard (two on a CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2).
A run that was killed is continued by the same command: finished shards are kept, and the result is the same to the
byte. At the end every file is read back and compared with what was computed. The last line is a JSON summary.

--layout sharded (default) is what training reads fastest (libs/data/features.py); --layout npy is one file per image
for U-ViT's public code (libs/data/features_npy.py says what that code needs).
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from libs.codecs import KL, ClipText
from libs.data import Dataset
from libs.data.coco import CocoImages
from libs.data.features import Sharded, make_index
from libs.data.features_npy import BATCH, Npy, plain_array
from libs.data.imagenet import ImageNet
from libs.data.images import Images
from libs.data.object_arrays import object_array
from libs.run import PATIENCE, Run

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


# ----------------------------------------------------------------------------------------------------------------------
# The work


def extract(
    data: Dataset,
    codec: KL,
    text: ClipText | None,
    out: Path,
    run: Run,
    *,
    layout: Sharded | Npy,
    flips: bool,
    batch_size: int,
    shard_size: int,
    workers: int,
) -> dict:
    """Write the features of `data` to `out`, or what is missing of them; returns the summary.

    A shard is done when its record (`out`/.extract/<number>.json) exists, and the record is written after the shard's
    files. Batches never cross shards, so a shard's bytes do not depend on what was done before, or by whom.

    Args:
        data: images with `labels`, or with `captions` if `text` is given.
        flips: encode the mirror images too.
        batch_size: images encoded at once. (Like all settings that can change a bit of the result, it must stay the
            same when a run is continued.)
        shard_size: images per shard.
        workers: processes that decode images ahead.

    Raises:
        ValueError: `out` holds something else, a feature is not finite, or a file is not what was written.
    """
    started = time.perf_counter()
    captions = data.captions if text else None
    plan = {
        "data": {"name": data.name, "images": len(data), "sha256": data_fingerprint(data)},
        "resolution": data.shape[-1],
        "autoencoder": fingerprint(codec.vae),
        "clip": fingerprint(text.model) if text else None,
        "precision": str(codec.dtype).removeprefix("torch."),
        "layout": type(layout).__name__.lower(),
        "dtype": layout.dtype,
        "flips": flips,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    if run.is_main:
        begin(out, plan)
    run.barrier()
    shards = list(enumerate(chunks(range(len(data)), shard_size)))
    todo = [(number, rows) for number, rows in shards if not record(out, number).exists()]
    run.barrier()  # nobody may finish a shard while others still look for what is to be done
    mine = todo[run.rank :: run.world]
    run.say(f"{len(data)} images in {len(shards)} shards, {len(shards) - len(todo)} of which are done already")

    batches = [batch for _, rows in mine for batch in chunks(rows, batch_size)]
    loader = iter(DataLoader(Pixels(data), sampler=batches, batch_size=None, num_workers=workers))
    with tqdm(total=sum(map(len, batches)), unit="image", disable=not run.is_main, file=sys.stderr) as bar:
        for number, rows in mine:
            moments, contexts = [], []
            for batch in chunks(rows, batch_size):
                images = next(loader).to(run.device).float() / 127.5 - 1  # (b, 3, R, R)
                views = [images, images.flip(-1)] if flips else [images]
                moments.append(stored(torch.stack([codec.moments(x) for x in views], 1), layout.dtype))
                if text:  # (b, views, 8, h, w) above, (captions of the batch, tokens, width) here
                    contexts.append(
                        stored(text.encode([prompt for i in batch for prompt in captions[i]]), layout.dtype)
                    )
                bar.update(len(batch))
            files = layout.files(
                np.concatenate(moments),
                None if text else [int(data.labels[i]) for i in rows],
                [captions[i] for i in rows] if text else None,
                np.concatenate(contexts) if text else None,
            )
            finish(out, number, dict(zip(names(layout, number, rows, flips, captions), files, strict=True)))
    run.barrier()

    # ---- read everything back
    broken = [
        name
        for number, rows in shards[run.rank :: run.world]
        for name in differing(out, number, names(layout, number, rows, flips, captions))
    ]
    if broken:
        raise ValueError(
            f"{len(broken)} files in {out} are not what was computed (the first is {broken[0]}). They count as not "
            "done now: run the same command again."
        )
    run.barrier()
    done = [json.loads(record(out, number).read_text()) for number, _ in shards]
    if run.is_main and isinstance(layout, Sharded):
        write_index(out, data, plan, shards, done, codec, text)
    run.barrier()
    return {
        "out": str(out),
        "layout": plan["layout"],
        "images": len(data),
        "computed": sum(len(rows) for _, rows in todo),
        "files": sum(entry["files"] for entry in done),
        "bytes": sum(entry["bytes"] for entry in done),
        "sha256": hashlib.sha256("".join(entry["sha256"] for entry in done).encode()).hexdigest(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def begin(out: Path, plan: dict) -> None:
    """Keep the plan beside the records, or refuse to continue another one."""
    file = out / ".extract" / "plan.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if any(out.glob("*.npy")) or any(out.glob("*.safetensors")):
            raise ValueError(f"{out} has features that do not come from this command; choose another --out.")
        write(file, as_json(plan))
    before = json.loads(file.read_text())
    changed = [f"{key} was {before.get(key)} and is {plan[key]}" for key in plan if before.get(key) != plan[key]]
    if changed:
        raise ValueError(
            f"{out} was begun with other settings ({'; '.join(changed)}): run the earlier command again, or choose "
            "another --out."
        )


def names(layout: Sharded | Npy, number: int, rows: range, flips: bool, captions) -> list[str]:
    """The files of one shard."""
    return layout.names(number, rows, flips, [captions[i] for i in rows] if captions else None)


def finish(out: Path, number: int, files: dict[str, bytes]) -> None:
    """Write the files of a shard, then its record."""
    digest = hashlib.sha256()
    for name, content in files.items():
        write(out / name, content)
        digest.update(content)
    entry = {"files": len(files), "bytes": sum(map(len, files.values())), "sha256": digest.hexdigest()}
    write(record(out, number), as_json(entry))


def differing(out: Path, number: int, files: Sequence[str]) -> Sequence[str]:
    """The files of a shard if what is on the disk differs from its record, which is then removed."""
    digest, there = hashlib.sha256(), True
    for name in files:
        there = there and (out / name).is_file()
        digest.update((out / name).read_bytes() if there else b"")
    if there and digest.hexdigest() == json.loads(record(out, number).read_text())["sha256"]:
        return []
    record(out, number).unlink()
    return files


def write_index(out: Path, data: Dataset, plan: dict, shards, done, codec: KL, text: ClipText | None) -> None:
    """labels.npy and index.json, after which the data sets of `libs.data.features` accept the folder."""
    if not text:
        write(out / "labels.npy", plain_array(data.labels.numpy().astype("<i4")))
    side = data.shape[-1] // codec.factor
    index = make_index(
        n=len(data),
        n_classes=data.n_classes,
        shape=(2 * codec.latent_channels, side, side),
        context=(text.length, text.width) if text else None,
        flips=plan["flips"],
        dtype=plan["dtype"],
        shard_size=plan["shard_size"],
        files=[
            {"name": f"{number:05d}.safetensors", "images": len(rows), "sha256": entry["sha256"]}
            for (number, rows), entry in zip(shards, done, strict=True)
        ],
        plan=plan,
    )
    write(out / "index.json", as_json(index))


class Pixels:
    """Images by ranges of indices, for a loader whose item is a batch (b, 3, R, R) uint8."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, rows: range) -> Tensor:
        return torch.stack([self.data.pixels(i) for i in rows])


def record(out: Path, number: int) -> Path:
    return out / ".extract" / f"{number:05d}.json"


def write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all. The temporary name is fixed: the next run reuses what a killed one left."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def as_json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def chunks(rows: range, size: int) -> list[range]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def stored(values: Tensor, dtype: str) -> np.ndarray:
    """As numpy, in the type that is stored.

    Raises:
        ValueError: a value is not finite, or not in that type.
    """
    with np.errstate(over="ignore"):  # refused below
        array = values.cpu().numpy().astype(dtype, order="C")
    if not np.isfinite(array).all():
        raise ValueError(
            f"A feature is not finite as {np.dtype(dtype).name}: use --precision fp32 and --dtype float32."
        )
    return array


def fingerprint(network: torch.nn.Module) -> str:
    """Hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def data_fingerprint(data: Dataset) -> str:
    """Hash of file names, labels and captions, in order."""
    digest, captions = hashlib.sha256(), getattr(data, "captions", None) or [None] * len(data)
    for row in zip(map(os.fsdecode, data.names), data.labels.tolist(), captions, strict=True):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def write_prompts(text: ClipText, prompts: Sequence[str], out: Path, layout: str) -> None:
    """Prompts for sample grids: prompts.json and prompts.npy (n, tokens, width) float32, or run_vis/{i}.npy."""
    contexts = text.encode(prompts).cpu().numpy()
    if layout == "sharded":
        write(out / "prompts.npy", plain_array(contexts))
        write(out / "prompts.json", as_json(list(prompts)))
        return
    folder = out / "run_vis"
    folder.mkdir(exist_ok=True)
    others = sorted({path.name for path in folder.glob("*.npy")} - {f"{i}.npy" for i in range(len(prompts))})
    if others:
        raise ValueError(f"{folder} holds files of more prompts than these {len(prompts)} (such as {others[0]}).")
    for i, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        write(folder / f"{i}.npy", object_array([prompt, context]))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.extract_features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    prompts = commands.add_parser("prompts", parents=[common, texts], help="contexts of prompts for sample grids")
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
    kind = ImageNet if os.path.isdir(os.path.join(options.images, "train")) else Images
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
    run = Run(out, Accelerator(cpu=options.cpu, kwargs_handlers=[PATIENCE]))
    text = None if options.command == "imagenet" else ClipText(path=options.clip, device=run.device)
    if options.command in ("imagenet", "coco"):
        data = open_images(options)
        summary = extract(
            data,
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
    elif options.command == "empty":
        summary = {"out": str(out / "empty_context.npy")}
        if run.is_main:
            write(out / "empty_context.npy", plain_array(text.encode([""])[0].cpu().numpy()))
    else:
        lines = Path(options.prompts).read_text().splitlines() if options.prompts else PROMPTS
        prompts = [line.strip() for line in lines if line.strip()]
        summary = {"out": str(out), "prompts": len(prompts)}
        if run.is_main:
            write_prompts(text, prompts, out, options.layout)
    if run.is_main:
        print(json.dumps(summary))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"extract_features: {error}")
