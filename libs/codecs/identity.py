"""Pixels as they are: the network denoises images themselves."""

import torch
from torch import Tensor


class Identity:
    """The codec of pixel models. `sample` takes noise only because latent codecs need it."""

    draws = False  # `sample` needs no noise

    def sample(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """What a data set yields -> x0; both are the image (B, C, H, W) in [-1, 1]."""
        return stored

    def decode(self, x0: Tensor) -> Tensor:
        """(B, C, H, W), about [-1, 1] -> (B, C, H, W) uint8 on the same device."""
        return to_uint8(x0)

    def to(self, device: torch.device | str) -> "Identity":
        return self


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to nearest; values outside are clamped.

    Raises:
        ValueError: x has a value that is not finite, which a byte would hide as black or white.
    """
    x = x.float()
    broken = ~x.flatten(1).isfinite().all(1)  # (B,)
    if broken.any():
        raise ValueError(
            f"{int(broken.sum())} of {len(x)} images have values that are not finite (the first is row "
            f"{int(broken.nonzero()[0])}); with fp16 try bf16 or fp32."
        )
    return ((x + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)
