"""How well images fit their texts: the cosine of CLIP's embeddings (Hessel et al. 2021)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from libs.codecs.clip_text import load_clip
from libs.metrics.extractors import clip_input, exact
from libs.run import Run
from libs.sampling.images import Images


class ClipModel:
    """CLIP with both halves and its tokenizer.

    Args:
        path: folder, or the name of a model in huggingface_hub's cache.

    Raises:
        FileNotFoundError: the model is not there; says how to get it.
        ImportError: transformers is not installed.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        self.net, self.name = load_clip("CLIPModel", path).to(device), Path(path).name
        self.tokenizer = load_clip("CLIPTokenizer", path)

    def scores(self, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """(n, C, H, W) uint8 and n texts -> (n,) 100 max(cosine, 0), float64."""
        vision, device = self.net.config.vision_config, self.net.device
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        with exact(device):
            out = self.net(pixel_values=clip_input(pixels.to(device), vision.image_size), **tokens)
        return 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0).double().cpu()  # both have length 1


class ClipScore:
    """Key: `clip_score_<model>`, since models do not agree on the scale.

    Args:
        model: gives the embeddings.
        texts: image ids (n,) -> the n texts that the images were made from.
    """

    def __init__(self, model: ClipModel, texts: Callable[[np.ndarray], list[str]]):
        self.model, self.texts = model, texts
        self.sum = torch.zeros(2, dtype=torch.float64)

    def update(self, batch: Images) -> None:
        scores = self.model.scores(batch.pixels, self.texts(batch.ids))
        self.sum += torch.tensor([float(scores.sum()), len(scores)], dtype=torch.float64)

    def compute(self, run: Run) -> dict[str, float]:
        total, n = run.all_sum(self.sum.clone()).tolist()
        return {f"clip_score_{self.model.name}": total / n}
