"""Evaluate a latent model at full depth, over exit thresholds, and against its competitors.

python eval_ldm.py --config=configs/imagenet256_uvit_large.py --nnet_path=.../last.ckpt --exit_threshold=0.95,0.92
"""

import utils
from libs import regimes
from libs.evaluation import evaluate as evaluator

if __name__ == "__main__":
    utils.launch(evaluator.evaluate, regimes.latents, "eval")
