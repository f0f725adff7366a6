"""Every long command, killed at random moments and started again, ends in the bytes of an uninterrupted one.

KILLS=100 in the environment makes a campaign of it: so many kills of every case instead of a few.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import forked
from test_configs import load
from test_features import SMALL, picture_folder

import utils
from libs import regimes, trainer
from libs.analysis import budget
from libs.analysis.calibrate import calibrate
from libs.codecs import KL
from libs.data.extract import extract
from libs.data.features_npy import Npy
from libs.data.images import ImageFolder
from libs.data.shards import Sharded
from libs.evaluation import samples
from libs.evaluation.evaluate import evaluate
from libs.models import build_model
from libs.run import Run

KILLS = int(os.environ.get("KILLS", 1))
ROUND = 4  # kills of one directory, at most, before the command may end and its files are compared
TIMED = {"seconds", "images_per_s", "memory_gb", "seconds_per_image", "seconds_per_image_runs", "time"}
TIMED |= {"recommended"}  # by seconds
TIMED |= {"commit"}  # of a checkout in which somebody works


@dataclass(frozen=True)
class Job:
    """A command: what it does with its directory, and which of its files, once complete, it may not make again."""

    work: Callable[[Run], object]
    kept: str = "none"
    besides: str = "none"  # regular expression: files that an uninterrupted run does not have


def train(run: Run) -> None:
    config = load("digits_uvit_tiny", "quick")
    config.train.update(n_steps=12, save_interval=3, sample_interval=8, monitor_steps=2)
    config.train.update(eval_interval=4, monitor_samples=8)
    config.optimizer.name = "adamw"  # Muon takes ten times as long
    trainer.fit(config, regimes.pixels(config), run)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("inputs")
    config = load("digits_uvit_tiny", "quick")
    torch.manual_seed(0)
    torch.save(build_model(config).state_dict(), folder / "nnet.pth")
    config.nnet_path = str(folder / "nnet.pth")
    config.sample.update(n_samples=24, mini_batch_size=4, sample_steps=4)
    config.eval.update(thresholds=(0.6,), seeds=(1,), fixed=(2,), sweep=(), fewer_steps=(2,), paired=6, timing_runs=1)
    pictures = ImageFolder(path=picture_folder(folder, 24), resolution=8)

    def features(layout) -> Callable[[Run], object]:
        options = dict(flips=True, batch_size=2, shard_size=2, workers=0)
        return lambda run: extract(pictures, KL(path="random", **SMALL), None, run.dir, run, layout=layout, **options)

    def one_sample(run: Run) -> None:
        alone = config.copy_and_resolve_references()
        samples.sample_to_folder(alone, regimes.of(alone), run, np.arange(24))
        if run.is_main:
            samples.write_npz(run.dir, range(24))

    short = config.copy_and_resolve_references()
    short.sample.update(n_samples=8, mini_batch_size=8)
    ask = dict(n_images=8, seed=7001)

    def plans(run: Run) -> None:
        budget.FINE = 6  # in this fork
        budget.spend(short, regimes.of(short), run, {"budget": (0.4, 0.6)}, **ask)

    return {
        "train": Job(train, besides=r"ckpts/(?!12)\d+\.ckpt/"),  # a run that was told to stop has saved at that step
        "evaluate": Job(lambda run: evaluate(config, regimes.of(config), run), kept="points/*/quality.json"),
        "sample": Job(one_sample, kept="*.png"),
        "extract": Job(features(Sharded()), kept=".extract/0*.json"),
        "extract-npy": Job(features(Npy()), kept=".extract/0*.json"),
        "calibrate": Job(plans),
        "calibrate-keep": Job(
            lambda run: calibrate(short, regimes.of(short), run, budget=0.5, max_quality_loss=None, n_bins=4, **ask)
        ),
    }


def start(job: Job, directory: Path, world: int) -> list[int]:
    """Start a job of `world` processes; their ids."""

    def work() -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # otherwise accelerate sets it for several processes
        config = load("digits_uvit_tiny", "quick")
        config.cpu, config.mixed_precision = True, "no"
        run = Run(directory, utils.make_accelerator(config, directory))
        with run.stopping:
            job.work(run)

    return forked(work, world, directory.with_suffix(".log"))


def ended(children: list[int], patience: float = 300) -> list[int]:
    """The exit codes; a job that hangs fails."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            raise AssertionError(f"a process still runs {patience} s after it should have ended")
        time.sleep(0.002)
    return [codes[child] for child in children]


def progress(directory: Path) -> int:
    """Files and lines of logs so far."""
    names = [Path(folder, name) for folder, _, found in os.walk(directory) for name in found]
    count = 0
    for name in names:
        with suppress(OSError):  # renamed just now
            count += name.read_bytes().count(b"\n") if name.suffix == ".jsonl" else not name.name.startswith(".")
    return count


def content(directory: Path, job: Job) -> dict[str, object]:
    """All files of a directory; of logs what does not depend on the time of day, of weights and states the values."""
    found: dict[str, object] = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if not path.is_file() or path.name == ".lock" or re.match(job.besides, name):
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".pth":  # a pickle also depends on which of its strings are one object
            found[name] = values(torch.load(path, weights_only=True))
    return found


def values(of):
    if isinstance(of, torch.Tensor):
        return str(of.dtype), tuple(of.shape), of.numpy().tobytes()
    if isinstance(of, dict):
        return {key: values(below) for key, below in of.items()}
    return [values(below) for below in of] if isinstance(of, list | tuple) else of


def timeless(value):
    if not isinstance(value, dict):
        return value
    return {key: timeless(below) for key, below in value.items() if key not in TIMED}


def stamps(directory: Path, job: Job) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.glob(job.kept)}


def kill(children: list[int], directory: Path, dice: random.Random, seconds: float, goals: int) -> list[int]:
    """Kill a job's processes, shortly after one another, at some time or at some state of its files; the exit codes."""
    number = dice.choice([signal.SIGKILL, signal.SIGTERM])
    goal = dice.randint(progress(directory), goals + 1)
    latest = time.monotonic() + (dice.random() * seconds if dice.random() < 0.5 else 60)
    while time.monotonic() < latest and progress(directory) < goal and not dead(children[0]):
        time.sleep(0.002)
    time.sleep(dice.random() * 0.05)
    for child in dice.sample(children, len(children)):
        os.kill(child, number)
        time.sleep(dice.random() * 0.02)
    return ended(children)


def dead(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


CASES = [(name, world) for name in ("train", "evaluate", "sample", "extract") for world in (1, 2)]
CASES += [("extract-npy", 1), ("calibrate", 1), pytest.param("calibrate-keep", 1, marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), CASES)
def test_killed_equals_never_killed(jobs, tmp_path, name, world):
    """SIGKILL and SIGTERM at random moments: catches forgotten state, torn, lost, left and needlessly redone files."""
    job, dice = jobs[name], random.Random(f"{name} {world} {KILLS}")
    began = time.monotonic()
    assert ended(start(job, tmp_path / "whole", world)) == [0] * world
    seconds, whole, goals = time.monotonic() - began, content(tmp_path / "whole", job), progress(tmp_path / "whole")
    rounds, codes = 0, []
    while len(codes) < KILLS:
        rounds += 1
        assert rounds <= KILLS + 4, "most runs end before they are killed"
        directory, kept = tmp_path / f"killed-{rounds}", {}
        for _ in range(min(ROUND, KILLS - len(codes))):
            ends = kill(start(job, directory, world), directory, dice, seconds, goals)
            codes += [ends[0]] * (ends != [0] * world)
            assert world > 1 or ends[0] in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), said(directory)
            kept |= stamps(directory, job)
        assert ended(start(job, directory, world)) == [0] * world, said(directory)
        assert kept.items() <= stamps(directory, job).items(), "what was complete is made again"
        found = content(directory, job)
        assert {name for name in found | whole if found.get(name) != whole.get(name)} == set()
    print({code: codes.count(code) for code in set(codes)})


def said(directory: Path) -> str:
    return directory.with_suffix(".log").read_text()[-3000:]
