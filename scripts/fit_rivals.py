"""Fit what two rivals of early exit learn, to a frozen U-ViT: which sublayers may give their last output again.

    python -m scripts.fit_rivals --nnet_path=demo/last.ckpt --kind=learned_cache --budget=0.7
    python -m scripts.fit_rivals --nnet_path=demo/last.ckpt --kind=lazy_gate --budget=0.6 --config.sample.sample_steps=8
    python eval.py --nnet_path=demo/last.ckpt --config.exit.name=lazy_gate --config.exit.lazy_gate.path=FILE

The configured sampling (calls, grid) is what is fitted, and the budget a share of its MACs at full depth. The file lies
beside the weights, KIND-BUDGET-CALLS-GRID.json (libs/analysis/rivals.py says how it is found). One process; the last
line, on stdout, is JSON.
"""

import json

from absl import flags

import utils
from libs import regimes
from libs.analysis.calibrate import calls_name
from libs.analysis.rivals import GATES, fit_gates
from libs.files import write_json
from libs.regimes import Regime
from libs.run import Run
from libs.sampling.stored import name_beside

FLAGS = flags.FLAGS


def work(config, regime: Regime, run: Run) -> None:
    options = dict(n_images=FLAGS.images, epochs=FLAGS.epochs, penalty=FLAGS.penalty, seed=FLAGS.seed)
    found = fit_gates(config, regime, run, FLAGS.kind, budget=FLAGS.budget, **options)
    path = run.dir / name_beside(config.nnet_path, f"{FLAGS.kind}-{FLAGS.budget:g}-{calls_name(config)}.json")
    write_json(path, found)
    print(json.dumps({"path": str(path), "kind": FLAGS.kind, "loss": found["loss"]}))


if __name__ == "__main__":
    flags.DEFINE_enum("kind", "learned_cache", list(GATES), "A table by call, or a gate by image.")
    flags.DEFINE_float("budget", 0.7, "Share of the MACs of these calls at full depth to spend, gates included.")
    flags.DEFINE_integer("images", 64, "Images to learn from.")
    flags.DEFINE_integer("epochs", 30, "Gradient steps, each over all calls.")
    flags.DEFINE_float("penalty", 0.5, "What an open gate costs, against the distance to full depth.")
    flags.DEFINE_integer("seed", 7001, "Noise seed of these images.")
    utils.launch(work, regimes.of, "calibrate")
