"""What a data set is: images by index, as bytes for statistics and in [-1, 1] for training."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


class Dataset(ABC):
    """Images by index. Reading an index twice gives the same image; nothing here draws random numbers.

    Keyword-only constructor arguments of a subclass are its settings (`dataset.<name>.<argument>`).

    shape         (C, H, W)
    n_classes     0 when the images have no labels
    class_names   their names in the order of the labels, None where nobody knows them
    labels        (n,) int64, -1 where there is no label
    draws         whether `gather` also takes a uniform number in [0, 1) per image, for choices such as a caption
    threads       whether `gather` only reads: its workers are then threads, as a batch from another process costs more

    >>> from libs.data import DATASETS
    >>> data = DATASETS["synthetic"](resolution=16, n_classes=3, n_images=6)
    >>> len(data), data.shape, data.labels
    (6, (3, 16, 16), tensor([0, 1, 2, 0, 1, 2]))
    >>> x, labels = data.gather(torch.tensor([0, 5]), flips=torch.tensor([False, True]))
    >>> x.shape, x.dtype, bool((x.abs() <= 1).all()), labels
    (torch.Size([2, 3, 16, 16]), torch.float32, True, tensor([0, 2]))
    >>> data.pixels(5).dtype
    torch.uint8
    """

    name: str
    shape: tuple[int, int, int]
    n_classes: int
    class_names: tuple[str, ...] | None = None
    labels: Tensor
    draws: bool = False
    threads: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """Image `index` as (C, H, W) uint8, never mirrored."""

    def stack(self, rows: Iterable[int]) -> Tensor:
        """The images `rows` as (n, C, H, W) uint8, never mirrored."""
        return torch.stack([self.pixels(i) for i in rows])

    def gather(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Many images at once.

        Args:
            indices: (b,) int64.
            flips: (b,) bool: which of them to mirror left to right.

        Returns:
            (b, C, H, W) float32 in [-1, 1] and (b,) int64 labels, -1 for none.
        """
        return mirrored(in_unit_range(self.stack(indices.tolist())), flips), self.labels[indices]


class InMemory(Dataset):
    """Images held as one array of levels 0..`white`; a batch is one indexing operation.

    Args:
        levels: (n, C, H, W) uint8.
        labels: (n,) int64.
        white: the level that means 1 in [-1, 1].
    """

    def __init__(self, levels: Tensor, labels: Tensor, n_classes: int, white: int = 255):
        self.levels, self.labels, self.n_classes, self.white = levels, labels, n_classes, white
        self.shape = tuple(levels.shape[1:])

    def pixels(self, index: int) -> Tensor:
        return (self.levels[index].double() * (255 / self.white)).round().to(torch.uint8)

    def gather(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        return mirrored(in_unit_range(self.levels[indices], self.white), flips), self.labels[indices]


def in_unit_range(levels: Tensor, white: int = 255) -> Tensor:
    """Levels 0..white -> float32 in [-1, 1]; for bytes this is ToTensor followed by Normalize(0.5, 0.5)."""
    return levels.float().div_(white / 2).sub_(1)


def mirrored(x: Tensor, flips: Tensor) -> Tensor:
    """Mirror, in place, the rows of x (b, C, H, W) whose flag in flips (b,) is set."""
    if flips.any():
        x[flips] = x[flips].flip(-1)
    return x
