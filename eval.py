"""Evaluate a pixel model at full depth, over exit thresholds, and against its competitors.

python eval.py --config=configs/digits_uvit_tiny.py --nnet_path=.../1500.ckpt --exit_threshold=0.99,0.98,0.95
"""

import utils
from libs import regimes
from libs.evaluation import evaluate as evaluator

if __name__ == "__main__":
    utils.launch(evaluator.evaluate, regimes.pixels, "eval")
