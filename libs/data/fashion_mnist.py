"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), from its idx files, padded to 32 x 32."""

import gzip
import math
import os
import zlib
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F

from libs.data.dataset import InMemory
from libs.data.storage import LARGEST, read_file
from libs.files import first_line

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEFAULT = "assets/datasets/fashion_mnist"
DEBIAN = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts the files
BY_HAND = (
    "put the files there, or install Debian's package dataset-fashion-mnist, whose files in "
    f"{DEBIAN} are found where no path is set."
)
SPLITS = {"train": "train", "test": "t10k"}
PAD = 2  # pixels of background on each side: 28 is no multiple of 8


class FashionMNIST(InMemory):
    """60,000 training or 10,000 test pictures of clothes, 32 x 32 grey, ten classes, in [-1, 1]; shoes point left.

    Args:
        path: folder with the idx files (`train-images-idx3-ubyte` and so on, packed as .gz or not), or the folder that
            torchvision makes, with them in `FashionMNIST/raw/`.
        split: "train" or "test".
        download: fetch the files through torchvision when they are missing.

    Raises:
        ValueError: an unknown split, or files that are missing or damaged.
    """

    name, class_names = "fashion_mnist", CLASS_NAMES

    def __init__(self, *, path: str = DEFAULT, split: str = "train", download: bool = False):
        if split not in SPLITS:
            raise ValueError(f"dataset.fashion_mnist.split is {split!r}; it must be train or test.")
        names = [f"{SPLITS[split]}-images-idx3-ubyte", f"{SPLITS[split]}-labels-idx1-ubyte"]
        files = find(path, names)
        if download and not files:
            from torchvision import datasets

            try:
                datasets.FashionMNIST(path, download=True)
            except RuntimeError as error:  # torchvision's for no network
                raise ValueError(f"nothing was downloaded to {path}: {first_line(error)}; {BY_HAND}") from error
            files = find(path, names)
        if not files:
            raise ValueError(
                f"dataset.path={path!r} must hold {names[0]} and {names[1]} (or the same as .gz): set "
                f"download=True beside it, {BY_HAND}"
            )
        levels, labels = (read_idx(file, axes) for file, axes in zip(files, (3, 1), strict=True))
        if levels.shape[1:] != (28, 28) or len(labels) != len(levels) or not len(labels) or labels.max() > 9:
            raise ValueError(
                f"{files[0]} and {files[1]} must hold pictures of 28 x 28 and as many labels from 0 to 9; they have "
                f"the shapes {levels.shape} and {labels.shape}."
            )
        levels = F.pad(torch.from_numpy(levels)[:, None], (PAD,) * 4)  # (n, 1, 32, 32), 0 is black
        super().__init__(levels, torch.from_numpy(labels).long(), n_classes=10)


def find(path: str, names: list[str]) -> list[str]:
    """The files of these names, or name.gz, in the first folder that has all of them; [] where there is none."""
    for folder in (path, os.path.join(path, "FashionMNIST", "raw"), *([DEBIAN] if path == DEFAULT else [])):
        found = [
            next(filter(os.path.isfile, (os.path.join(folder, file) for file in (name, f"{name}.gz"))), None)
            for name in names
        ]
        if all(found):
            return found
    return []


def read_idx(path: str, axes: int) -> np.ndarray:
    """The bytes of an idx file (LeCun's format: two zeros, type, axes, big-endian sizes, values), packed or not.

    Raises:
        ValueError: the file cannot be read, or is no idx file of bytes with so many axes; the message names it.
    """
    data = read_file(path)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=BytesIO(data)).read(LARGEST)  # bounded: a small file may unpack to anything
        sizes = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
        if data[:4] != bytes([0, 0, 8, axes]) or len(data) != 4 + 4 * axes + math.prod(sizes):
            raise ValueError(f"it is no idx file of bytes with {axes} axes, or it was cut")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}.") from error
    return np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * axes).reshape(sizes)
