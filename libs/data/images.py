"""Any folder or zip file of images, and the reading, cropping and resizing shared by the data sets made of files."""

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from libs.data.dataset import Dataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# What Pillow raises on damaged files.
DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageFiles(Dataset):
    """Images decoded from files when they are asked for.

    Args:
        files: where they lie, a `Folder` or a `Zip`.
        names: one per image, in the order of the indices.
        classes: the class name of each image, or None; labels number the sorted class names.
        resolution: `centre_crop` to this size in pixels; 0 keeps the images, which must then all have one size.
        channels: 3 (colour) or 1 (grey).
    """

    def __init__(
        self,
        files: "Folder | Zip",
        names: Sequence[str],
        classes: Sequence[str] | None,
        *,
        resolution: int,
        channels: int = 3,
    ):
        self.files, self.resolution, self.channels = files, resolution, channels
        # One array of bytes: a list of a million strings would be copied into every forked worker that reads it,
        # because each look changes a reference count.
        self.names = np.array([os.fsencode(name) for name in names])
        self.class_names = sorted(set(classes), key=natural) if classes else []
        self.n_classes = len(self.class_names)
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([number[name] for name in classes] if classes else [-1] * len(names))
        width, height = (resolution, resolution) if resolution else self._common_size()
        self.shape = (channels, height, width)

    def pixels(self, index: int) -> Tensor:
        name = os.fsdecode(self.names[index])
        image = read_image(self.files.read(name), self.files.where(name), self.channels)
        return to_tensor(centre_crop(image, self.resolution) if self.resolution else image)

    def _common_size(self) -> tuple[int, int]:
        """(width, height) of every image, from the headers alone."""
        first = common = None
        for name in map(os.fsdecode, self.names):
            where = self.files.where(name)
            size = open_image(self.files.read(name), where).size
            if common is None:
                first, common = where, size
            elif size != common:
                raise ValueError(
                    f"With resolution 0 all images must have one size, but {where} is {size[0]} x {size[1]} pixels "
                    f"(width x height) and {first} is {common[0]} x {common[1]}; set a resolution to crop and resize."
                )
        return common


class Images(ImageFiles):
    """All png, jpg, jpeg, webp, gif (first frame) and bmp files in a folder or a zip file, at any depth.

    Files are ordered by path, numbers by value (img2 before img10), so a folder and a zip of it are the same data set.
    Hidden files and `__MACOSX` are skipped, and so are folders around everything else. If the images then lie in
    folders, the outermost ones are the classes, in the same order. Transparency is dropped, and the orientation that
    cameras store beside the picture is not applied.

    Args:
        path: the folder or zip file.
        resolution: centre crop and resize to this height and width, as for ImageNet; 0 keeps the images as they are.
        channels: 3 (colour) or 1 (grey); images are converted.
        labels: whether folders are classes. False for files that are merely spread over folders.

    Raises:
        ValueError: nothing at `path`, no images in it, some images in class folders and some not, or images of
            different sizes with resolution 0.
    """

    name = "images"

    def __init__(
        self,
        *,
        path: str = "",
        resolution: int = 0,
        channels: int = 3,
        labels: bool = True,
    ):
        if channels not in (1, 3):
            raise ValueError(f"dataset.images.channels is {channels}; it must be 3 (colour) or 1 (grey).")
        if resolution < 0:
            raise ValueError(
                f"dataset.images.resolution is {resolution}; it must be a size in pixels, or 0 to keep it."
            )
        wanted = f"a folder or zip file of images ({', '.join(EXTENSIONS)})"
        if os.path.isdir(path):
            files = Folder(path)
        elif zipfile.is_zipfile(path):
            files = Zip(path)
        else:
            found = "is a file of another kind" if os.path.isfile(path) else "does not exist"
            raise ValueError(f"dataset.path={path!r} must be {wanted}, and it {found}.")
        names = files.names(EXTENSIONS)
        if not names:
            raise ValueError(f"dataset.path={path!r} must be {wanted}, and there is no image in it.")
        classes = class_folders(names) if labels else None
        super().__init__(files, names, classes, resolution=resolution, channels=channels)


def class_folders(names: Sequence[str]) -> list[str] | None:
    """The class of each path: its first folder below the folders that all paths share; None when no path has one."""
    parts = [name.split("/") for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))
    classes = [p[shared] if len(p) > shared + 1 else "" for p in parts]
    if not any(classes):
        return None
    if not all(classes):
        outside, inside = names[classes.index("")], next(n for n, c in zip(names, classes, strict=True) if c)
        raise ValueError(
            f"Folders are classes, but {outside} lies in none and {inside} does; move the images into class folders or "
            "set dataset.images.labels=False."
        )
    return classes


class Folder:
    """Files below a folder. Links to folders are followed."""

    def __init__(self, path: str):
        self.path = path

    def names(self, extensions: tuple[str, ...]) -> list[str]:
        """Visible files with these extensions, as paths with "/" from the folder, in natural order."""
        names = []
        for folder, inner, files in os.walk(self.path, onerror=refuse, followlinks=True):
            inner[:] = [name for name in inner if visible(name)]
            below = os.path.relpath(folder, self.path).replace(os.sep, "/")
            names += [file if below == "." else f"{below}/{file}" for file in files]
        return chosen(names, extensions)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return os.path.join(self.path, name)

    def read(self, name: str) -> bytes:
        return read_file(self.where(name))


class Zip:
    """Files in a zip archive, read without unpacking it, from any number of processes."""

    def __init__(self, path: str):
        self.path = path
        self._open = None  # (process id, archive)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_open": None}

    def _archive(self) -> zipfile.ZipFile:
        # A forked worker inherits the file descriptor *and its position*, which parent and siblings move: each process
        # opens the archive for itself.
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path} cannot be read as a zip file: {error}.") from error
        return self._open[1]

    def names(self, extensions: tuple[str, ...]) -> list[str]:
        """Visible files with these extensions, in natural order."""
        return chosen(self._archive().namelist(), extensions)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}:{name}"

    def read(self, name: str) -> bytes:
        try:
            return self._archive().read(name)
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
            raise ValueError(f"{self.where(name)} cannot be read: {error}.") from error


def refuse(error: OSError) -> None:
    """Without this, os.walk leaves out what it may not list."""
    raise ValueError(f"{error.filename} cannot be listed: {error}.") from error


def read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def chosen(names: Sequence[str], extensions: tuple[str, ...]) -> list[str]:
    """Names that end in one of the extensions (in any case) with no hidden part, in natural order, each once."""
    names = [name for name in names if name.lower().endswith(extensions) and all(map(visible, name.split("/")))]
    return sorted(set(names), key=natural)


def visible(part: str) -> bool:
    return not part.startswith(".") and part != "__MACOSX"


def natural(name: str) -> tuple[str, str]:
    """Sort key of a path: folder by folder, numbers by value; the name itself settles 1 against 01."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name).replace("/", "\0"), name


def open_image(data: bytes, where: str) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Raises:
        ValueError: the file (called `where`) is damaged, is no image, or has more than 8 bits per channel.
    """
    try:
        image = Image.open(BytesIO(data))
    except DAMAGED as error:
        raise ValueError(f"{where} cannot be read as an image: {error}.") from error
    if image.mode[0] in "IF":  # 16 or 32 bits: a conversion would clip at 255
        raise ValueError(f"{where} has pixels of kind {image.mode!r}; only images with 8 bits per channel are read.")
    return image


def read_image(data: bytes, where: str, channels: int = 3) -> Image.Image:
    """An image in colour (3 channels) or grey (1). Raises ValueError as `open_image` does."""
    image = open_image(data, where)
    try:
        return image.convert("RGB" if channels == 3 else "L")
    except DAMAGED as error:
        raise ValueError(f"{where} cannot be read as an image: {error}.") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square, `size` x `size` pixels (guided-diffusion, ADM).

    Halving with a box filter before the bicubic resize keeps large images free of aliasing.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """A colour or grey image as (C, H, W) uint8."""
    array = np.array(image)  # (H, W, 3) or (H, W)
    return torch.from_numpy(array.reshape(image.height, image.width, -1)).permute(2, 0, 1)
