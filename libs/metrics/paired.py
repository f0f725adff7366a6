"""Fidelity to the unaccelerated sample of the same id: PSNR and SSIM. Needs no reference data and no weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from libs.run import Run
from libs.sampling.images import Images

MAX_PSNR = 100.0  # dB; what identical images get instead of infinity


def psnr(mse: float) -> float:
    """PSNR in dB from a mean squared error of 8-bit values; at most MAX_PSNR, so it can be averaged and written.

    >>> round(psnr(1.0), 2), psnr(0.0)  # one level of 255 off everywhere; identical
    (48.13, 100.0)
    """
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / mse))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each pair of images: (n, C, H, W) uint8 twice -> (n,) float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def window_size(height: int, width: int) -> int:
    """11 as in the paper, or the largest odd window that fits images smaller than that."""
    fits = min(height, width, 11)
    return fits if fits % 2 else fits - 1


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004).

    Gaussian window of 11 x 11 and standard deviation 1.5, K1 = 0.01, K2 = 0.03, range 255; only positions where the
    window fits inside the image; channels averaged. Images smaller than 11 pixels get `window_size`, with the same
    standard deviation: 7 x 7 for 8 x 8 digits. Such values are not comparable with those of larger images.

    Args:
        a, b: (n, C, H, W) uint8.

    Returns:
        (n,) float64 in [-1, 1].

    >>> a = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    >>> ssim(a, a).item(), round(ssim(a, 255 - a).item(), 2)
    (1.0, -0.94)
    """
    n, c, h, w = a.shape
    size = window_size(h, w)
    x = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    g = torch.exp(-x.square() / (2 * 1.5**2))
    g = g / g.sum()

    def local_mean(z: Tensor) -> Tensor:
        z = F.conv2d(z.reshape(n * c, 1, h, w), g.view(1, 1, -1, 1))  # (n c, 1, h', w)
        return F.conv2d(z, g.view(1, 1, 1, -1))  # (n c, 1, h', w')

    a, b = a.double(), b.double()
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    cov = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return s.reshape(n, -1).mean(1)


class Paired:
    """PSNR and SSIM to baseline images of the same ids. Keys: `psnr` (dB) and `ssim`.

    `psnr` is the PSNR of the *average* mean squared error over images, not the average of PSNRs: that average is
    infinite as soon as one image is untouched, and is dominated by the least changed images. All identical: MAX_PSNR.
    `ssim` is computed per image, then averaged.

    Args:
        baseline: images with the same ids, usually those of full depth.
    """

    def __init__(self, baseline: Images):
        self.pixels = baseline.pixels.cpu()
        self.rows = {int(id): row for row, id in enumerate(baseline.ids)}
        self.sums = torch.zeros(3, dtype=torch.float64)  # images, sum of MSE, sum of SSIM

    def update(self, batch: Images) -> None:
        missing = [int(id) for id in batch.ids if int(id) not in self.rows]
        if missing:
            raise ValueError(f"The baseline has no image with the ids {missing[:5]}: PSNR and SSIM compare equal ids.")
        other = self.pixels[[self.rows[int(id)] for id in batch.ids]]  # (n, C, H, W)
        if batch.pixels.shape != other.shape or batch.pixels.dtype != torch.uint8 or other.dtype != torch.uint8:
            raise ValueError(
                f"PSNR and SSIM compare uint8 images of one shape; given {batch.pixels.dtype} "
                f"{tuple(batch.pixels.shape[1:])} and baseline {other.dtype} {tuple(other.shape[1:])}."
            )
        pixels = batch.pixels.cpu()
        self.sums += torch.stack(
            [torch.tensor(float(len(pixels))).double(), mse(pixels, other).sum(), ssim(pixels, other).sum()]
        )

    def compute(self, run: Run) -> dict[str, float]:
        n, squares, similarity = run.all_sum(self.sums.clone()).tolist()
        if n == 0:
            raise ValueError("PSNR and SSIM need at least one image; there are none.")
        return {"psnr": psnr(squares / n), "ssim": similarity / n}
