"""Networks only: no exits are decided and nothing is sampled here."""

import inspect

import torch

from libs.build import chosen, lookup
from libs.models.dit import DIT_SIZES, DiT
from libs.models.early_exit import AllExits, EarlyExitModel
from libs.models.gaussian import Gaussian
from libs.models.uem import ESTIMATORS, NoEstimator
from libs.models.unet import DDPM, UNet
from libs.models.uvit import SIZES, UViT
from sde import PROCESSES

BACKBONES = {"uvit": UViT, "unet": UNet, "dit": DiT}


def build_model(config) -> EarlyExitModel:
    """The network of config.nnet with the estimator of config.uem, at initialisation."""
    nnet = {key: value for key, value in config.nnet.items() if value is not None}
    backbone = lookup(BACKBONES, nnet.pop("name"), "nnet.name")
    heads, points, rank = nnet.pop("heads"), nnet.pop("points"), nnet.pop("gaussian", 0)
    if foreign := sorted(nnet.keys() - inspect.signature(backbone).parameters.keys()):
        raise ValueError(
            f"nnet.name is {config.nnet.name!r}, which has no nnet.{', nnet.'.join(foreign)}: the network is the "
            "experiment's; take another file of configs/"
        )
    estimator = lookup(ESTIMATORS, config.uem.name, "uem.name")
    network, gaussian = backbone(**nnet), None
    if rank:
        shape = (nnet["in_chans"], nnet["img_size"], nnet["img_size"])
        with torch.device("cpu"):  # a network on the meta device has a process too
            process = lookup(PROCESSES, config.process, "process")()
        gaussian = Gaussian(shape, max(1, nnet.get("num_classes", 1)), rank, process, config.pred)
    own = dict(points=points, heads=heads, gaussian=gaussian)
    return EarlyExitModel(network, estimator, **own, **chosen(config.uem))
