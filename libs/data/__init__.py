"""Data sets by name, and the order in which training reads them."""

from libs.data.batches import batches
from libs.data.celeba import CelebA
from libs.data.cifar10 import CIFAR10
from libs.data.dataset import Dataset
from libs.data.digits import Digits
from libs.data.digits_and_clothes import DigitsAndClothes
from libs.data.fashion_mnist import FashionMNIST
from libs.data.features import CaptionShards, LatentShards
from libs.data.features_npy import CaptionFiles, LatentFiles
from libs.data.imagenet import ImageNet
from libs.data.images import ImageFolder
from libs.data.synthetic import Synthetic, SyntheticCaptions, SyntheticLatents

DATASETS = {
    "digits": Digits,
    "images": ImageFolder,
    "cifar10": CIFAR10,
    "fashion_mnist": FashionMNIST,
    "digits_and_clothes": DigitsAndClothes,
    "celeba": CelebA,
    "imagenet": ImageNet,
    "latents": LatentShards,
    "captions": CaptionShards,
    "latents_npy": LatentFiles,
    "captions_npy": CaptionFiles,
    "synthetic": Synthetic,
    "synthetic_latents": SyntheticLatents,
    "synthetic_captions": SyntheticCaptions,
}
