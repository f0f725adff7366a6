"""Why images leave where they do, and what the uncertainty knows (libs/analysis/analyze.py says what is measured).

    python -m scripts.analyze --config=configs/digits_uvit_tiny.py --nnet_path=.../1500.ckpt --exit_threshold=0.98
    python -m scripts.analyze --config=... --nnet_path=... --oracle=0.01,0.02,0.05     # the bound by looking ahead

Numbers go to analysis.json, pictures beside it. One process; the last line, on stdout, is JSON.
"""

from __future__ import annotations

import json

from absl import flags

import utils
from libs import regimes
from libs.analysis.analyze import analyze, headline
from libs.regimes import Regime
from libs.run import Run

FLAGS = flags.FLAGS


def work(config, regime: Regime, run: Run) -> None:
    try:
        taus = [float(text) for text in FLAGS.oracle]
    except ValueError:
        raise ValueError(f"--oracle={','.join(FLAGS.oracle)}: tolerances of |eps_k - eps_K| are numbers >= 0") from None
    found = analyze(config, regime, run, n_images=FLAGS.images, seed=FLAGS.seed, n_times=FLAGS.times, taus=taus)
    run.say(f"pictures: {', '.join(found['pictures'])}")
    print(json.dumps({"path": str(run.dir / "analysis.json"), **headline(found)}))


if __name__ == "__main__":
    flags.DEFINE_integer("images", 256, "Images per measurement.")
    flags.DEFINE_integer("seed", 7001, "Noise seed.")
    flags.DEFINE_integer("times", 10, "Equal bins of t at whose middles the estimates are measured.")
    flags.DEFINE_list("oracle", [], "Tolerances of mean |eps_k - eps_K|: also evaluate the oracle (needs a reference).")
    utils.launch(work, regimes.of, "analyze")
