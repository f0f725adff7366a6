"""Any folder or zip file of images, and the reading, cropping and resizing shared by the data sets made of files."""

import json
import os
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from libs.data.dataset import Dataset
from libs.data.storage import Folder, Zip, natural, open_storage
from libs.files import first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# Whatever a file is called, Pillow tries these alone: it would run Ghostscript on PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ORIENTATION = 0x112  # EXIF: 1 is upright
LOOKED_AT = 64  # files whose orientation is looked at when a data set is opened


class ImageFiles(Dataset):
    """Images decoded from files when they are asked for.

    Args:
        files: where they lie, a `Folder` or a `Zip`.
        names: one per image, in the order of the indices.
        classes: the class of each image, as names (labels number them in natural order) or as numbers; or None.
        resolution: `centre_crop` to this size in pixels; 0 keeps the images, which must then all have one size.
        channels: 3 (colour) or 1 (grey).
        orient: turn images as the camera's EXIF data says.
    """

    def __init__(
        self,
        files: Folder | Zip,
        names: Sequence[str],
        classes: Sequence[str] | Sequence[int] | None,
        *,
        resolution: int,
        channels: int = 3,
        orient: bool = False,
    ):
        self.files, self.resolution, self.channels, self.orient = files, resolution, channels, orient
        # One array of bytes: a list of a million strings would be copied into every forked worker that reads it,
        # because each look changes a reference count.
        self.names = np.array([os.fsencode(name) for name in names])
        if classes and isinstance(classes[0], str):
            self.class_names = tuple(sorted(set(classes), key=natural))
            number = {name: label for label, name in enumerate(self.class_names)}
            classes = [number[name] for name in classes]
        self.labels = torch.tensor(classes or [-1] * len(names))
        self.n_classes = 1 + int(self.labels.max())
        width, height = (resolution, resolution) if resolution else self._common_size()
        self.shape = (channels, height, width)

    def pixels(self, index: int) -> Tensor:
        try:
            return to_tensor(self._image(index))
        except ValueError as error:
            path = self.files.path
            raise ValueError(f"{error} `python -m scripts.check_images {path}` lists all such files.") from error

    def _image(self, index: int) -> Image.Image:
        name = os.fsdecode(self.names[index])
        image = read_image(self.files.read(name), self.files.where(name), self.channels, self.orient)
        return centre_crop(image, self.resolution) if self.resolution else image

    def fault(self, index: int) -> str | None:
        """Why image `index` cannot be read, in one line; None if it can."""
        try:
            self._image(index)
        except ValueError as error:
            return str(error)
        return None

    def _common_size(self) -> tuple[int, int]:
        """(width, height) of every image; all files are read, and no pixels decoded."""
        first = common = None
        for name in map(os.fsdecode, self.names):
            where = self.files.where(name)
            size = open_image(self.files.read(name), where, self.orient).size
            if common is None:
                first, common = where, size
            elif size != common:
                raise ValueError(
                    f"With resolution 0 all images must have one size, but {where} is {size[0]} x {size[1]} pixels "
                    f"(width x height) and {first} is {common[0]} x {common[1]}; set a resolution to crop and resize."
                )
        return common


class ImageFolder(ImageFiles):
    """All png, jpg, jpeg, webp, gif (first frame) and bmp files in a folder or a zip file, at any depth.

    Files are ordered by path, numbers by value (img2 before img10), so a folder and a zip of it are the same data set.
    Hidden files and `__MACOSX` are skipped, and so are folders around everything else. Labels are those of a
    `dataset.json` beside the images, as StyleGAN's and EDM2's tools write it; without one, images that lie in folders
    have the outermost folders as classes, in the same order. Transparency is dropped.

    Args:
        path: the folder or zip file.
        resolution: centre crop and resize to this height and width, as for ImageNet; 0 keeps the images as they are.
        channels: 3 (colour) or 1 (grey); images are converted.
        labels: whether the images have classes. False for files that are merely spread over folders.
        orient: turn images as the camera's EXIF data says. Without it they are read as they are stored, with a warning
            where some are not upright.

    Raises:
        ValueError: nothing at `path`, no images in it, some images with a class and some without, or images of
            different sizes with resolution 0.

    >>> from pathlib import Path
    >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
    ...     Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
    ...     Image.new("RGB", (40, 30)).save(Path("photos", name))
    >>> data = ImageFolder(path="photos", resolution=16)
    >>> len(data), data.shape, data.class_names, data.labels
    (3, (3, 16, 16), ('cat', 'dog'), tensor([0, 0, 1]))
    >>> ImageFolder(path="phtos")
    Traceback (most recent call last):
        ...
    ValueError: dataset.path='phtos' must be a folder or zip file of images (...), and it does not exist.
    """

    name = "images"

    def __init__(
        self,
        *,
        path: str = "",
        resolution: int = 0,
        channels: int = 3,
        labels: bool = True,
        orient: bool = False,
    ):
        if channels not in (1, 3):
            raise ValueError(f"dataset.images.channels is {channels}; it must be 3 (colour) or 1 (grey).")
        if resolution < 0:
            raise ValueError(
                f"dataset.images.resolution is {resolution}; it must be a size in pixels, or 0 to keep it."
            )
        wanted = f"a folder or zip file of images ({', '.join(EXTENSIONS)})"
        files = open_storage(path)
        if files is None:
            what = "is a file of another kind" if os.path.exists(path) else "does not exist"
            raise ValueError(f"dataset.path={path!r} must be {wanted}, and it {what}.")
        found = files.names((*EXTENSIONS, ".json"))
        names = [name for name in found if not name.lower().endswith(".json")]
        if not names:
            raise ValueError(f"dataset.path={path!r} must be {wanted}, and there is no image in it.")
        lists = [name for name in found if name.rpartition("/")[2] == "dataset.json"]
        classes = (listed_classes(files, lists, names) or class_folders(names)) if labels else None
        super().__init__(files, names, classes, resolution=resolution, channels=channels, orient=orient)
        if not orient:
            self._say_orientation()

    def _say_orientation(self) -> None:
        """Warn where a sample of the images has some that a viewer would turn."""
        step = max(1, len(self) // LOOKED_AT)
        sample = [os.fsdecode(name) for name in self.names[::step] if name.lower().endswith((b".jpg", b".jpeg"))]
        turned = [name for name in sample if orientation(self.files, name) > 1]
        if turned:
            warnings.warn(
                f"{len(turned)} of {len(sample)} images looked at are stored turned or mirrored and marked so by the "
                f"camera (such as {self.files.where(turned[0])}). They are read as stored; "
                "dataset.images.orient=True turns them upright.",
                stacklevel=3,
            )


def listed_classes(files: Folder | Zip, lists: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The label of each image in the outermost `dataset.json` of `lists`; None without such a file, or labels in it.

    Its form is {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}; names count from its folder.

    Raises:
        ValueError: the file cannot be read, a label is no class number, or an image has none.
    """
    if not lists:
        return None
    file = min(lists, key=lambda name: name.count("/"))
    where, folder = files.where(file), file.removesuffix("dataset.json")
    remedy = "set dataset.images.labels=False to read the images without classes"
    try:
        content = json.loads(files.read(file))
        pairs = content.get("labels") if isinstance(content, dict) else None
        if pairs is None:
            return None
        label = {folder + name: number for name, number in pairs}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where} must hold {{"labels": [[file name, class number], ...]}} ({first_line(error)}); {remedy}.'
        ) from None
    for name in names:
        number = label.get(name)
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(
                f"{where} gives {files.where(name)} "
                + ("no label" if number is None else f"the label {str(number)[:40]}, which is no class number")
                + f"; {remedy}."
            )
    return [label[name] for name in names]


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


def open_image(data: bytes, where: str, orient: bool = False) -> Image.Image:
    """An image whose header is read and whose pixels, unless it has to be turned, are not.

    Args:
        data: content of the file.
        where: what errors call the file.
        orient: turn it upright as its EXIF data says.

    Raises:
        ValueError: the file is damaged, is no image, or has more than 8 bits per channel.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        mode = image.mode
        if orient:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise no_image(where, error) from error
    if mode[0] in "IF":  # 16 or 32 bits: a conversion would clip at 255
        raise ValueError(f"{where} has pixels of kind {mode!r}; only images with 8 bits per channel are read.")
    return image


def read_image(data: bytes, where: str, channels: int = 3, orient: bool = False) -> Image.Image:
    """An image in colour (3 channels) or grey (1). Arguments and errors as for `open_image`."""
    image = open_image(data, where, orient)
    try:
        return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:
        raise no_image(where, error) from error


def no_image(where: str, error: Exception) -> ValueError:
    # Pillow names its own buffer where it does not know the format.
    reason = f"it is no {', '.join(FORMATS)} file" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return ValueError(f"{where} cannot be read as an image: {reason}.")


def orientation(files: Folder | Zip, name: str) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or where the file cannot be read."""
    try:
        return int(open_image(files.read(name), name).getexif().get(ORIENTATION, 1))
    except Exception:  # named when the image is read
        return 1


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
