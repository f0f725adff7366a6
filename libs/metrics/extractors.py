"""Feature extractors: what a distance between sets of images is measured in.

A distance means nothing without the features it was measured in, so every extractor has an exact name and every metric
puts that name in its key (`fd_digits_cnn`). Only the released FID Inception network may say `fid`.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from libs.codecs.clip_text import load_clip
from libs.files import sha256
from libs.metrics.classifier import SHIPPED
from libs.metrics.networks import ASSETS_FOLDER, TIMM_NAMES, is_timm, load_inception, load_timm
from libs.run import Run
from libs.sampling.images import Images

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # as in torch.hub, the name ends in the start of its sha256


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Networks compute in float32, and the same every time, whatever autocast or TF32 settings are active."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), convolutions:
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)


class Extractor:
    """Features of images of one shape. Subclasses define `n_features`, `preprocessing` and `features`.

    Args:
        shape: (C, H, W) of the images; others are refused.
        device: where the network runs and where the features stay.
    """

    name: str
    n_features: int
    preprocessing: str  # what happens to the pixels, and with which weights: part of a reference's identity
    resizing = "not resized"  # what the network does to an image's size, for people

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        self.shape, self.device = tuple(shape), torch.device(device)
        self._last: tuple[Tensor, int, Tensor] | None = None

    @property
    def resolution(self) -> str:
        """The shape as written in reference files, for example "3x32x32"."""
        return "x".join(map(str, self.shape))

    def features(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) uint8 on `device` -> (n, n_features)."""
        raise NotImplementedError

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of images.

        Args:
            pixels: (n, C, H, W) uint8.

        Returns:
            (n, n_features) float32 on `device`, computed in float32 whatever autocast or TF32 settings are active.

        Raises:
            ValueError: not 8-bit images of the shape that the extractor was built for.
        """
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(
                f"The extractor {self.name!r} was built for uint8 images of shape {self.shape} and was given "
                f"{pixels.dtype} of shape {tuple(pixels.shape)}."
            )
        # Several metrics look at the same batch one after the other: the network runs once.
        version = 0 if pixels.is_inference() else pixels._version  # inference tensors do not count their changes
        if self._last is not None and self._last[0] is pixels and self._last[1] == version:
            return self._last[2]
        with exact(self.device):
            out = self.features(pixels.to(self.device)).float()  # (n, F)
        self._last = (pixels, version, out)
        return out


class Pixels(Extractor):
    """Flattened pixels in [0, 1]: no network, no weights."""

    name = "pixels"
    preprocessing = "uint8 / 255, flattened"

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        self.n_features = math.prod(self.shape)

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) / 255.0  # (n, C H W)


class SmallCNN(Extractor):
    """A classifier made by `scripts/classifier.py`, shipped with the code: needs no download."""

    n_features = 64

    def __init__(self, name: str, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        self.name, shipped = name, SHIPPED[name]
        if self.shape != (1, shipped.size, shipped.size):
            raise ValueError(
                f"The extractor {name!r} knows {shipped.what} only: images must have the shape "
                f"{(1, shipped.size, shipped.size)}, not {self.shape}; choose another one of {', '.join(EXTRACTORS)}."
            )
        self.preprocessing = f"uint8 / 255, weights {sha256(shipped.file)[:8]}"
        self.net = shipped.network().requires_grad_(False).eval()
        self.net.load_state_dict(load_file(shipped.file))
        self.net.to(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        return self.net.penultimate(pixels / 255.0)  # (n, 64)


class Inception(Extractor):
    """The Inception network of FID (Heusel et al. 2017) as ported by pytorch-fid: 2048 pooled features.

    Never downloads. A weights file that is not the released one still loads, but its features are then called
    `inception_<start of its sha256>`: what is measured in them is not FID and cannot be mistaken for it.

    Raises:
        FileNotFoundError: the weights are in none of the expected places; says how to get them.
        ImportError: pytorch-fid is not installed.
    """

    n_features = 2048
    preprocessing = "pytorch-fid Inception: uint8 / 255, bilinear to 299x299, scaled to [-1, 1]; grey repeated to RGB"
    resizing = "resized to 299x299 by the network"

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        if self.shape[0] not in (1, 3):
            raise ValueError(f"The extractor 'inception' takes images of 1 or 3 channels, not {self.shape[0]}.")
        path = inception_path()
        digest = sha256(path)[:8]
        self.name = "inception" if INCEPTION_FILE.endswith(f"-{digest}.pth") else f"inception_{digest}"
        self.net = load_inception(path).to(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        return self.net((pixels / 255.0).expand(-1, 3, -1, -1))[0].flatten(1)  # (n, 2048)


class Timm(Extractor):
    """Pooled features of a network of timm (`libs.metrics.networks.load_timm` says which, and where its weights lie).

    Raises:
        FileNotFoundError: the weights are missing; says how to get them.
        ValueError: a file of other weights, or images without 1 or 3 channels.
    """

    CHUNK = 64  # images per pass

    def __init__(self, name: str, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        if self.shape[0] not in (1, 3):
            raise ValueError(f"The extractor {name!r} takes images of 1 or 3 channels, not {self.shape[0]}.")
        self.net, config = load_timm(name)
        digest = state_hash(self.net)[:8]
        self.net.to(self.device, memory_format=torch.channels_last)  # EfficientNet on a CPU: 1.7 times as fast
        name, _, given = name.partition(":")
        self.name = name.replace(".", "_") + (f"_{digest}" if given else "")
        self.mode = config["interpolation"] if config["interpolation"] == "bilinear" else "bicubic"
        self.size, self.mean, self.std = config["input_size"][-1], config["mean"], config["std"]
        self.resizing = f"resized to {self.size}x{self.size} for the network"
        self.preprocessing = (
            f"timm {name}, weights {digest}: uint8 / 255, {self.mode} with antialiasing to {self.size}x{self.size}, "
            f"mean {self.mean}, deviation {self.std}; grey repeated to RGB"
        )
        self.n_features = self(torch.zeros(1, *self.shape, dtype=torch.uint8)).shape[1]

    def features(self, pixels: Tensor) -> Tensor:
        return torch.cat([self._pass(part) for part in pixels.split(self.CHUNK)])

    def _pass(self, pixels: Tensor) -> Tensor:
        x = resized(pixels, self.size, self.mode, self.mean, self.std)  # (n, 3, size, size)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)  # (n, F)


class ClipVision(Extractor):
    """Image embeddings of CLIP ViT-L/14 at 336 pixels: what CMMD (Jayasumana et al. 2024) compares.

    Never downloads. Another CLIP model at `CLIP_336` still loads, under a name that tells its weights.

    Raises:
        FileNotFoundError: the model is not there; says how to get it.
        ImportError: transformers is not installed.
    """

    preprocessing = "uint8 / 255, bicubic (a = -0.5) to the network's size, CLIP's mean and deviation; grey to RGB"

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        self.net = load_clip("CLIPModel", CLIP_336, "clip_336").to(self.device)
        vision = self.net.config.vision_config
        self.n_features, self.size = self.net.config.projection_dim, vision.image_size
        self.resizing = f"resized to {self.size}x{self.size} for the network"
        released = (vision.hidden_size, vision.patch_size, vision.image_size) == (1024, 14, 336)
        self.name = "clip_vit_l14_336" if released else f"clip_{state_hash(self.net)[:8]}"

    def features(self, pixels: Tensor) -> Tensor:
        no_text = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # the one way in that all versions have
        return self.net(input_ids=no_text, pixel_values=clip_input(pixels, self.size)).image_embeds  # (n, F), length 1


CLIP_336 = "openai/clip-vit-large-patch14-336"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_input(pixels: Tensor, size: int) -> Tensor:
    """(n, 1 or 3, H, W) uint8 -> (n, 3, size, size), as CLIP's image networks read them."""
    return resized(pixels, size, "bicubic", CLIP_MEAN, CLIP_STD)


def resized(pixels: Tensor, size: int, mode: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, 1 or 3, H, W) uint8 -> (n, 3, size, size): grey repeated, resized in [0, 1], less mean, divided by std.

    Antialiasing also chooses the bicubic kernel, a = -0.5, that Pillow, CMMD and CLIP's own preprocessing use.
    """
    x = (pixels / 255.0).expand(-1, 3, -1, -1)  # (n, 3, H, W)
    x = F.interpolate(x, (size, size), mode=mode, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x - mean) / std


def state_hash(net: nn.Module) -> str:
    """Hexadecimal sha256 of a network's weights."""
    digest = hashlib.sha256()
    for _, value in sorted(net.state_dict().items()):
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def inception_path() -> Path:
    """The weights file: in `assets/inception/`, `assets/`, or torch's own cache (`$TORCH_HOME/hub/checkpoints/`)."""
    folders = ASSETS_FOLDER / "inception", ASSETS_FOLDER, Path(torch.hub.get_dir()) / "checkpoints"
    paths = [folder / INCEPTION_FILE for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"The weights of the extractor 'inception' are missing; they are expected at {paths[0]} (or {paths[1]}, or "
        f"{paths[2]}). Get them with: python -m scripts.download inception"
    )


EXTRACTORS = {name: partial(SmallCNN, name) for name in SHIPPED} | {
    "pixels": Pixels,
    "inception": Inception,
    "clip_vit_l14_336": ClipVision,
}


def build_extractor(name: str, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> Extractor:
    """An extractor by name for images of shape (C, H, W).

    Raises:
        ValueError: unknown name, or a shape that the extractor cannot take.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](shape, device)
    if is_timm(name):
        return Timm(name, shape, device)
    raise ValueError(
        f"The feature extractor is {name!r}; it must be one of {', '.join(EXTRACTORS)}, {', '.join(TIMM_NAMES)}, or "
        "the name of a network of timm."
    )


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> np.ndarray:
    """Features (total, n_features) float32 of all images of some (n, C, H, W) uint8 batches."""
    empty = np.zeros((0, extractor.n_features), np.float32)
    return np.concatenate([empty, *(extractor(pixels).cpu().numpy() for pixels in batches)])


class FeatureBank:
    """Features of this process's images, for metrics that compare images one by one (kernels, neighbours).

    Args:
        extractor: gives the features.
        real: (m, F) features of real images, from `features_of`.
    """

    def __init__(self, extractor: Extractor, real: np.ndarray):
        if real.ndim != 2 or real.shape[1] != extractor.n_features:
            raise ValueError(
                f"The real features have shape {real.shape}; the extractor {extractor.name!r} needs "
                f"(images, {extractor.n_features})."
            )
        self.extractor, self.real = extractor, real
        self._features = [np.zeros((0, real.shape[1]), np.float32)]
        self._ids = [np.zeros(0, np.int64)]

    def update(self, batch: Images) -> None:
        self._features.append(self.extractor(batch.pixels).cpu().numpy())
        self._ids.append(np.asarray(batch.ids))

    def gather(self, run: Run) -> np.ndarray:
        """Features of all processes in the order of the image ids, so the number of processes cannot matter: (n, F)."""
        features = run.gather(np.concatenate(self._features))  # (n, F)
        ids = run.gather(np.concatenate(self._ids))  # (n,)
        return features[np.argsort(ids, kind="stable")]
