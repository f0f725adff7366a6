"""Extracted features in the layout of U-ViT's public code: one file per image. Read here, and written for that code.

    {i}.npy of ImageNet        object array (moments float32 (8, h, w), label): for every 256 images first these, then
                               their mirror images. U-ViT expects 2 x 1,281,167 files
    {i}.npy, {i}_{k}.npy       of COCO, in train/ and val/: moments float32, and context float32 (77, 768) of caption k;
                               plain arrays. U-ViT expects 82,783 and 40,504 images
    run_vis/{i}.npy            object array (prompt, context), which only that code reads
    empty_context.npy          plain float32 (77, 768), as in the sharded layout

U-ViT's code unpacks what `np.load(file, allow_pickle=True)` returns into two values of different shape, so the object
arrays, which are pickles, cannot be avoided; `libs.data.npy` reads them without running code. Reading a file
per image is slow (`benchmarks/dataloading.py`); `libs.data.features` has the layout to train from.
"""

import operator
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from libs.build import check_at_least
from libs.data.dataset import Dataset
from libs.data.features import empty_context, no_pixels, picked
from libs.data.npy import object_array, plain_array, read_array, read_objects

BATCH = 256  # images between the mirror images of one batch and the next, in U-ViT's script


class LatentFiles(Dataset):
    """U-ViT's ImageNet features: `{i}.npy`, for every `batch` images first these and then their mirror images.

    An index here is an image; its mirror image is reached by flipping (U-ViT's own index runs over both).

    Args:
        path: folder of the files, numbered from 0 without gaps.
        n_classes: labels are 0 to n_classes - 1.
        batch: images per batch when the files were written (256 in U-ViT's script).
        read_pickles: must be True, since the files are object arrays. They are read as data and run no code
            (see `read_objects`), but it should be known that pickles are opened.
    """

    name, shape = "latents_npy", ()

    def __init__(
        self,
        *,
        path: str = "assets/datasets/imagenet256_features",
        n_classes: int = 1000,
        batch: int = BATCH,
        read_pickles: bool = False,
    ):
        if not read_pickles:
            raise ValueError(
                "The files of dataset latents_npy are pickled object arrays: set dataset.latents_npy.read_pickles=True "
                "to have them read (without running code), or extract again with --layout sharded."
            )
        check_at_least("dataset.latents_npy.", n_classes=n_classes, batch=batch)
        files = count_files(path)
        if files == 0 or files % 2:
            raise ValueError(
                f"dataset.latents_npy.path={path!r} has {files} files 0.npy, 1.npy, ...; it must have an even number, "
                "one and its mirror image per image."
            )
        self.path, self.n, self.n_classes, self.batch = path, files // 2, n_classes, batch
        self.shape = self._read(0)[0].shape

    def __len__(self) -> int:
        return self.n

    def _read(self, number: int) -> tuple[np.ndarray, int]:
        file = os.path.join(self.path, f"{number}.npy")
        values = read_objects(file)
        try:
            moments, label = values[0], operator.index(values[1])
            fits = len(values) == 2 and is_moments(moments, self.shape) and 0 <= label < self.n_classes
        except (IndexError, TypeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{file} must hold moments {self.shape or '(8, h, w)'} and a label from 0 to {self.n_classes - 1}."
            )
        return moments, label

    def gather(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """As `LatentShards.gather`, float32."""
        numbers = [self.number(index, flip) for index, flip in zip(indices.tolist(), flips.tolist(), strict=True)]
        moments, labels = zip(*map(self._read, numbers), strict=True)
        return torch.from_numpy(np.stack(moments).astype(np.float32)), torch.tensor(labels)

    def number(self, index: int, flip: bool) -> int:
        """The file of an image or of its mirror image; the last batch may be smaller."""
        if not 0 <= index < self.n:
            raise IndexError(f"image {index} of {self.n}")
        first = index - index % self.batch
        return first + index + flip * min(self.batch, self.n - first)

    def pixels(self, index: int) -> Tensor:
        raise no_pixels(self.path)


class CaptionFiles(Dataset):
    """U-ViT's COCO features: `{i}.npy` and `{i}_{k}.npy`. The layout has neither mirror images nor the captions' text.

    Args:
        path: folder with one folder per split and `empty_context.npy`.
        split: "train" or "val".
    """

    name, n_classes, draws = "captions_npy", 0, True

    def __init__(self, *, path: str = "assets/datasets/coco256_features", split: str = "train"):
        self.path = os.path.join(path, split)
        if not os.path.isdir(self.path):
            raise ValueError(f"dataset.captions_npy: there is no folder {self.path}.")
        images, contexts = set(), {}
        for entry in os.scandir(self.path):
            if match := re.fullmatch(r"(\d+)(?:_(\d+))?\.npy", entry.name):
                if match[2]:
                    contexts.setdefault(int(match[1]), set()).add(int(match[2]))
                else:
                    images.add(int(match[1]))
        gaps = {i for i, of_image in contexts.items() if len(of_image) <= max(of_image)}
        if odd := sorted((images ^ contexts.keys()) | (images ^ set(range(len(images)))) | gaps or {0} - images):
            raise ValueError(
                f"{self.path} must have i.npy and i_0.npy, i_1.npy, ... for every i, all from 0 without gaps; it has "
                f"{len(images)} images and contexts for {len(contexts)}, look at {odd[0]}."
            )
        self.n_captions = np.array([len(contexts[i]) for i in range(len(images))])
        self.shape, self.context_shape = (read_array(os.path.join(self.path, f)).shape for f in ("0.npy", "0_0.npy"))
        if len(self.shape) != 3 or len(self.context_shape) != 2:
            raise ValueError(
                f"{self.path} must hold moments (8, h, w) in 0.npy and a context (tokens, width) in 0_0.npy; they have "
                f"the shapes {self.shape} and {self.context_shape}."
            )

    def __len__(self) -> int:
        return len(self.n_captions)

    def _load(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        file = os.path.join(self.path, f"{name}.npy")
        array = read_array(file)
        if array.shape != shape:
            raise ValueError(f"{file} has the shape {array.shape}; the first of its kind has {shape}.")
        return array

    def gather(self, indices: Tensor, flips: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """As `CaptionShards.gather`, float32."""
        if flips.any():
            raise ValueError(f"The layout of {self.path} has no mirror images: set dataset.random_flip=False.")
        pairs = [(i, picked(u, self.n_captions[i])) for i, u in zip(indices.tolist(), draws.tolist(), strict=True)]
        moments = np.stack([self._load(f"{i}", self.shape) for i, _ in pairs])
        contexts = np.stack([self._load(f"{i}_{k}", self.context_shape) for i, k in pairs])
        return torch.from_numpy(moments.astype(np.float32)), torch.from_numpy(contexts.astype(np.float32))

    def empty(self) -> Tensor:
        """As `CaptionShards.empty`."""
        return empty_context(os.path.dirname(self.path))

    def captions(self, index: int) -> list[str]:
        raise ValueError(f"{self.path} is in U-ViT's layout, which keeps contexts without the text of the captions.")

    def pixels(self, index: int) -> Tensor:
        raise no_pixels(self.path)


def is_moments(value, shape: tuple[int, ...]) -> bool:
    """Whether a value of an object array holds real numbers, of `shape`; () allows any three axes."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 3 and shape in ((), value.shape)


def count_files(path: str) -> int:
    """How many of 0.npy, 1.npy, ... exist, assuming no gaps: about 40 looks, where listing millions takes minutes."""

    def exists(number: int) -> bool:
        return os.path.isfile(os.path.join(path, f"{number}.npy"))

    if not exists(0):
        return 0
    last, missing = 0, 1  # last exists
    while exists(missing):
        last, missing = missing, 2 * missing
    while missing - last > 1:
        middle = (last + missing) // 2
        last, missing = (middle, missing) if exists(middle) else (last, middle)
    return missing


class Npy:
    """This layout for `scripts.extract_features`; methods as `libs.data.features.Sharded`."""

    dtype = "<f4"

    def names(self, number: int, rows: range, flips: bool, captions: Sequence[Sequence[str]] | None) -> list[str]:
        if captions is None:
            first = rows.start * (1 + flips)
            return [f"{first + j}.npy" for j in range(len(rows) * (1 + flips))]
        return [
            name
            for i, texts in zip(rows, captions, strict=True)
            for name in (f"{i}.npy", *(f"{i}_{k}.npy" for k in range(len(texts))))
        ]

    def files(self, moments, labels, captions, contexts) -> Iterator[bytes]:
        if contexts is None:
            for view in range(moments.shape[1]):
                for row, label in zip(moments[:, view], labels, strict=True):
                    yield object_array([row, label])
            return
        rows = iter(contexts)
        for row, texts in zip(moments[:, 0], captions, strict=True):
            yield plain_array(row)
            for _ in texts:
                yield plain_array(next(rows))
