"""Spend a budget where it keeps the most quality: how many calls, when, and how deep each of them goes.

    python -m scripts.calibrate --config=configs/digits_uvit_tiny.py --nnet_path=.../2000.ckpt --budget=0.1,0.2,0.3
    python -m scripts.calibrate ... --seconds=0.2            the same, of the measured seconds
    python -m scripts.calibrate ... --max_quality_loss=0.05  the smallest budget that loses no more
    python -m scripts.calibrate ... --budget=0.35 --depth=full   full depth: only the calls are placed
    python -m scripts.calibrate ... --budget=0.1 --depth=ends    full depth, or no layers: exit 0 (nnet.gaussian)
    python eval.py ... --plan=.../2000.ckpt/plan-budget-0.2.json

A budget is a share of what the reference spends: full depth, config.sample.sample_steps calls on the configured grid.
One noise seed teaches, the next selects, the one after is reported (libs/analysis/budget.py says how). The file lies
beside the weights, where Sampler(..., budget=0.2) finds it.

Several budgets in one call share what is learned, and larger ones begin with the plans of smaller ones.

--nodes=keep leaves the calls where the configured sampler makes them, and finds a schedule and thresholds for them: the
file is read by exit.name=schedule and exit.name=calibrated. One process; on stdout a line of JSON per budget.
"""

import json

from absl import flags

import utils
from libs import regimes
from libs.analysis.budget import DEPTHS, OBJECTIVES, spend
from libs.analysis.calibrate import POLICY_OF, calibrate, summary
from libs.regimes import Regime
from libs.run import Run

FLAGS = flags.FLAGS


def work(config, regime: Regime, run: Run) -> None:
    given = [name for name in ("budget", "seconds", "max_quality_loss") if FLAGS[name].value is not None]
    asked = {name: utils.flag_numbers(name) for name in given}
    options = dict(n_images=FLAGS.images, seed=FLAGS.seed)
    if FLAGS.nodes == "keep":
        unfit = [name for name in ("seconds", "depth", "objective") if FLAGS[name].present]
        if unfit:
            raise ValueError(f"--nodes=keep finds depths for a budget of MACs: leave --{', --'.join(unfit)} out")
        if any(len(values) != 1 for values in asked.values()):
            raise ValueError("--nodes=keep takes one --budget or --max_quality_loss")
        one = {name: value for name, (value,) in asked.items()}
        found = calibrate(config, regime, run, **one, **options, n_bins=FLAGS.bins)
        print(json.dumps({"path": found["path"], **{part: summary(found[part]) for part in POLICY_OF}}))
        return
    if FLAGS["bins"].present:
        raise ValueError(f"--bins={FLAGS.bins} is of the thresholds that --nodes=keep finds: leave it out")
    for found in spend(config, regime, run, asked, **options, depth=FLAGS.depth, objective=FLAGS.objective):
        print(json.dumps({"path": found["path"], **found["plan"], **found["report"]}))


if __name__ == "__main__":
    flags.DEFINE_list(
        "budget", None, "Shares of the reference's MACs to spend, a plan each; heads and questions count."
    )
    flags.DEFINE_list("seconds", None, "Instead: shares of the reference's seconds, as measured on this machine.")
    flags.DEFINE_list("max_quality_loss", None, "Instead: as few MACs as these relative rises of the distance allow.")
    flags.DEFINE_enum("nodes", "search", ["search", "keep"], "Whether the times of the calls are searched or kept.")
    flags.DEFINE_enum("depth", "search", list(DEPTHS), "Where calls may leave: anywhere, nowhere, at 0 layers only.")
    flags.DEFINE_enum("objective", "frechet", list(OBJECTIVES), "What selects: Frechet distance, or the fine teacher.")
    flags.DEFINE_integer("images", 256, "Images per noise seed to learn from.")
    flags.DEFINE_integer("seed", 7001, "Noise seed to learn from; the next two select and report.")
    flags.DEFINE_integer("bins", 50, "Bins of time for thresholds (--nodes=keep); fewer calls than that get one each.")
    utils.launch(work, regimes.of, "calibrate")
