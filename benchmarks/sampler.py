"""Images per second from noise to pixels: images that wait for their batch, and images that do not.

    python -m benchmarks.sampler                    # digits-tiny, batches of 16, 64 and 256; about 3 minutes
    python -m benchmarks.sampler --sizes S/2 --batches 8 --steps 4 --factor 4 --least 2

Every image leaves on its own, with exits spread over all layers. Both ways make the same images from the same seeds,
which is checked: the largest difference is part of the result. `full` is full depth, in lockstep. In-flight batching
holds up to four batches at once, so lockstep with batches four times as large is measured too.
"""

import argparse
import tempfile

import numpy as np
import torch

from benchmarks.common import (
    case_parser,
    cells,
    in_turn,
    make_inputs,
    make_model,
    middle,
    ratios,
    sampling,
    save,
    spread_exits,
    table,
)
from libs.codecs import Identity
from libs.exits import EXIT_POLICIES
from libs.regimes import Labels, Regime
from libs.run import Run
from libs.sampling.inflight import IN_FLIGHT
from libs.sampling.sampler import Sampler
from libs.sampling.solvers import dpm_solver_pp_2m
from sde import VPLinear

SAME = 1e-3  # of samples in about [-1, 1], fp32, where no decision was within rounding of the threshold


class Raw(Identity):
    """Samples before they are rounded to 8 bits, so that differences show."""

    def decode(self, x):
        return x


def make_run(folder: str, device: str) -> Run:
    if device == "cpu":
        return Run.single(folder)
    from accelerate import Accelerator

    return Run(folder, Accelerator())


def measure(model, batch: int, run: Run, options: argparse.Namespace) -> dict:
    backbone = model.backbone
    shape = (backbone.channels, backbone.img_size, backbone.img_size)
    regime = Regime(
        shape=shape,
        image_shape=shape,
        process=VPLinear(),
        codec=Raw(),
        conditions=Labels(backbone.num_classes, has_null=False),
        dataset=None,
    )
    n = options.factor * batch
    sampler = Sampler(model, regime, run, pred="v")
    plan = dpm_solver_pp_2m(VPLinear(), steps=options.steps)
    ways = {
        "full": dict(policy=EXIT_POLICIES["full"](), batch_size=batch),
        "lockstep": dict(policy=EXIT_POLICIES["threshold"](certainty=0.5), batch_size=batch),
        "in flight": dict(policy=EXIT_POLICIES["threshold"](certainty=0.5), batch_size=batch, inflight=True),
        f"lockstep x {IN_FLIGHT}": dict(policy=EXIT_POLICIES["threshold"](certainty=0.5), batch_size=IN_FLIGHT * batch),
    }
    made, rows = {}, {way: [] for way in ways}
    hooks = [
        block.register_forward_hook(lambda module, args, out: rows[current[0]].append(len(out)))
        for block in model.backbone.blocks
    ]
    current = [""]

    def job(way):
        def run_it():
            current[0] = way
            rows[way].clear()
            made[way] = list(sampler.images(np.arange(n), seed=1, plan=plan, **ways[way]))

        return run_it

    with sampling(model, options.device, options.dtype):
        seconds = in_turn({way: job(way) for way in ways}, options)
    for hook in hooks:
        hook.remove()
    images, used = ({} for _ in range(2))
    for way, batches in made.items():
        assert np.array_equal(np.concatenate([b.ids for b in batches]), np.arange(n)), f"{way} lost or doubled images"
        images[way] = torch.cat([b.pixels for b in batches])
        used[way] = np.concatenate([b.trace.used for b in batches], axis=2)
    result = {}
    for way in ways:
        record = {"images": n, "images_per_s": n / middle(seconds[way])["median"], "seconds": middle(seconds[way])}
        record["speed_up"] = middle(ratios(seconds, "lockstep", way))
        record["mean_depth"] = float(used[way].mean())
        record["rows_per_layer"] = float(np.mean(rows[way]))
        if way != "full":
            same = (used[way] == used["lockstep"]).all((0, 1))
            record["images_with_other_exits"] = int((~same).sum())  # decisions within rounding of the threshold
            record["largest_difference"] = float((images[way] - images["lockstep"])[torch.from_numpy(same)].abs().max())
            if options.dtype == "fp32":
                assert record["largest_difference"] < SAME and same.mean() > 0.9, f"{way} made other images: {record}"
        result[way] = record
    return result


def main() -> None:
    arguments = case_parser(__doc__, sizes=("tiny",), batches=(16, 64, 256))
    arguments.add_argument("--steps", type=int, default=10, help="network evaluations per image; default: 10")
    arguments.add_argument("--factor", type=int, default=8, help="batches per measurement; default: 8")
    arguments.set_defaults(rounds=15, budget=40)
    options = arguments.parse_args()
    cases, rows = {}, [("case", "way", "images/s", "speed-up", "25 %", "75 %", "depth", "rows/layer", "difference")]
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, options.device)
        for size in options.sizes:
            model = make_model(size, options.device)
            x, _, time, cond = make_inputs(model, 64 if size == "tiny" else 16)
            spread_exits(model, x, time, cond)
            for batch in options.batches:
                case = f"{size} batch {batch} {options.dtype}, {options.steps} steps"
                cases[case] = measure(model, batch, run, options)
                for way, record in cases[case].items():
                    rows.append(
                        (
                            case,
                            way,
                            record["images_per_s"],
                            *cells(record["speed_up"]),
                            record["mean_depth"],
                            record["rows_per_layer"],
                            record.get("largest_difference", ""),
                        )
                    )
    table(rows)
    save("sampler", options.device, cases)


if __name__ == "__main__":
    main()
