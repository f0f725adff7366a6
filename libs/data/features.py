"""Data sets of extracted features: moments of the autoencoder with class labels, or with text contexts.

Both come from `python -m scripts.extract_features`. Here is the default layout, "sharded", whose files
`libs.data.shards` describes. (`libs.data.features_npy` reads U-ViT's layout, one file per image;
`benchmarks/dataloading.py` compares the two.)

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

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from libs.data.dataset import Dataset
from libs.data.npy import read_array
from libs.data.shards import SAFETENSORS, SHARD_DTYPES, Shard, read_index

OPEN_SHARDS = 256  # files that a data set keeps open; systems allow a process about a thousand
CHANGING = threading.Lock()  # the open files of a data set: one thread at a time; not of the object, which is pickled


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
        file = os.path.join(path, "labels.npy")
        labels = read_array(file, "iu").astype(np.int64)
        if labels.shape != (len(self),) or labels.min() < 0 or labels.max() >= self.n_classes:
            raise ValueError(f"{file} must hold {len(self)} labels from 0 to {self.n_classes - 1}, as index.json says.")
        self.labels = torch.from_numpy(labels)

    def _open(self) -> None:
        self.shape, self.n_classes = tuple(self.index["shape"]), self.index["n_classes"]
        names = self.index.get("class_names")
        self.class_names = None if names is None else tuple(names)
        self._shards = OrderedDict()

    def _rows(self, n: int) -> dict:
        """What a shard of n images must hold: shape and safetensors' type of each array."""
        dtype = SAFETENSORS[self.index["dtype"]]
        arrays = {"moments": ((n, 1 + self.index["flips"], *self.shape), dtype)}
        if self.index["context"] is not None:
            arrays |= {
                "contexts": ((None, *self.index["context"]), dtype),
                "first_caption": ((n + 1,), "I64"),
                "caption_ends": ((None,), "I64"),
                "captions": ((None,), "U8"),
            }
        return arrays

    def __len__(self) -> int:
        return self.index["n"]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": OrderedDict()}  # each process opens files for itself

    def shard(self, index: int) -> tuple[Shard, int]:
        """The shard of image `index`, and the image's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number, row = divmod(index, self.index["shard_size"])
        shard = self._shards.get(number)  # held here: another thread may drop it from the open ones
        if shard is None:
            size = self.index["shard_size"]
            rows = self._rows(min(size, len(self) - number * size))
            shard = Shard(os.path.join(self.path, self.index["files"][number]["name"]), rows)
            with CHANGING:  # popitem finds the oldest and removes it in two steps
                while len(self._shards) >= OPEN_SHARDS:
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

    def _captions(self, index: int) -> tuple[Shard, int, int]:
        """The shard of an image, and the first and one past the last row of its captions there."""
        shard, row = self.shard(index)
        first, end = shard.small("first_caption")[row : row + 2].tolist()
        if not 0 <= first < end <= shard.arrays["contexts"]["shape"][0]:
            raise ValueError(f"{shard.path} is damaged in first_caption: extract this shard again.")
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

    def empty(self) -> Tensor:
        """The context (tokens, width) float32 of the empty prompt."""
        return empty_context(os.path.dirname(self.path))

    def captions(self, index: int) -> list[str]:
        """The captions of an image; `gather` with draw u returns the context of number floor(u m)."""
        shard, first, end = self._captions(index)
        ends = shard.small("caption_ends")[first : end + 1].tolist()  # byte offsets, one more than captions
        if len(ends) != end - first + 1:
            raise ValueError(f"{shard.path} is damaged in caption_ends: extract this shard again.")
        texts = [shard.read_bytes("captions", a, b) for a, b in zip(ends, ends[1:], strict=False)]
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise ValueError(f"{shard.path} is damaged in captions: extract this shard again.") from error


def stacked(rows: Sequence[bytes], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Raw rows as one tensor (b, *shape) of the dtype they have."""
    data = bytearray().join(rows)  # a bytearray, because torch wants memory that may be written
    return torch.frombuffer(data, dtype=SHARD_DTYPES[dtype]).view(len(rows), *shape)


def picked(draw: float, n: int) -> int:
    """One of n from a uniform number; a draw just below 1 may round up to n."""
    return min(int(draw * n), n - 1)


def no_pixels(path: str) -> ValueError:
    return ValueError(f"{path} holds latents, not images: compute reference statistics from the images themselves.")


@cache  # training asks at every step
def empty_context(path: str) -> Tensor:
    """The context (tokens, width) float32 of the empty prompt, `path`/empty_context.npy (both layouts)."""
    file = os.path.join(path, "empty_context.npy")
    if not os.path.isfile(file):
        raise ValueError(f"There is no {file}; `python -m scripts.extract_features empty --out {path}` makes it.")
    return torch.from_numpy(read_array(file).astype(np.float32))
