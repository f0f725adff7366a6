"""KL-f8, the autoencoder of Stable Diffusion: images <-> latents an eighth of their size.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022). The network is diffusers'; its
weights are read under CompVis' names, which are those of the files that U-ViT publishes and of KL-f8's own training
files, and under diffusers' names, old and new.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from libs import checkpoints
from libs.build import check_at_least, lookup
from libs.checkpoints.layouts import modern_attention
from libs.codecs.identity import to_uint8
from libs.files import read_json

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# diffusers' names -> CompVis' (applied in this order). Decoder levels are counted from opposite ends: see `compvis`.
RENAMES = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


class KL:
    """Latents z = scale * sample of N(mean, exp(logvar)), where (mean, logvar) are the encoder's moments.

    Data sets of latents store the moments (B, 8, h, w); `sample` turns them into what the network denoises. The weights
    are read when something is first encoded or decoded, or by `to`: training on stored moments needs none. Nothing here
    records gradients.

    Args:
        path: file of weights (.pth, .ckpt, .bin or .safetensors) under CompVis' names, bare or with the prefix
            `first_stage_model.`, or under diffusers' names; or a folder that diffusers saved, of the autoencoder or of
            a pipeline with `vae/`; "random" draws them (from seed 0) for runs without the file.
        scale: factor that gives z about unit variance: 0.18215 (Stable Diffusion), 0.23010 (U-ViT on MS-COCO).
        precision: of encoder and decoder, "fp32", "fp16" or "bf16". An image for which fp16 overflows (large
            activations in the decoder do) is computed again in fp32.
        chunk: images per pass of the network; bounds the memory.
        channels: width of each level, highest resolution first; the latents are 2^(levels - 1) times smaller.
        layers: residual blocks per level of the encoder (the decoder has one more).
        groups: groups of the group normalisations.
        latent_channels: of z; the moments have twice as many.
        device: where the network lives.

    Raises:
        ValueError: an impossible setting. When the weights are read: no file at `path`, one whose tensors are not
            exactly those of the network, or a folder whose config.json says something else than the settings.
        ImportError: then, diffusers is not installed.
    """

    draws = True  # `sample` needs noise

    def __init__(
        self,
        *,
        path: str = "assets/stable-diffusion/autoencoder_kl.pth",
        scale: float = 0.18215,
        precision: str = "fp32",
        chunk: int = 50,
        channels: Sequence[int] = (128, 256, 512, 512),
        layers: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        device: torch.device | str = "cpu",
    ):
        if not scale > 0:
            raise ValueError(f"autoencoder.scale is {scale}; it must be positive (0.18215, or 0.2301 for MS-COCO).")
        check_at_least("autoencoder.", chunk=chunk, latent_channels=latent_channels, layers=layers)
        if not channels or any(width % groups for width in channels):
            raise ValueError(f"autoencoder.channels is {channels}; its widths must be multiples of {groups} groups.")
        self.scale, self.dtype, self.chunk = scale, lookup(PRECISIONS, precision, "autoencoder.precision"), chunk
        self.latent_channels, self.factor = latent_channels, 2 ** (len(channels) - 1)
        self.path, self.device = path, device
        self.architecture = {
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "block_out_channels": list(channels),
            "layers_per_block": layers,
            "norm_num_groups": groups,
            "latent_channels": latent_channels,
        }

    @cached_property
    def vae(self):
        """diffusers' AutoencoderKL."""
        return autoencoder(self.architecture, self.path, self.scale).eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> "KL":
        self.vae.to(device)
        return self

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 2^(levels - 1) -> mean and log variance (B, 8, h, w) float32.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"The autoencoder was given images of shape {tuple(images.shape)}; it encodes (B, 3, H, W) with H and "
                f"W multiples of {self.factor}."
            )
        return self._chunked(lambda x: self.vae.encode(x).latent_dist.parameters, images)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """What a data set of latents yields -> x0: moments (B, 8, h, w) and standard normal noise -> z (B, 4, h, w)."""
        mean, logvar = moments.float().chunk(2, dim=1)  # (B, 4, h, w) each
        return self.scale * (mean + (logvar.clamp(-30, 20) / 2).exp() * noise)

    def decode(self, x0: Tensor) -> Tensor:
        """z (B, 4, h, w) -> images (B, 3, H, W) uint8 on the network's device."""
        return to_uint8(self.reconstruct(x0))

    @torch.no_grad()
    def reconstruct(self, x0: Tensor) -> Tensor:
        """z (B, 4, h, w) -> images (B, 3, H, W) float32, about [-1, 1] and not clamped."""
        return self._chunked(lambda z: self.vae.decode(z).sample, x0.float() / self.scale)

    def _chunked(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """network(x) in float32, `chunk` rows at a time."""
        device = self.vae.device
        return torch.cat([self._guarded(network, rows.to(device).float()) for rows in x.split(self.chunk)])

    def _guarded(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """network(x) in the chosen precision; rows that come out not finite are computed again in fp32."""
        kind, y = x.device.type, None
        if self.dtype != torch.float32:
            with torch.autocast(kind, dtype=self.dtype):
                y = network(x).float()
            overflowed = ~y.flatten(1).isfinite().all(1)  # (b,)
            if not overflowed.any():
                return y
            warnings.warn(f"The autoencoder overflows in {self.dtype}; such images are redone in fp32.", stacklevel=4)
        with torch.autocast(kind, enabled=False):  # the caller may have switched it on
            return network(x) if y is None else y.index_put((overflowed,), network(x[overflowed]))


def autoencoder(architecture: dict, path: str, scale: float):
    """diffusers' AutoencoderKL with the weights at `path` (see `KL`, also for `scale`)."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("The KL autoencoder needs diffusers: pip install diffusers") from error
    if path == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoencoderKL(**architecture)
    if os.path.isdir(path):
        path = file_in(path, architecture, scale)
    with torch.device("meta"):  # no memory, and no time spent on initial weights
        vae = AutoencoderKL(**architecture)
    levels = len(architecture["block_out_channels"])
    vae.load_state_dict(to_diffusers(read_autoencoder(path), vae.state_dict(), levels, path), assign=True)
    return vae


# config.json's names for the settings of `KL`
SETTINGS = {
    "block_out_channels": "channels",
    "layers_per_block": "layers",
    "norm_num_groups": "groups",
    "latent_channels": "latent_channels",
}
FOLDER_FILES = [f"diffusion_pytorch_model{end}" for end in (".safetensors", ".fp16.safetensors", ".bin")]


def file_in(folder: str, architecture: dict, scale: float) -> str:
    """The file of weights in a folder that diffusers saved, whose config.json is held against the settings."""
    if os.path.isfile(os.path.join(folder, "model_index.json")):  # a whole pipeline
        folder = os.path.join(folder, "vae")
    config = read_json(os.path.join(folder, "config.json"), "the config of autoencoder.path")
    wrong = [
        f"autoencoder.{setting} is {architecture[key]} and {key} {config[key]}"
        for key, setting in SETTINGS.items()
        if key in config and config[key] != architecture[key]
    ]
    if wrong:
        raise ValueError(f"{folder}/config.json describes another autoencoder: {'; '.join(wrong)}.")
    if (published := config.get("scaling_factor", scale)) != scale:
        warnings.warn(
            f"{folder}/config.json says scaling_factor {published}; autoencoder.scale is {scale}.", stacklevel=4
        )
    found = [name for name in FOLDER_FILES if os.path.isfile(os.path.join(folder, name))]
    if not found:
        raise FileNotFoundError(f"autoencoder.path {folder} has none of the files {', '.join(FOLDER_FILES)}.")
    return os.path.join(folder, found[0])


def read_autoencoder(path: str) -> dict[str, Tensor]:
    """The autoencoder's tensors in a file, without a prefix. Training files have the discriminator and a loss too."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no autoencoder at {path}. `python -m scripts.download autoencoder_kl` fetches it "
            "(autoencoder_kl_ema for the ImageNet H models), or set autoencoder.path"
        )
    state, prefix = checkpoints.read_weights(path), "first_stage_model."
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inner or {key: value for key, value in state.items() if not key.startswith("loss.")}


def to_diffusers(state: dict[str, Tensor], wanted: dict[str, Tensor], levels: int, path: str) -> dict[str, Tensor]:
    """A state dict under CompVis' names, or diffusers' old or new ones -> diffusers' names, in float32.

    Args:
        wanted: the network's own state dict; only its names and shapes are read.
        levels: of resolution.
        path: how the error calls the file.

    Raises:
        ValueError: names or shapes differ; lists them as they are in the file.
    """
    if any(".mid_block." in key for key in state):
        names = {key: key for key in wanted}
        state = {modern_attention(key): value for key, value in state.items()}
    else:
        names = {key: compvis(key, levels) for key in wanted}
    problems = [
        f"  {what} {len(keys)} tensors: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in (
            ("it lacks", sorted(set(names.values()) - state.keys())),
            ("it has, and should not,", sorted(state.keys() - set(names.values()))),
        )
        if keys
    ]
    converted = {}
    for key, name in names.items():
        if name not in state:
            continue
        value, shape = state[name], wanted[key].shape
        # CompVis computes the projections of attention as 1 x 1 convolutions, diffusers as matrices.
        fits = value.shape == shape or value.shape == (*shape, 1, 1)
        if not value.is_floating_point():
            problems.append(f"  {name} has no real numbers: {value.dtype}")
        elif fits:
            converted[key] = value.reshape(shape).float()
        else:
            problems.append(f"  {name} is {tuple(value.shape)} in the file and {tuple(shape)} in the network")
    if problems:
        raise ValueError("\n".join([f"{path} is not the configured autoencoder ({len(wanted)} tensors):", *problems]))
    return converted


def compvis(name: str, levels: int) -> str:
    """CompVis' name of diffusers' tensor `name`: decoder level 0 is the highest resolution there, the lowest here."""
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
