"""Made-up images of any shape and number of classes, and their latents and captions, for quick runs without data."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from libs import rng
from libs.build import check_at_least
from libs.data.dataset import Dataset, InMemory, in_unit_range, mirrored
from libs.data.features import picked


class Synthetic(InMemory):
    """Coloured gratings: the class sets direction and hue, the index sets phase and frequency. Deterministic.

    Args:
        resolution: height and width in pixels.
        channels: 3 (colour) or 1 (grey).
        n_classes: label of image i is i mod n_classes; 0 for no labels.
        n_images: size of the data set.

    >>> Synthetic(resolution=8, n_classes=4, n_images=6).labels
    tensor([0, 1, 2, 3, 0, 1])
    >>> Synthetic(channels=2)
    Traceback (most recent call last):
        ...
    ValueError: dataset.synthetic.channels is 2; it must be 1 or 3.
    """

    name = "synthetic"

    def __init__(self, *, resolution: int = 32, channels: int = 3, n_classes: int = 10, n_images: int = 256):
        if channels not in (1, 3):
            raise ValueError(f"dataset.synthetic.channels is {channels}; it must be 1 or 3.")
        check_at_least("dataset.synthetic.", resolution=resolution, n_images=n_images)
        check_at_least("dataset.synthetic.", 0, n_classes=n_classes)
        index = torch.arange(n_images)
        kind = index % max(n_classes, 1)
        turn = kind / max(n_classes, 1)  # (n,) in [0, 1): half turns of the grating, full turns of the hue
        phase = index * 0.6180339887 % 1  # golden ratio: phases of neighbours are far apart
        cycles = 1 + index * 0.4142135624 % 1 * 2  # 1 to 3 across the image
        ramp = (torch.arange(resolution) + 0.5) / resolution - 0.5
        angle = (math.pi * turn)[:, None, None]
        along = ramp[None, None, :] * angle.cos() + ramp[None, :, None] * angle.sin()  # (n, H, W)
        wave = (2 * math.pi * (cycles[:, None, None] * along + phase[:, None, None])).cos()
        hue = torch.arange(channels) / 3  # thirds of a turn between red, green and blue
        colour = 0.6 + 0.4 * (2 * math.pi * (turn[:, None] + hue)).cos()  # (n, C), 0.2 to 1
        levels = (127.5 * (1 + colour[:, :, None, None] * wave[:, None])).round().to(torch.uint8)  # (n, C, H, W)
        labels = kind if n_classes else torch.full_like(kind, -1)
        super().__init__(levels, labels, n_classes)


class SyntheticLatents(Dataset):
    """Moments (8, size, size) of gratings: mean colours and brightness of patches, with a small variance.

    Args:
        size: height and width of the latents.
        factor: of the images above the latents.
        n_classes, n_images: as for `Synthetic`.
    """

    name = "synthetic_latents"

    def __init__(self, *, size: int = 4, factor: int = 2, n_classes: int = 10, n_images: int = 64):
        self.images = Synthetic(resolution=size * factor, n_classes=n_classes, n_images=n_images)
        self.labels, self.n_classes, self.shape = self.images.labels, n_classes, (8, size, size)
        colours = F.avg_pool2d(in_unit_range(self.images.levels), factor)  # (n, 3, size, size)
        mean = torch.cat([colours, colours.mean(1, keepdim=True)], 1)  # (n, 4, size, size)
        self.moments = torch.cat([4 * mean, torch.full_like(mean, -4.0)], 1)  # (n, 8, size, size)

    def pixels(self, index: int) -> Tensor:
        return self.images.pixels(index)

    def gather(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (b, 8, size, size) and labels (b,)."""
        return mirrored(self.moments[indices], flips), self.labels[indices]


class SyntheticCaptions(SyntheticLatents):
    """The same with two captions per image, whose contexts are noise: the class sets it.

    Args:
        size, factor, n_images: as for `SyntheticLatents`.
        tokens, width: of the contexts.
        split: "train" or "val", which are the same here.
    """

    name, draws = "synthetic_captions", True

    def __init__(
        self,
        *,
        size: int = 4,
        factor: int = 2,
        tokens: int = 4,
        width: int = 8,
        n_images: int = 64,
        split: str = "train",
    ):
        super().__init__(size=size, factor=factor, n_classes=5, n_images=n_images)
        self.context_shape = tokens, width
        self.contexts = rng.draw_rows(rng.numbered_streams("contexts", ids=range(10)), self.context_shape)
        self.kinds, self.labels, self.n_classes = self.labels, torch.full((n_images,), -1), 0

    def gather(self, indices: Tensor, flips: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (b, 8, size, size) and contexts (b, tokens, width); as `CaptionShards.gather`."""
        chosen = torch.tensor([picked(draw, 2) for draw in draws.tolist()])
        return mirrored(self.moments[indices], flips), self.contexts[2 * self.kinds[indices] + chosen]

    def captions(self, index: int) -> list[str]:
        return [f"grating {self.kinds[index]}", f"a grating of kind {self.kinds[index]}"]

    def empty(self) -> Tensor:
        return torch.zeros(self.context_shape)
