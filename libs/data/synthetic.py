"""Made-up images of any shape and number of classes, for quick runs without data."""

import math

import torch

from libs.data.dataset import InMemory


class Synthetic(InMemory):
    """Coloured gratings: the class sets direction and hue, the index sets phase and frequency. Deterministic.

    Args:
        resolution: height and width in pixels.
        channels: 3 (colour) or 1 (grey).
        n_classes: label of image i is i mod n_classes; 0 for no labels.
        n_images: size of the data set.
    """

    name = "synthetic"

    def __init__(self, *, resolution: int = 32, channels: int = 3, n_classes: int = 10, n_images: int = 256):
        if channels not in (1, 3):
            raise ValueError(f"dataset.synthetic.channels is {channels}; it must be 1 or 3.")
        for key, value, least in (
            ("resolution", resolution, 1),
            ("n_classes", n_classes, 0),
            ("n_images", n_images, 1),
        ):
            if value < least:
                raise ValueError(f"dataset.synthetic.{key} is {value}; it must be at least {least}.")
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
