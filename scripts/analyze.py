"""Why images leave where they do, and what the uncertainty knows (libs/analysis/analyze.py says what is measured).

    python -m scripts.analyze --config=configs/digits_uvit_tiny.py --nnet_path=.../1500.ckpt --exit_threshold=0.98
    python -m scripts.analyze --config=... --nnet_path=... --oracle=0.01,0.02,0.05     # the bound by looking ahead
    python -m scripts.analyze --nnet_path=... --budget=0.4,0.6,0.8      # per-image exits against the best static depths

Numbers go to analysis.json, pictures beside it. One process; the last line, on stdout, is JSON.
"""

import json

from absl import flags

import utils
from libs import regimes
from libs.analysis.analyze import analyze, answers
from libs.regimes import Regime
from libs.run import Run

FLAGS = flags.FLAGS


def work(config, regime: Regime, run: Run) -> None:
    taus, budgets = utils.flag_numbers("oracle"), utils.flag_numbers("budget")
    options = dict(n_images=FLAGS.images, seed=FLAGS.seed, n_times=FLAGS.times)
    found = analyze(config, regime, run, **options, taus=taus, budgets=budgets)
    run.say(f"pictures: {', '.join(found['pictures'])}")
    print(json.dumps({"path": str(run.dir / "analysis.json"), **answers(found)}))


if __name__ == "__main__":
    flags.DEFINE_integer("images", 256, "Images per measurement.")
    flags.DEFINE_integer("seed", 7001, "Noise seed.")
    flags.DEFINE_integer("times", 10, "Equal bins of t at whose middles the estimates are measured.")
    flags.DEFINE_list("oracle", [], "Tolerances of mean |eps_k - eps_K|: also evaluate the oracle (needs a reference).")
    flags.DEFINE_list("budget", [], "Shares of full depth's MACs: hold per-image exits against static depths there.")
    utils.launch(work, regimes.of, "analyze")
