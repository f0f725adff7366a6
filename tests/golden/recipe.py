"""What the recorded numbers of this folder were fed: weights, inputs and an exact noise prediction.

Everything is drawn in float32 on the CPU, one generator per name, and cast afterwards; see README.md.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def golden_input(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Standard normal numbers times `scale`, float32, of `shape`; they depend on `name` and `shape` only."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32) * scale


def golden_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict (float32) from its keys and shapes.

    One-dimensional `*.weight` (norms): 1 + 0.1 z. Other `*.weight`, embeddings apart: z / sqrt(fan_in), fan_in the
    product of all dimensions but the first. The rest (biases, `pos_embed`, `*_emb.weight`, queries): 0.02 z.
    """
    state = {}
    for key, shape in shapes.items():
        z = golden_input(key, shape)
        if not key.endswith(".weight") or key.endswith("_emb.weight"):
            state[key] = 0.02 * z
        elif len(shape) == 1:
            state[key] = 1 + 0.1 * z
        else:
            state[key] = z / math.sqrt(math.prod(shape[1:]))
    return state


def toy_eps(x: Tensor, t: Tensor, process: str, y: Tensor | None = None) -> Tensor:
    """Exact noise prediction for data made of Gaussians of standard deviation 0.5, per element.

    x (B, C, H, W), t (B,) in [0, 1], process "vp_linear" or "sd" -> (B, C, H, W). Without labels the data are an even
    mixture around +1 and -1; label y (B,) of 0..3 puts them around 0.5 (y - 1.5). "sd" takes the integral of the square
    of a linear function for the sum over the 1000 betas, so it is a function of t alone and needs no table.
    """
    if process == "vp_linear":  # integral of 0.1 + 19.9 t
        b = 0.1 * t + 9.95 * t**2
    else:  # 1000 times the integral of (lo + (hi - lo) t)^2
        lo, hi = math.sqrt(0.00085), math.sqrt(0.012)
        b = 1000 * (lo**2 * t + lo * (hi - lo) * t**2 + (hi - lo) ** 2 * t**3 / 3)
    alpha, sigma = (c.to(x.dtype).view(-1, 1, 1, 1) for c in (torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))))
    v = 0.25 * alpha**2 + sigma**2  # variance of one mode of x_t
    mean = torch.tanh(alpha * x / v) if y is None else 0.5 * (y.to(x.dtype).view(-1, 1, 1, 1) - 1.5)
    return sigma * (x - alpha * mean) / v
