"""A diffusers pipeline on a `Sampler`, for programs that are written against `DiffusionPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from libs import checkpoints
from libs.files import read_json, write_json
from libs.run import Alone
from libs.sampling.sampler import Sampler
from libs.sampling.stored import all_beside, plan_name

WEIGHTS = "model.safetensors"  # with the experiment's config in its header
OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class AdaptiveDepthOutput(BaseOutput):
    """What a call yields.

    images: n PIL images; for output_type="np" (n, H, W, C) float32 in [0, 1], for "pt" (n, C, H, W) on the CPU.
    depth: (calls, n) layers used.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    depth: np.ndarray


class AdaptiveDepthPipeline(DiffusionPipeline):
    """Images from a network with early exits.

    >>> pipe = AdaptiveDepthPipeline.from_pretrained("demo/last.ckpt")  # or a folder of save_pretrained
    >>> made = pipe(class_labels=[3, 8], num_inference_steps=8, exit_threshold=0.98)
    >>> made.images[0].size, made.depth.shape
    ((8, 8), (8, 2))
    >>> pipe.save_pretrained("pipeline")
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.register_modules(sampler=sampler)

    @property
    def device(self) -> torch.device:
        return self.sampler.run.device

    def to(self, device: str | torch.device) -> AdaptiveDepthPipeline:
        run = Alone(device, self.sampler.run.precision)
        self.sampler = replace(self.sampler, model=self.sampler.model.to(run.device), run=run)
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        exit_threshold: float | None = None,
        budget: float | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AdaptiveDepthOutput | tuple:
        """Sample one batch of images.

        Args:
            class_labels, prompt: classes or texts; there are as many images, unless `num_images` says otherwise.
            num_images: how many; classes and texts are then taken in turn.
            num_inference_steps: network evaluations; the default is the experiment's.
            exit_threshold: certainty in (0, 1] above which an image leaves; 1 is full depth.
            budget: share of the reference's MACs, as for `Sampler`: its plan decides the calls and their depths.
            generator: draws the noise seed; equal states give equal images. The default is seed 0.
            output_type: "pil", "np" or "pt".

        Raises:
            ValueError: a value that the network or the sampler does not allow.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        labels, prompts = (
            () if told is None else [told] if np.ndim(told) == 0 else told for told in (class_labels, prompt)
        )
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        n = max(len(labels), len(prompts), 1) if num_images is None else num_images
        options = dict(exit_threshold=exit_threshold, steps=num_inference_steps, budget=budget)
        made = self.sampler(n, seed=seed, labels=labels, prompts=prompts, **options)
        if output_type == "pt":
            images = made.pixels / 255  # (n, C, H, W)
        elif output_type == "np":
            images = (made.pixels / 255).permute(0, 2, 3, 1).numpy()  # (n, H, W, C)
        else:
            images = made.pil()
        return AdaptiveDepthOutput(images, made.depth) if return_dict else (images, made.depth)

    def save_pretrained(self, save_directory: str | Path, **_) -> None:
        """One .safetensors file that knows its experiment, its plans of scripts.calibrate, and model_index.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"config": self.sampler.config.to_dict(), "class_names": list(self.sampler.class_names)}
        checkpoints.write_weights(self.sampler.model.state_dict(), folder / WEIGHTS, about)
        for budget, plan in all_beside(self.sampler.config.nnet_path).items():
            name = plan_name(folder / WEIGHTS, f"budget-{budget:g}")
            write_json(folder / name, read_json(plan, "a plan beside the weights"))
        write_json(folder / "model_index.json", {"_class_name": type(self).__name__, "weights": WEIGHTS})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str | None = None, precision: str | None = None, **_):
        """From a local folder of `save_pretrained`, or whatever `Sampler.load` takes; nothing is downloaded."""
        saved = Path(path) / WEIGHTS
        return cls(Sampler.load(saved if saved.is_file() else path, device=device, precision=precision))
