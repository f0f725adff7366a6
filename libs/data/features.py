"""Data sets of extracted features: moments of the autoencoder with class labels, or with text contexts.

Both come from `python -m scripts.extract_features`. Here is the default layout, "sharded": a folder of safetensors
files with some thousand images each, beside `index.json` and `labels.npy`. (`libs.data.features_npy` reads U-ViT's
layout, one file per image; `benchmarks/dataloading.py` compares the two.) The arrays of a shard of n images:

    moments        (n, views, 8, h, w), float16 or float32. views = 2 where mirror images are stored, each right after
                   its image: an encoder does not commute with mirroring, so a flip is a second copy
    contexts       (m, tokens, width), of the m captions of the n images in turn (text only, as the next three)
    first_caption  (n + 1,) int64, the first caption of each image
    captions       UTF-8 bytes; caption_ends (m + 1,) int64, where they begin and end

One image is one read at a known offset, about 3 microseconds once the system has the file in its cache. That is less
than it costs to hand the image over from a worker process, so the workers of these data sets are threads. Nothing is
mapped or kept, so a process that has read everything is no larger than one that has read nothing. Batches have the type
that is stored; the codec makes float32 of moments, on the device, and contexts need `.float()` there. Disk per image,
with float16 (`--dtype float32` doubles it):

    256 x 256, two views      32,768 bytes and a label       42 GB for ImageNet   (npy: 66,000 bytes in two files)
    512 x 512, two views     131,072 bytes and a label      168 GB for ImageNet
    COCO, one view            16,384 bytes and 118,272 per caption, 0.6 MB in all, 50 GB for train2014

float16 rounds moments by less than 0.05 %, below what the decoder can show.

What these data sets yield are moments (B, 8, h, w); `libs.codecs.KL.sample` makes latents of them with the caller's
noise. Dropping labels and contexts for guidance is the training loop's work.
"""

import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from libs.data.dataset import Dataset

FORMAT = "latent shards, version 1"
DTYPES = {"<f2": torch.float16, "<f4": torch.float32}
OPEN_SHARDS = 256  # files that a data set keeps open; systems allow a process about a thousand


class LatentShards(Dataset):
    """Moments and class labels in the sharded layout.

    shape is that of the moments, (8, h, w); class n_classes is free for the null class.

    Args:
        path: folder with `index.json`.

    Raises:
        ValueError: no finished extraction at `path`, or one of another kind; a flip where no mirror images are stored.
    """

    name, threads = "latents", True

    def __init__(self, *, path: str = "assets/datasets/imagenet256_features"):
        self.path, self.index = path, read_index(path)
        if self.index["context"] is not None:
            raise ValueError(f"{path} holds text contexts: read it with dataset.name=captions, not {self.name}.")
        self._open()
        self.labels = torch.from_numpy(np.load(os.path.join(path, "labels.npy")).astype(np.int64))

    def _open(self) -> None:
        self.shape, self.n_classes = tuple(self.index["shape"]), self.index["n_classes"]
        self._shards = OrderedDict()

    def __len__(self) -> int:
        return self.index["n"]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": OrderedDict()}  # each process opens files for itself

    def shard(self, index: int) -> tuple["Shard", int]:
        """The shard of image `index`, and the image's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number, row = divmod(index, self.index["shard_size"])
        shard = self._shards.get(number)  # held here: another thread may drop it from the open ones
        if shard is None:
            shard = Shard(os.path.join(self.path, self.index["files"][number]["name"]))
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[number] = shard
        return shard, row

    def moments(self, indices: Tensor, flips: Tensor) -> Tensor:
        """(b,) int64 and (b,) bool -> (b, 8, h, w) in the stored type."""
        views = 1 + self.index["flips"]
        if views == 1 and flips.any():
            raise ValueError(
                f"A mirror image was asked for, but {self.path} was extracted without them: set "
                "dataset.random_flip=False, or extract again with --flips."
            )
        rows = []
        for index, flip in zip(indices.tolist(), flips.tolist(), strict=True):
            shard, row = self.shard(index)
            rows.append(shard.read("moments", row * views + flip, per=views))
        return stacked(rows, self.index["dtype"], self.shape)

    def gather(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (b, 8, h, w) in the stored type, of the mirror image where flips (b,) is set; labels (b,) int64."""
        return self.moments(indices, flips), self.labels[indices]

    def get(self, index: int, flip: bool) -> tuple[Tensor, int]:
        """Moments (8, h, w) float32 and the label of one image."""
        moments, label = super().get(index, flip)
        return moments.float(), label

    def pixels(self, index: int) -> Tensor:
        raise no_pixels(self.path)


class CaptionShards(LatentShards):
    """Moments, contexts and captions in the sharded layout.

    Every image has several captions; which one is read is the caller's draw, a uniform number in [0, 1) per image, so
    that the choice can depend on the position in training alone.

    Args:
        path: folder with one folder per split and `empty_context.npy`.
        split: "train" or "val".

    Raises:
        ValueError: as for `LatentShards`. (The usual extraction of COCO stores no mirror images.)
    """

    name, draws = "captions", True

    def __init__(self, *, path: str = "assets/datasets/coco256_features", split: str = "train"):
        self.path = os.path.join(path, split)
        self.index = read_index(self.path)
        if self.index["context"] is None:
            raise ValueError(f"{self.path} holds no text contexts: read it with dataset.name=latents.")
        self._open()
        self.context_shape = tuple(self.index["context"])  # (tokens, width)

    def _captions(self, index: int) -> tuple["Shard", int, int]:
        """The shard of an image, and the first and one past the last row of its captions there."""
        shard, row = self.shard(index)
        first, end = shard.small("first_caption")[row : row + 2].tolist()
        return shard, first, end

    def gather(self, indices: Tensor, flips: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (b, 8, h, w) and contexts (b, tokens, width), both in the stored type.

        Args:
            indices, flips: (b,) int64 and bool.
            draws: (b,) in [0, 1); of m captions, draw u takes number floor(u m).
        """
        rows = []
        for index, draw in zip(indices.tolist(), draws.tolist(), strict=True):
            shard, first, end = self._captions(index)
            rows.append(shard.read("contexts", first + picked(draw, end - first)))
        return self.moments(indices, flips), stacked(rows, self.index["dtype"], self.context_shape)

    def get(self, index: int, flip: bool, draw: float = 0.0) -> tuple[Tensor, Tensor]:
        """Moments (8, h, w) and the context (tokens, width) of one caption of image `index`, float32."""
        moments, contexts = self.gather(torch.tensor([index]), torch.tensor([flip]), torch.tensor([draw]))
        return moments[0].float(), contexts[0].float()

    def empty(self) -> Tensor:
        """The context (tokens, width) float32 of the empty prompt."""
        return empty_context(os.path.dirname(self.path))

    def captions(self, index: int) -> list[str]:
        """The captions of an image; `gather` with draw u returns the context of number floor(u m)."""
        shard, first, end = self._captions(index)
        ends = shard.small("caption_ends")[first : end + 1].tolist()  # byte offsets, one more than captions
        return [shard.read_bytes("captions", a, b).decode() for a, b in zip(ends, ends[1:], strict=False)]


class Shard:
    """One safetensors file, read row by row. Reads carry their offset, so forked processes may share the descriptor."""

    def __init__(self, path: str):
        self.path, self._small = path, {}
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; was the extraction moved or cut?") from error
        weakref.finalize(self, os.close, self._file)
        length = int.from_bytes(self._at(0, 8), "little")
        self.arrays, self._data = json.loads(self._at(8, length)), 8 + length

    def _at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file, length, offset)
        if len(data) != length:
            raise ValueError(f"{self.path} ends before byte {offset + length}: it was cut; extract this shard again.")
        return data

    def read_bytes(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of array `name`."""
        first, end = self.arrays[name]["data_offsets"]
        if first + stop > end:
            raise ValueError(f"{self.path} has no bytes {start} to {stop} of {name}.")
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


def read_index(path: str) -> dict:
    """What `scripts.extract_features` wrote about the shards in a folder, once all were complete."""
    file = os.path.join(path, "index.json")
    if not os.path.isfile(file):
        begun = os.path.isdir(os.path.join(path, ".extract"))
        raise ValueError(
            f"{path} has no index.json: "
            + ("its extraction is not finished; run the same command again" if begun else "nothing was extracted there")
            + " (python -m scripts.extract_features; for U-ViT's layout use dataset.name=latents_npy or captions_npy)."
        )
    with open(file) as opened:
        index = json.load(opened)
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} says format {index.get('format')!r}; this code reads {FORMAT!r}.")
    return index


def stacked(rows: Sequence[bytes], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Raw rows as one tensor (b, *shape) of the dtype they have."""
    data = bytearray().join(rows)  # a bytearray, because torch wants memory that may be written
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(len(rows), *shape)


def picked(draw: float, n: int) -> int:
    """One of n from a uniform number; a draw just below 1 may round up to n."""
    return min(int(draw * n), n - 1)


def no_pixels(path: str) -> ValueError:
    return ValueError(f"{path} holds latents, not images: compute reference statistics from the images themselves.")


def empty_context(path: str) -> Tensor:
    """The context (tokens, width) float32 of the empty prompt, `path`/empty_context.npy (both layouts)."""
    file = os.path.join(path, "empty_context.npy")
    if not os.path.isfile(file):
        raise ValueError(f"There is no {file}; `python -m scripts.extract_features empty --out {path}` makes it.")
    return torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))


def prompts(path: str) -> tuple[list[str], Tensor]:
    """Prompts for sample grids and their contexts (n, tokens, width) float32."""
    file = os.path.join(path, "prompts.json")
    if not os.path.isfile(file):
        raise ValueError(f"There is no {file}; `python -m scripts.extract_features prompts --out {path}` makes it.")
    with open(file) as opened:
        texts = json.load(opened)
    return texts, torch.from_numpy(np.load(os.path.join(path, "prompts.npy"), allow_pickle=False).astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# Writing


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

    def files(
        self,
        moments: np.ndarray,
        labels: Sequence[int] | None,
        captions: Sequence[Sequence[str]] | None,
        contexts: np.ndarray | None,
    ) -> Iterator[bytes]:
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
