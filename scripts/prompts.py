"""A picture of prompts against certainties, and their CLIP scores: what early exit does to text-to-image in pairs.

    python -m scripts.prompts --config=configs/mscoco_uvit_small.py --nnet_path=... --output=prompts \\
        --config.sample.prompts=prompts.txt --exit_threshold=0.95,0.92,0.87

A prompt per line. pairs.png has a row per prompt: full depth, then every certainty, from the same noise. prompts.json
has depth and CLIP score (model: config.eval.clip) of every image; a table of their means is printed. One process.
"""

import utils
from libs import regimes
from libs.evaluation.prompts import compare_prompts
from libs.metrics.clip_score import ClipModel
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.sampler import Sampler


def work(config, regime: Regime, run: Run) -> None:
    if not config.sample.prompts:
        raise ValueError("config.sample.prompts names no file; give one with a prompt per line")
    clip = ClipModel(config.eval.clip, run.device)
    texts = list(regime.conditions.source().prompts)
    found = compare_prompts(Sampler.open(config, regime, run), texts, clip, run)
    print(f"{'certainty':>9}  {'depth':>6}  {'CLIP score':>10}  lost against full depth ({found['model']})")
    for column in found["columns"]:
        error = "" if column["lost_error"] is None else f" +- {column['lost_error']:.2f}"
        means = f"{column['depth']:6.2f}  {column['clip_score']:10.2f}  {column['lost']:.2f}"
        print(f"{column['certainty']:9}  {means}{error}")


if __name__ == "__main__":
    utils.launch(work, regimes.text_to_image, "prompts")
