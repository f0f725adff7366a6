"""Write images to a folder, {id}.png, from any model: pixels, latents or text-to-image.

    python -m scripts.sample --config=configs/cifar10_uvit_small.py --nnet_path=... --output=samples --npz
    python -m scripts.sample --config=configs/imagenet256_uvit_large.py --nnet_path=... --output=samples \\
        --seeds=0-31 --labels=207,360 --exit_threshold=0.95
    python -m scripts.sample --config=configs/mscoco_uvit_small.py --nnet_path=... --output=samples \\
        --seeds=0-11 --prompts=prompts.txt

Image i depends on its id i and the settings only: these are the images of the evaluation's first noise seed
(eval.seeds). Labels and prompts are taken in turn. Without --exit_threshold the policy of config.exit decides, at its
own certainty; 1 is full depth. A run that was killed is continued by the same command, with any number of processes
(accelerate launch, or on a CPU torchrun): batches are always the same, and what is complete is kept. sample.json holds
class and mean depth of every image. --npz adds samples.npz (arr_0, uint8, NHWC, and arr_1, classes), which the
evaluation suite of ADM reads. The last line is a JSON summary.
"""

import json

import numpy as np
from absl import flags
from ml_collections import config_flags

import utils
from libs import regimes
from libs.checkpoints import about
from libs.evaluation import samples
from libs.regimes import Regime
from libs.run import Run

FLAGS = flags.FLAGS


def whole_numbers(text: str, flag: str) -> tuple[int, ...]:
    """ "0-2,7" -> (0, 1, 2, 7)."""
    found: list[int] = []
    for part in text.split(","):
        if not (numbers := regimes.number_range(part.strip())):
            raise ValueError(f"{flag}={text}: {part.strip()!r} is no number and no range such as 0-49999")
        found += numbers
    return tuple(found)


def regime(config) -> Regime:
    """The config's regime with the labels and prompts asked for."""
    if FLAGS.labels:
        if config.regime == "text":
            raise ValueError("--labels belongs to models with classes; this one takes --prompts")
        config.sample.labels = regimes.class_numbers(FLAGS.labels, about(config.nnet_path).get("class_names"))
    if FLAGS.prompts:
        if config.regime != "text":
            raise ValueError(f"--prompts belongs to text-to-image models; this one is of {config.regime}")
        config.sample.prompts = FLAGS.prompts
    return regimes.of(config)


def wanted(config) -> tuple[int, ...]:
    """The ids of the images to make."""
    if FLAGS.seeds and FLAGS.n is not None:
        raise ValueError("give either --n (that many images) or --seeds (these)")
    if FLAGS.n is not None and FLAGS.n < 1:
        raise ValueError(f"--n={FLAGS.n}: at least 1 image can be made")
    ids = whole_numbers(FLAGS.seeds, "--seeds") if FLAGS.seeds else tuple(range(FLAGS.n or config.sample.n_samples))
    if len(set(ids)) < len(ids):
        raise ValueError(f"--seeds={FLAGS.seeds} has a number twice")
    return ids


def work(config, regime: Regime, run: Run) -> None:
    if not FLAGS.exit_threshold:
        if "eval.thresholds" in config_flags.get_override_values(FLAGS["config"]):
            raise ValueError("--config.eval.thresholds is of an evaluation: give --exit_threshold")
        config.eval.thresholds = ()  # those of an evaluation, of which one set of images could have only one
    if config.sample.inflight:
        run.say("note: sample.inflight has no effect here: a batch that is complete is not made again")
    ids = wanted(config)
    summary = samples.sample_to_folder(config, regime, run, np.array(ids))
    if run.is_main:
        if FLAGS.npz:
            summary["npz"] = str(samples.write_npz(run.dir, ids))
        print(json.dumps(summary))
    run.barrier()


if __name__ == "__main__":
    flags.DEFINE_integer("n", None, "How many images: ids 0 to n - 1. Default: sample.n_samples.")
    flags.DEFINE_string("seeds", None, "Which images, by their ids: 0-49999, or 3,5,8-12; 16 is one image.")
    flags.DEFINE_string("labels", None, "Their classes, in turn: 207,360, 0-999 or cat,dog. Default: drawn.")
    flags.DEFINE_string("prompts", None, "File with a prompt per line, taken in turn. Default: captions, drawn.")
    flags.DEFINE_bool("npz", False, "Also write samples.npz.")
    utils.launch(work, regime, "sample")
