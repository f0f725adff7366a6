"""MS-COCO with its captions."""

import os
from pathlib import PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from libs.data.dataset import Dataset
from libs.data.images import read_image, to_tensor
from libs.data.storage import read_file
from libs.files import read_json


class CocoImages(Dataset):
    """The images of a captions file in the order of their ids, centre crops, with captions in the order of the file.

    Args:
        path: folder of the images (train2014).
        captions: captions_train2014.json or captions_val2014.json.
        resolution: height and width after the crop, in pixels.

    Raises:
        ValueError: no captions file of COCO, an image without captions, or one that is not in the folder.
    """

    name, n_classes = "coco", 0

    def __init__(self, *, path: str, captions: str, resolution: int = 256):
        content = read_json(captions, "the captions file")
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            texts = {key: [] for key in sorted(names)}
            for annotation in content["annotations"]:
                texts[annotation["image_id"]].append(annotation["caption"])
            if len(names) < len(content["images"]):
                raise ValueError("two images have one id")
            for text in (text for of_image in texts.values() for text in of_image):
                text.encode()  # an AttributeError, or a UnicodeEncodeError of half a character
            for name in names.values():
                check_inside(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{captions} must be a captions file of COCO, such as captions_train2014.json "
                f"({type(error).__name__}: {str(error)[:200]})."
            ) from error
        self.path, self.shape = path, (3, resolution, resolution)
        self.names = [names[key] for key in texts]
        self.captions = list(texts.values())
        self.labels = torch.full((len(self.names),), -1)
        silent = [name for name, of_image in zip(self.names, self.captions, strict=True) if not of_image]
        absent = [name for name in self.names if not os.path.isfile(os.path.join(path, name))]
        if not self.names or silent or absent:
            first = (silent + absent + ["none at all"])[0]
            raise ValueError(
                f"{captions} has {len(self.names)} images, of which {len(silent)} have no caption and {len(absent)} "
                f"are not in {path} (first: {first}); every image needs both."
            )

    def pixels(self, index: int) -> Tensor:
        path = os.path.join(self.path, self.names[index])
        return to_tensor(square(read_image(read_file(path), path, 3), self.shape[-1]))


def square(image: Image.Image, size: int) -> Image.Image:
    """The centre square resized (Lanczos), as U-ViT prepares COCO."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def check_inside(name: str) -> None:
    """Raise ValueError for a file name that would lead out of the folder of the images."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"the file name {name[:80]!r} leads out of the folder of the images")
