"""Evaluate a text-to-image model at full depth, over exit thresholds, and against its competitors.

python eval_t2i_discrete.py --config=configs/mscoco_uvit_small.py --nnet_path=.../last.ckpt --exit_threshold=0.92,0.87
"""

import utils
from libs import regimes
from libs.evaluation import evaluate as evaluator

if __name__ == "__main__":
    utils.launch(evaluator.evaluate, regimes.text_to_image, "eval")
