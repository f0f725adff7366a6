"""The files of the sharded layout of extracted features: their form, reading them row by row, writing them.

A folder of safetensors files with some thousand images each, beside `index.json` and `labels.npy`. The arrays of a
shard of n images:

    moments        (n, views, 8, h, w), float16 or float32. views = 2 where mirror images are stored, each right after
                   its image: an encoder does not commute with mirroring, so a flip is a second copy
    contexts       (m, tokens, width), of the m captions of the n images in turn (text only, as the next three)
    first_caption  (n + 1,) int64, the first caption of each image
    captions       UTF-8 bytes; caption_ends (m + 1,) int64, where they begin and end

`libs.data.features` has the data sets that read them, `libs.data.extract` the work that makes them.
"""

import json
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import save

from libs.files import first_line, open_regular, read_json

FORMAT = "latent shards, version 1"
SHARD_DTYPES = {"<f2": torch.float16, "<f4": torch.float32}
SAFETENSORS = {"<f2": "F16", "<f4": "F32"}
BYTES = {"F16": 2, "F32": 4, "I64": 8, "U8": 1}  # per number


class Shard:
    """One safetensors file, read row by row. Reads carry their offset, so forked processes may share the descriptor.

    Args:
        path: of the file.
        rows: shape and type of every array that must be there, by name; None in a shape stands for any number.

    Raises:
        ValueError: the file cannot be read, or does not hold these arrays; the message names it.
    """

    def __init__(self, path: str, rows: dict[str, tuple[tuple[int | None, ...], str]]):
        self.path, self._small = path, {}
        try:
            with open_regular(path) as file:
                self._file = os.dup(file.fileno())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}; was the extraction moved or cut?") from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        length = int.from_bytes(self._at(0, 8), "little")
        if 8 + length > size:
            raise self._cut(8 + length)
        try:
            self.arrays, self._data = json.loads(self._at(8, length)), 8 + length
            faults = [name for name, (shape, dtype) in rows.items() if not fits(self.arrays[name], shape, dtype)]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            faults = [f"its header ({type(error).__name__}: {str(error)[:100]})"]
        if faults:
            raise ValueError(f"{path} is damaged in {', '.join(faults)}: extract this shard again.")
        if (end := max(self.arrays[name]["data_offsets"][1] for name in rows)) > size - self._data:
            raise self._cut(self._data + end)

    def _cut(self, end: int) -> ValueError:
        return ValueError(f"{self.path} ends before byte {end}: it was cut; extract this shard again.")

    def _at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file, length, offset)
        if len(data) != length:
            raise self._cut(offset + length)
        return data

    def read_bytes(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of array `name`."""
        first, end = self.arrays[name]["data_offsets"]
        if not 0 <= start <= stop <= end - first:
            raise ValueError(f"{self.path} has no bytes {start} to {stop} of {name}: extract this shard again.")
        return self._at(self._data + first + start, stop - start)

    def read(self, name: str, row: int, per: int = 1) -> bytes:
        """Row `row` of array `name`, whose first axis counts as split in `per` rows."""
        first, end = self.arrays[name]["data_offsets"]
        size = (end - first) // (self.arrays[name]["shape"][0] * per)
        return self.read_bytes(name, row * size, (row + 1) * size)

    def small(self, name: str) -> np.ndarray:
        """A whole int64 array, kept."""
        if name not in self._small:
            first, end = self.arrays[name]["data_offsets"]
            self._small[name] = np.frombuffer(self.read_bytes(name, 0, end - first), "<i8")
        return self._small[name]


def fits(array: dict, shape: tuple[int | None, ...], dtype: str) -> bool:
    """Whether an entry of a safetensors header has this shape and type, and as many bytes as they need."""
    found, (first, end) = array["shape"], array["data_offsets"]
    numbers = all(type(number) is int and number >= 0 for number in (*found, first, end))
    sizes = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    return numbers and sizes and array["dtype"] == dtype and end - first == math.prod(found) * BYTES[dtype]


def read_index(path: str) -> dict:
    """What `scripts.extract_features` wrote about the shards in a folder, once all were complete.

    Raises:
        ValueError: there is no such file, or something in it is not what that command writes.
    """
    file = os.path.join(path, "index.json")
    if not os.path.isfile(file):
        begun = os.path.isdir(os.path.join(path, ".extract"))
        raise ValueError(
            f"{path} has no index.json: "
            + ("its extraction is not finished; run the same command again" if begun else "nothing was extracted there")
            + " (python -m scripts.extract_features; for U-ViT's layout use dataset.name=latents_npy or captions_npy)."
        )
    index = read_json(file, "the index of the features")
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} says format {index.get('format')!r}; this code reads {FORMAT!r}.")
    names = index.get("class_names")
    checks = {
        "n": is_count(index.get("n")),
        "n_classes": is_count(index.get("n_classes"), 0),
        "shape": is_sizes(index.get("shape"), 3),
        "context": index.get("context") is None or is_sizes(index["context"], 2),
        "flips": isinstance(index.get("flips"), bool),
        "dtype": isinstance(index.get("dtype"), str) and index["dtype"] in SHARD_DTYPES,
        "shard_size": is_count(index.get("shard_size")),
        "files": isinstance(index.get("files"), list) and are_shards(index["files"]),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
    }
    wrong = [key for key, right in checks.items() if not right]
    if not wrong and len(index["files"]) != -(-index["n"] // index["shard_size"]):
        wrong = ["files"]
    if not wrong and names is not None and len(names) != index["n_classes"]:
        wrong = ["class_names"]
    if wrong:
        shown = ", ".join(f"{key}={str(index.get(key))[:60]}" for key in wrong)
        raise ValueError(f"{file} is damaged ({shown}): run the extraction again, which keeps finished shards.")
    return index


def is_count(value, least: int = 1) -> bool:
    return type(value) is int and least <= value < 2**40


def is_sizes(value, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(map(is_count, value))


def are_shards(entries) -> bool:
    """Whether the index names the files beside it by their numbers, each once, and none elsewhere."""
    expected = [f"{number:05d}.safetensors" for number in range(len(entries))]
    return [entry.get("name") if isinstance(entry, dict) else None for entry in entries] == expected


def make_index(
    *,
    n: int,
    n_classes: int,
    shape: tuple[int, ...],
    context: tuple[int, int] | None,
    flips: bool,
    dtype: str,
    shard_size: int,
    files: Sequence[dict],
    plan: dict,
    class_names: Sequence[str] | None = None,
) -> dict:
    """The content of index.json, written when all shards are complete.

    Args:
        n: images.
        n_classes: 0 for text.
        shape: of the moments of one image.
        context: (tokens, width), or None for class labels.
        flips: whether mirror images are stored.
        dtype: of moments and contexts, "<f2" or "<f4".
        shard_size: images per shard; the last may have fewer.
        files: {"name": ..., "images": ..., "sha256": ...} of every shard.
        plan: how they were made, for the record.
        class_names: in the order of the labels, where they are known.
    """
    return {"format": FORMAT} | locals()


@dataclass(frozen=True)
class Sharded:
    """What `scripts.extract_features` asks of a layout: names and contents of the files of one shard.

    dtype   "<f2" or "<f4"
    """

    dtype: str = "<f2"

    def names(self, number: int, rows: range, flips: bool, captions: Sequence[Sequence[str]] | None) -> list[str]:
        """The files of shard `number`, which has the images `rows`."""
        return [f"{number:05d}.safetensors"]

    def files(self, moments, labels, captions, contexts) -> Iterator[bytes]:
        """Their contents.

        Args:
            moments: (n, views, 8, h, w).
            labels: n class labels (written to labels.npy for all shards together).
            captions: the texts of each image, with contexts (m, tokens, width) for the m texts in turn.
        """
        arrays = {"moments": moments}
        if contexts is not None:
            texts = [text.encode() for of_image in captions for text in of_image]
            arrays |= {
                "contexts": contexts,
                "first_caption": np.cumsum([0] + [len(of_image) for of_image in captions], dtype=np.int64),
                "caption_ends": np.cumsum([0] + [len(text) for text in texts], dtype=np.int64),
                "captions": np.frombuffer(b"".join(texts), np.uint8),
            }
        # `save` writes the memory of an array as it lies there, whatever its strides.
        yield save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
