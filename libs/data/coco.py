"""MS-COCO with its captions."""

import json
import os

import torch
from PIL import Image
from torch import Tensor

from libs.data.dataset import Dataset
from libs.data.images import read_file, read_image, to_tensor


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
        try:
            with open(captions) as file:
                content = json.load(file)
            names = {image["id"]: image["file_name"] for image in content["images"]}
            texts = {key: [] for key in sorted(names)}
            for annotation in content["annotations"]:
                texts[annotation["image_id"]].append(annotation["caption"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{captions} must be a captions file of COCO, such as captions_train2014.json "
                f"({type(error).__name__}: {error})."
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
