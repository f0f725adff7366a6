"""CelebA 64 x 64, cropped as the published FID statistics are."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from libs.data.dataset import Dataset
from libs.data.images import read_image, to_tensor
from libs.data.storage import read_file

# left, top, right, bottom: 128 x 128 around the face of an aligned 178 x 218 image (Song et al.; U-ViT)
CROP = (25, 57, 153, 185)


class CelebA(Dataset):
    """The 162,770 training faces, 64 x 64, without labels, in [-1, 1].

    Args:
        path: folder that holds (or, with `download`, receives) `celeba/` with the aligned images and the text files.
        resolution: height and width after the crop, in pixels.
        download: fetch the files when they are missing.
    """

    name = "celeba"
    n_classes = 0

    def __init__(
        self,
        *,
        path: str = "assets/datasets/celeba",
        resolution: int = 64,
        download: bool = False,
    ):
        from torchvision import datasets

        if resolution < 1:
            raise ValueError(f"dataset.celeba.resolution is {resolution}; it must be at least 1.")
        try:
            data = datasets.CelebA(path, split="train", target_type=[], download=download)
        except RuntimeError as error:  # torchvision: "not found or corrupted" (it compares md5 sums of the text files)
            raise ValueError(
                f"dataset.path={path!r} must hold celeba/ with img_align_celeba/ and the intact files "
                "list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, list_landmarks_align_celeba.txt and "
                "list_eval_partition.txt; put them there or set dataset.celeba.download=True."
            ) from error
        self.folder = os.path.join(path, data.base_folder, "img_align_celeba")
        self.names = np.array(data.filename, dtype=np.bytes_)
        self.labels = torch.full((len(self.names),), -1)
        self.shape = (3, resolution, resolution)

    def pixels(self, index: int) -> Tensor:
        path = os.path.join(self.folder, self.names[index].decode())
        face = read_image(read_file(path), path).crop(CROP)
        return to_tensor(face.resize(self.shape[1:], Image.Resampling.BILINEAR))
