"""ImageNet, preprocessed as the guided-diffusion FID statistics are."""

import os

from libs.data.images import ImageFiles
from libs.data.storage import Folder


class ImageNet(ImageFiles):
    """Training images of ImageNet at a given size; the class is the file name before its first "_" (n01440764).

    Args:
        path: folder with `train/`; images are found at any depth below it.
        resolution: height and width after `centre_crop`, in pixels.
        expected: number of images that must be found (1,281,167 in the full set); 0 accepts any number.
    """

    name = "imagenet"

    def __init__(
        self,
        *,
        path: str = "assets/datasets/ImageNet",
        resolution: int = 64,
        expected: int = 0,
    ):
        train = os.path.join(path, "train")
        if not os.path.isdir(train):
            raise ValueError(f"dataset.path={path!r} must be a folder with train/ in it, and it is not.")
        if resolution < 1:
            raise ValueError(f"dataset.imagenet.resolution is {resolution}; it must be at least 1.")
        files = Folder(train)
        names = files.names((".jpg", ".jpeg", ".png", ".gif"))
        if not names or expected not in (0, len(names)):
            raise ValueError(
                f"dataset.path={path!r} has {len(names)} jpg, jpeg, png or gif images below train/; expected "
                f"{expected or 'at least one'} (dataset.imagenet.expected={expected}, 0 for any number)."
            )
        classes = [os.path.basename(name).partition("_")[0] for name in names]
        super().__init__(files, names, classes, resolution=resolution)
