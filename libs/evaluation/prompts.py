"""Text to image, prompt by prompt: the same noise at full depth and at every certainty, with CLIP scores and depths."""

from pathlib import Path

import torch
from torch import Tensor

from libs.files import write_json
from libs.metrics.clip_score import ClipModel
from libs.run import Run
from libs.sampling.images import save_grid
from libs.sampling.sampler import Sampler


def compare_prompts(sampler: Sampler, texts: list[str], clip: ClipModel, run: Run) -> dict:
    """Write prompts.json and pairs.png: a row per prompt, a column per certainty of eval.thresholds, full depth first.

    Image i is that of prompt i and the first noise seed of eval.seeds, so a row differs in its depths alone.

    Args:
        texts: n prompts.
        clip: scores are 100 max(cosine, 0), so they compare within one model only.

    Returns:
        what prompts.json holds: "columns", each with certainty, mean depth in layers, the n scores and their mean, and
        "lost": the mean of paired differences in score to full depth, with its standard error.
    """
    if run.world > 1:
        raise ValueError(f"prompts are compared in one process; {run.world} were started")
    config, columns, pictures = sampler.config, [], []
    for certainty in (1.0, *(c for c in config.eval.thresholds if c < 1)):
        images = sampler(len(texts), seed=config.eval.seeds[0], prompts=texts, exit_threshold=certainty)
        scores = clip.scores(images.pixels, texts)  # (n,)
        full = scores if not columns else torch.tensor(columns[0]["scores"], dtype=torch.float64)
        lost = full - scores
        columns.append({
            "certainty": certainty,
            "depth": float(images.mean_depth.mean()),
            "clip_score": float(scores.mean()),
            "lost": float(lost.mean()),
            "lost_error": float(lost.std() / len(texts) ** 0.5) if len(texts) > 1 else None,
            "scores": scores.tolist(),
        })  # fmt: skip
        pictures.append(images.pixels)
    found = {"model": clip.name, "seed": config.eval.seeds[0], "prompts": texts, "columns": columns}
    save_grid(Path(run.dir) / "pairs.png", rows(pictures), columns=len(columns))
    write_json(Path(run.dir) / "prompts.json", found)
    return found


def rows(pictures: list[Tensor]) -> Tensor:
    """k columns of (n, C, H, W) -> (n k, C, H, W), prompt by prompt."""
    return torch.stack(pictures, dim=1).flatten(0, 1)
