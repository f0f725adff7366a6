"""What differs between pixels, latents and text-to-image. Nothing else may."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from libs import rng
from libs.build import build, lookup
from libs.codecs import KL, ClipText, Identity
from libs.data import DATASETS
from libs.data.features import picked
from libs.files import read_lines
from sde import PROCESSES, Process


class Conditions(Protocol):
    """What the network is told about an image besides its noise. None where it is told nothing."""

    def for_ids(self, seed: int, ids: np.ndarray) -> Tensor | None:
        """(n, ...) float32 or int64 on the CPU: the condition of image i depends on (seed, i) only."""

    def null(self, n: int) -> Tensor | None:
        """(n, ...): the condition that stands for none in guidance; None if the network knows none."""

    def for_training(self, stored: Tensor, drop: Tensor, p_uncond: float) -> Tensor | None:
        """What the data set yields -> (b, ...); drop (b,) uniform: null with probability `p_uncond`."""


@dataclass(frozen=True)
class Labels:
    """Class labels; `n_classes` 0 means none. With `has_null`, class `n_classes` is the null class of guidance.

    `chosen`: the classes of images 0, 1, ... in turn; () draws them.
    """

    n_classes: int
    has_null: bool
    chosen: tuple[int, ...] = ()

    def __post_init__(self):
        if any(not isinstance(c, int) or not 0 <= c < self.n_classes for c in self.chosen):
            allowed = f"they must lie in 0..{self.n_classes - 1}" if self.n_classes else "this network has no classes"
            raise ValueError(f"labels are {list(self.chosen)[:8]}; {allowed}")

    def for_ids(self, seed: int, ids: np.ndarray) -> Tensor | None:
        if not self.n_classes:
            return None
        if self.chosen:
            return torch.tensor(self.chosen)[torch.from_numpy(ids) % len(self.chosen)]
        draws = [torch.randint(self.n_classes, (), generator=rng.stream(seed, "label", int(i))) for i in ids]
        return torch.stack(draws)

    def null(self, n: int) -> Tensor | None:
        return torch.full((n,), self.n_classes) if self.has_null else None

    def for_training(self, stored: Tensor, drop: Tensor, p_uncond: float) -> Tensor | None:
        """stored: labels (b,)."""
        if not self.n_classes:
            return None
        return torch.where(drop < p_uncond, self.n_classes, stored) if self.has_null else stored


@dataclass(frozen=True)
class Texts:
    """Contexts (n, tokens, width) of texts; the empty text is null.

    `training` opens the training data, `source` what images are made from: `RandomCaptions` or `Prompts`.
    """

    has_null: bool
    training: Callable[[], Any]
    source: Callable[[], RandomCaptions | Prompts]

    def for_ids(self, seed: int, ids: np.ndarray) -> Tensor:
        return self.source().contexts(seed, ids)

    def texts(self, seed: int, ids: np.ndarray) -> list[str]:
        """The texts of `for_ids`."""
        return self.source().texts(seed, ids)

    def null(self, n: int) -> Tensor | None:
        return self.source().empty().expand(n, -1, -1) if self.has_null else None

    def for_training(self, stored: Tensor, drop: Tensor, p_uncond: float) -> Tensor:
        """stored: contexts (b, tokens, width), in the type of the files."""
        if not self.has_null:
            return stored.float()
        empty = self.training().empty().to(stored.device, non_blocking=True)
        return torch.where((drop < p_uncond)[:, None, None], empty, stored.float())


@dataclass(frozen=True)
class RandomCaptions:
    """Captions of a data set, drawn by (seed, id): published scores use those of the validation split."""

    data: Any  # CaptionShards or its like

    def draw(self, seed: int, i: int) -> tuple[int, float]:
        """The data set's image, and the number in [0, 1) that picks one of its captions."""
        generator = rng.stream(seed, "caption", int(i))
        return int(torch.randint(len(self.data), (), generator=generator)), float(torch.rand((), generator=generator))

    def contexts(self, seed: int, ids: np.ndarray) -> Tensor:
        indices, draws = zip(*(self.draw(seed, i) for i in ids), strict=True)
        flips = torch.zeros(len(ids), dtype=torch.bool)
        return self.data.gather(torch.tensor(indices), flips, torch.tensor(draws))[1].float()

    def texts(self, seed: int, ids: np.ndarray) -> list[str]:
        drawn = (self.draw(seed, i) for i in ids)
        captions = ((self.data.captions(index), draw) for index, draw in drawn)
        return [of_image[picked(draw, len(of_image))] for of_image, draw in captions]

    def empty(self) -> Tensor:
        return self.data.empty()


@dataclass(frozen=True)
class Prompts:
    """Given texts: image i is made from number i modulo their number."""

    prompts: Sequence[str]
    clip: ClipText

    def contexts(self, seed: int, ids: np.ndarray) -> Tensor:
        return self.clip.encode(self.texts(seed, ids)).cpu()

    def texts(self, seed: int, ids: np.ndarray) -> list[str]:
        return [self.prompts[int(i) % len(self.prompts)] for i in ids]

    def empty(self) -> Tensor:
        return self.clip.encode([""])[0].cpu()


@dataclass(frozen=True)
class Regime:
    """`shape` (C, H, W) is what the network denoises, `image_shape` what people see.

    `dataset()` opens the training data, which sampling never needs.
    """

    shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    process: Process
    codec: Any  # sample(stored, noise) -> x0 (B, C, H, W); decode(x0) -> (B, 3 or 1, H', W') uint8
    conditions: Conditions
    dataset: Callable[[], Any]


def pixels(config) -> Regime:
    """Images as they are, with class labels where the network has classes."""
    check_regime(config, "pixels")
    return assembled(config, Identity(), labels(config), cache(lambda: open_dataset(config, network_shape(config))))


def latents(config) -> Regime:
    """Latents of the KL autoencoder, with class labels where the network has classes."""
    check_regime(config, "latents")
    training = cache(lambda: open_dataset(config, moments_shape(config)))
    return assembled(config, kl_codec(config), labels(config), training)


def text_to_image(config) -> Regime:
    """Latents of the KL autoencoder, with contexts of CLIP's text encoder."""
    check_regime(config, "text")
    training = cache(lambda: open_captions(config))
    conditions = Texts(config.dataset.p_uncond > 0, training, cache(lambda: open_texts(config)))
    return assembled(config, kl_codec(config), conditions, training)


def assembled(config, codec, conditions: Conditions, dataset: Callable[[], Any]) -> Regime:
    shape = network_shape(config)
    image_shape = (3, codec.factor * shape[1], codec.factor * shape[2]) if codec.draws else shape
    return Regime(shape, image_shape, process(config), codec, conditions, dataset)


REGIMES = {"pixels": pixels, "latents": latents, "text": text_to_image}
SCRIPTS = {"pixels": "train.py", "latents": "train_ldm.py", "text": "train_t2i_discrete.py"}
SCRIPT_NOTES = {"latents": ", also where U-ViT has train_ldm_discrete.py and eval_ldm_discrete.py"}


def of(config) -> Regime:
    """The regime that the config names."""
    return lookup(REGIMES, config.regime, "regime")(config)


def check_regime(config, name: str) -> None:
    lookup(REGIMES, config.regime, "regime")
    if config.regime != name:
        script = SCRIPTS[config.regime]
        raise ValueError(
            f"regime is {config.regime!r}, not {name!r}: this experiment belongs to {script} and "
            f"{script.replace('train', 'eval')}" + SCRIPT_NOTES.get(config.regime, "")
        )


def network_shape(config) -> tuple[int, int, int]:
    return (config.nnet.in_chans, config.nnet.img_size, config.nnet.img_size)


def moments_shape(config) -> tuple[int, int, int]:
    channels, *size = network_shape(config)
    return (2 * channels, *size)


def kl_codec(config) -> KL:
    codec = KL(**config.autoencoder)
    if codec.latent_channels != config.nnet.in_chans:
        raise ValueError(
            f"nnet.in_chans is {config.nnet.in_chans}; it must be autoencoder.latent_channels, {codec.latent_channels}"
        )
    return codec


def process(config) -> Process:
    return lookup(PROCESSES, config.process, "process")()


def labels(config) -> Labels:
    has_null = config.dataset.p_uncond > 0
    if has_null and config.nnet.num_classes < 2:
        raise ValueError(
            f"dataset.p_uncond is {config.dataset.p_uncond} but nnet.num_classes is {config.nnet.num_classes}; "
            "dropping labels needs a network with the dataset's classes and one null class on top"
        )
    return Labels(max(config.nnet.num_classes, 0) - has_null, has_null, tuple(config.sample.labels))


def number_range(text: str) -> range | None:
    """The numbers of "7" or "0-9"; None for another text, and nothing where the last is less than the first."""
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def classes(labels: Sequence[int | str], names: Sequence[str]) -> tuple[int, ...]:
    """Classes as programs give them: numbers, names, and texts of `class_numbers`."""
    found: list[int] = []
    for label in labels:
        if isinstance(labels, str) or not (isinstance(label, str) or hasattr(label, "__index__")):
            raise ValueError(f"labels are {labels!r}; a list of class numbers and of names of classes is needed")
        if isinstance(label, str):
            found += [names.index(label)] if label in names else class_numbers(label, names, "labels")
        else:
            found.append(operator.index(label))
    return tuple(found)


def class_numbers(labels: str, names: Sequence[str] | None, setting: str = "--labels") -> tuple[int, ...]:
    """Classes as people write them: "207,360", "0-9" or, where the names are known, "cat,dog"; a number is a number.

    Args:
        names: of the classes in the order of their numbers (a checkpoint's or a data set's `class_names`), or None.
        setting: what errors call the flag.

    Raises:
        ValueError: no number, range or name; it lists the nearest names.
    """
    found: list[int] = []
    for part in (part.strip() for part in labels.split(",")):
        if (numbers := number_range(part)) is not None:
            if not 0 < len(numbers) <= numbers.stop <= 1_000_000:
                raise ValueError(f"{setting}={labels}: {part} is no range of classes such as 0-999")
            found += numbers
        elif part in (names or ()):
            found.append(names.index(part))
        else:
            near = get_close_matches(part, names or (), n=3, cutoff=0.4) or (names or ())[:5]
            known = f"; names are {', '.join(near)}, ..." if names else ", and these weights know no names of classes"
            raise ValueError(f"{setting}={labels}: {part!r} is no class number and no range such as 0-9{known}")
    return tuple(found)


def open_dataset(config, shape: tuple[int, int, int], **changes):
    """The data named in the config, checked against the network; `changes` in the data set's settings."""
    group = config.dataset
    path = {"path": group.path} if group.path else {}
    dataset = build(DATASETS, group, setting="dataset", **path, **changes)
    if tuple(dataset.shape) != shape:
        raise ValueError(
            f"dataset {config.dataset.name!r} has items of shape {tuple(dataset.shape)}, but nnet.in_chans and "
            f"nnet.img_size ask for {shape}"
        )
    told = Labels(0, False) if config.regime == "text" else labels(config)
    if told.n_classes and dataset.n_classes != told.n_classes:
        remedy = f"--config.nnet.num_classes={dataset.n_classes + told.has_null}"
        if not dataset.n_classes:
            remedy = "--config.nnet.num_classes=-1 --config.dataset.p_uncond=0"
        raise ValueError(
            f"dataset {config.dataset.name!r} has {dataset.n_classes} classes; with dataset.p_uncond="
            f"{config.dataset.p_uncond} nnet.num_classes={config.nnet.num_classes} stands for {told.n_classes}: "
            f"set {remedy}"
        )
    return dataset


def open_captions(config, **changes):
    """Moments with contexts; `changes` such as split="val"."""
    dataset = open_dataset(config, moments_shape(config), **changes)
    wanted = (config.nnet.num_clip_token, config.nnet.clip_dim)
    found = getattr(dataset, "context_shape", None)
    if found is None or tuple(found) != wanted:
        raise ValueError(
            f"dataset {config.dataset.name!r} has contexts of shape {found}, but nnet.num_clip_token and nnet.clip_dim "
            f"ask for {wanted}"
        )
    return dataset


def open_texts(config) -> RandomCaptions | Prompts:
    """The prompts of config.sample.prompts, or captions of the validation split."""
    if not config.sample.prompts:
        return RandomCaptions(open_captions(config, split="val"))
    texts = read_lines(config.sample.prompts, "sample.prompts")
    if not texts:
        raise ValueError(f"sample.prompts is {config.sample.prompts!r}, which has no prompts; one per line is needed")
    return prompts(config, texts)


def prompts(config, texts: Sequence[str]) -> Prompts:
    """The texts, encoded as the network was trained with."""
    clip = ClipText(**config.clip, device="cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    found, wanted = (clip.length, clip.width), (config.nnet.num_clip_token, config.nnet.clip_dim)
    if found != wanted:
        raise ValueError(
            f"clip.path {config.clip.path!r} gives contexts of shape {found}, but nnet.num_clip_token and "
            f"nnet.clip_dim ask for {wanted}"
        )
    return Prompts(texts, clip)
