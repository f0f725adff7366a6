"""The work of `scripts.extract_features`: features of a data set, shard by shard, by any number of processes.

A shard is done when its record (`<out>/.extract/<number>.json`) exists, and the record is written after the shard's
files. Batches never cross shards, so a shard's bytes do not depend on what was done before, or by whom.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from libs.data.dataset import Dataset
from libs.data.features_npy import Npy
from libs.data.npy import object_array, plain_array
from libs.data.shards import Sharded, make_index
from libs.data.workers import read_in_workers
from libs.files import read_json, remove_parts, write_file, write_json
from libs.run import Run


def extract(
    data: Dataset,
    codec: Any,
    text: Any,
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

    Told to stop, it ends after the batch at hand; the shard of that batch is begun again by the same command.

    Args:
        data: images with `labels`, or with `captions` if `text` is given.
        codec: the autoencoder, `libs.codecs.KL`.
        text: `libs.codecs.ClipText`, or None for class labels.
        flips: encode the mirror images too.
        batch_size: images encoded at once. (Like all settings that can change a bit of the result, it must stay the
            same when a run is continued.)
        shard_size: images per shard.
        workers: processes that decode images ahead.

    Raises:
        ValueError: `out` holds something else, an image or a feature cannot be used, or a file is not what was written.
    """
    started = time.perf_counter()
    captions = data.captions if text else None
    plan = dependencies(data, codec, text, layout, flips=flips, batch_size=batch_size, shard_size=shard_size)
    if run.is_main:
        begin_extraction(out, plan)
    run.barrier()
    shards = list(enumerate(chunks(range(len(data)), shard_size)))
    todo = [(number, rows) for number, rows in shards if not record_path(out, number).exists()]
    run.barrier()  # nobody may finish a shard while others still look for what is to be done
    mine = todo[run.rank :: run.world]
    run.say(f"{len(data)} images in {len(shards)} shards, {len(shards) - len(todo)} of which are done already")

    batches = [batch for _, rows in mine for batch in chunks(rows, batch_size)]
    read = read_in_workers(data.stack, batches, workers, item_bytes=batch_size * data.shape[-1] ** 2 * 3)
    with tqdm(total=sum(map(len, batches)), unit="image", disable=not run.is_main, file=sys.stderr) as bar:
        for number, rows in mine:
            moments, contexts = [], []
            for batch in run.stopping.between(chunks(rows, batch_size)):
                images = next(read).to(run.device).float() / 127.5 - 1  # (b, 3, R, R)
                views = [images, images.flip(-1)] if flips else [images]
                moments.append(stored(torch.stack([codec.moments(x) for x in views], 1), layout.dtype))
                if text:  # (b, views, 8, h, w) above, (captions of the batch, tokens, width) here
                    texts = [caption for i in batch for caption in captions[i]]
                    contexts.append(stored(text.encode(texts), layout.dtype))
                bar.update(len(batch))
            files = layout.files(
                np.concatenate(moments),
                None if text else [int(data.labels[i]) for i in rows],
                [captions[i] for i in rows] if text else None,
                np.concatenate(contexts) if text else None,
            )
            finish(out, number, zip(item_names(layout, number, rows, flips, captions), files, strict=True))
    run.barrier()

    verify(
        out,
        {number: item_names(layout, number, rows, flips, captions) for number, rows in shards[run.rank :: run.world]},
    )
    run.barrier()
    done = [read_json(record_path(out, number), "the record of a shard") for number, _ in shards]
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


def dependencies(data: Dataset, codec, text, layout: Sharded | Npy, **settings) -> dict:
    """All that the bytes of an extraction depend on."""
    return {
        "data": {"name": data.name, "images": len(data), "sha256": data_fingerprint(data)},
        "resolution": data.shape[-1],
        "autoencoder": network_fingerprint(codec.vae),
        "clip": network_fingerprint(text.model) if text else None,
        "precision": str(codec.dtype).removeprefix("torch."),
        "layout": type(layout).__name__.lower(),
        "dtype": layout.dtype,
        **settings,
    }


def begin_extraction(out: Path, plan: dict) -> None:
    """Keep the plan beside the records, or refuse to continue another one."""
    file = out / ".extract" / "plan.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(file.parent)
    if not file.exists():
        if any(out.glob("*.npy")) or any(out.glob("*.safetensors")):
            raise ValueError(f"{out} has features that do not come from this command; choose another --out.")
        write_json(file, plan)
    before = read_json(file, "the plan of the extraction")
    changed = [f"{key} was {before.get(key)} and is {plan[key]}" for key in plan if before.get(key) != plan[key]]
    if changed:
        raise ValueError(
            f"{out} was begun with other settings ({'; '.join(changed)}), says .extract/{file.name}: run the "
            "earlier command again, or choose another --out."
        )


def item_names(layout: Sharded | Npy, number: int, rows: range, flips: bool, captions) -> list[str]:
    """The files of one shard."""
    return layout.names(number, rows, flips, [captions[i] for i in rows] if captions else None)


def finish(out: Path, number: int, files: Iterator[tuple[str, bytes]]) -> None:
    """Write the files of a shard, then its record."""
    digest, count, size = hashlib.sha256(), 0, 0
    for name, content in files:
        write_file(out / name, content, sync=False)
        digest.update(content)
        count, size = count + 1, size + len(content)
    os.sync()  # once for all files: U-ViT's layout has hundreds in a shard
    write_json(record_path(out, number), {"files": count, "bytes": size, "sha256": digest.hexdigest()})


def verify(out: Path, shards: dict[int, Sequence[str]]) -> None:
    """Read the files of these shards back and compare them with the records; those that differ count as not done.

    Raises:
        ValueError: a file is not what was computed.
    """
    broken = []
    for number, files in shards.items():
        digest, there = hashlib.sha256(), True
        for name in files:
            there = there and (out / name).is_file()
            digest.update((out / name).read_bytes() if there else b"")
        if not there or digest.hexdigest() != read_json(record_path(out, number), "the record of a shard").get(
            "sha256"
        ):
            record_path(out, number).unlink()
            broken += files
    if broken:
        raise ValueError(
            f"{len(broken)} files in {out} are not what was computed (the first is {broken[0]}). They count as not "
            "done now: run the same command again."
        )


def write_index(out: Path, data: Dataset, plan: dict, shards, done, codec, text) -> None:
    """labels.npy and index.json, after which the data sets of `libs.data.features` accept the folder."""
    if not text:
        write_file(out / "labels.npy", plain_array(data.labels.numpy().astype("<i4")))
    side = data.shape[-1] // codec.factor
    index = make_index(
        n=len(data),
        n_classes=data.n_classes,
        class_names=data.class_names,
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
    write_json(out / "index.json", index)


def write_empty(text, out: Path) -> dict:
    """The context of the empty prompt, empty_context.npy; returns the summary."""
    write_file(out / "empty_context.npy", plain_array(text.encode([""])[0].cpu().numpy()))
    return {"out": str(out / "empty_context.npy")}


def write_prompts(text, prompts: Sequence[str], out: Path) -> dict:
    """Prompts and their contexts for the sample grids of U-ViT's public code, run_vis/{i}.npy; returns the summary.

    Raises:
        ValueError: the folder holds files of more prompts.
    """
    folder = out / "run_vis"
    folder.mkdir(exist_ok=True)
    others = sorted({path.name for path in folder.glob("*.npy")} - {f"{i}.npy" for i in range(len(prompts))})
    if others:
        raise ValueError(f"{folder} holds files of more prompts than these {len(prompts)} (such as {others[0]}).")
    for i, (prompt, context) in enumerate(zip(prompts, text.encode(prompts).cpu().numpy(), strict=True)):
        write_file(folder / f"{i}.npy", object_array([prompt, context]))
    return {"out": str(folder), "prompts": len(prompts)}


def record_path(out: Path, number: int) -> Path:
    return out / ".extract" / f"{number:05d}.json"


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


def network_fingerprint(network: torch.nn.Module) -> str:
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
