"""Easy and hard images in one data set: scikit-learn's digits and Fashion-MNIST's clothes, 16 x 16."""

import torch
import torch.nn.functional as F

from libs.data.dataset import InMemory
from libs.data.digits import Digits
from libs.data.fashion_mnist import DEFAULT, FashionMNIST


class DigitsAndClothes(InMemory):
    """Twenty classes, the ten digits first: about as many digits, each of them many times, as clothes, in [-1, 1].

    To see whether exits tell images apart that differ in difficulty. A digit's pixel is doubled in height and width, of
    clothes four pixels are one.

    Args:
        path, download: those of `dataset.name=fashion_mnist`.

    Raises:
        ValueError: those files are missing or damaged.
    """

    name, class_names = "digits_and_clothes", (*Digits.class_names, *FashionMNIST.class_names)

    def __init__(self, *, path: str = DEFAULT, download: bool = False):
        digits, clothes = Digits(), FashionMNIST(path=path, download=download)
        few = torch.stack([digits.pixels(i) for i in range(len(digits))])  # (1797, 1, 8, 8), levels 0..255
        few = few.repeat_interleave(2, -1).repeat_interleave(2, -2)
        small = F.avg_pool2d(clothes.levels.float(), 2).round().to(torch.uint8)  # (n, 1, 32, 32) -> (n, 1, 16, 16)
        times = max(1, round(len(small) / len(few)))
        levels = torch.cat((few.repeat(times, 1, 1, 1), small))
        super().__init__(levels, torch.cat((digits.labels.repeat(times), clothes.labels + 10)), n_classes=20)
