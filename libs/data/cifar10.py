"""CIFAR-10 from its Python batches, preprocessed as U-ViT's released weights expect."""

import torch

from libs.data.dataset import InMemory


class CIFAR10(InMemory):
    """The 50,000 training images, 32 x 32, ten classes, in [-1, 1].

    Args:
        path: folder that holds (or, with `download`, receives) `cifar-10-batches-py/`.
        download: fetch the archive when it is missing.
    """

    name = "cifar10"

    def __init__(self, *, path: str = "assets/datasets/cifar10", download: bool = False):
        from torchvision import datasets

        try:
            data = datasets.CIFAR10(path, train=True, download=download)
        except RuntimeError as error:  # torchvision: "not found or corrupted" (it compares md5 sums)
            raise ValueError(
                f"dataset.path={path!r} must hold an intact cifar-10-batches-py/ (data_batch_1..5, test_batch, "
                "batches.meta); unpack cifar-10-python.tar.gz there or set dataset.cifar10.download=True."
            ) from error
        levels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (50000, 3, 32, 32)
        super().__init__(levels, torch.tensor(data.targets), n_classes=10)
        self.class_names = tuple(data.classes)
