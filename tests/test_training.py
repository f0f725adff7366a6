"""Training that can be killed, resumed and split over processes without changing what comes out."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finished
from test_configs import load

from libs import checkpoints as weights
from libs import regimes, trainer
from libs.checkpoints import training_state as checkpoints
from libs.run import Run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/digits_uvit_tiny.py"
SMALL = [
    "--config.nnet.embed_dim=32",
    "--config.nnet.depth=4",
    "--config.mixed_precision=no",
    "--config.cpu=True",
    "--config.train.batch_size=16",
    "--config.train.sample_interval=0",
    "--config.train.log_interval=1",
]


def start(*arguments) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stderr=pipe, stdout=pipe, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def log(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_processes_equal_one(launched, tmp_path):
    """The same loss curve, and exactly the same images: catches randomness by rank, double or missing images.

    `launched` by torchrun, which sets what the forks of this process are given.
    """
    # Muon orthogonalises in bf16, which turns rounding in the last bit into 1e-4 within a few steps
    flags = [f"--config={CONFIG}", *SMALL, "--config.train.n_steps=20", "--config.optimizer.name=adamw"]
    for n in (1, 2):
        train = ("train.py", *flags, f"--workdir={tmp_path / str(n)}")
        if launched and n > 1:
            finish(start("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *train))
        else:
            finished(tmp_path / f"log-train{n}", *train, world=n)
    one, two = (np.array([line["loss"] for line in log(tmp_path / str(n))]) for n in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-5)

    flags = [
        f"--config={CONFIG}",
        f"--nnet_path={tmp_path / '1' / 'last.ckpt'}",
        "--exit_threshold=0.9",
        "--config.nnet.embed_dim=32",
        "--config.nnet.depth=4",
        "--config.mixed_precision=no",
        "--config.sample.n_samples=40",
        "--config.sample.mini_batch_size=16",
        "--config.sample.sample_steps=4",
        "--config.eval.timing_runs=1",
        "--config.eval.seeds=(1,)",
        "--config.eval.fixed=()",
        "--config.eval.fewer_steps=()",
        "--config.eval.sweep=()",
    ]
    for n in (1, 2):
        finished(tmp_path / f"log{n}", "eval.py", *flags, f"--output_path={tmp_path / f'eval{n}'}", world=n)
    images = {}
    for n in (1, 2):
        files = sorted((tmp_path / f"eval{n}" / "points" / "full-depth").glob("baseline-*.npz"))
        ids = np.concatenate([np.load(file)["ids"] for file in files])
        pixels = np.concatenate([np.load(file)["pixels"] for file in files])
        assert sorted(ids) == list(range(40)), "no image missing, none twice"
        images[n] = pixels[np.argsort(ids)]
    np.testing.assert_array_equal(images[1], images[2])
    lines = [
        [json.loads(line)["metrics"] for line in (tmp_path / f"eval{n}" / "results.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    for a, b in zip(*lines, strict=True):
        assert a["fd_digits_cnn"] == pytest.approx(b["fd_digits_cnn"], rel=1e-7)  # float32 features in other batches
        for key in ("psnr", "ssim", "mean_depth", "gmacs"):
            assert a[key] == pytest.approx(b[key], rel=1e-9)


def small_config(**train):
    config = load("digits_uvit_tiny", "quick")
    config.train.update(train)
    config.optimizer.name = "adamw"
    return config


def test_accumulation_equals_the_full_batch(tmp_path):
    """Catches micro-batches that are weighted, drawn or ordered differently."""
    states = []
    config = small_config().to_dict()
    assert checkpoints.allowed("train.accumulate", config)
    config["loss"]["weights"] = "adadiff"  # means over a micro-batch
    assert not checkpoints.allowed("train.accumulate", config)
    for accumulate in (1, 4):
        run = Run.single(tmp_path / str(accumulate))
        config = small_config(n_steps=4, accumulate=accumulate, grad_clip=0.0)
        trainer.fit(config, regimes.pixels(config), run)
        states.append(weights.read_weights(run.dir / "ckpts/4.ckpt/nnet.pth"))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=2e-3, atol=2e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    """Catches recomputation with other inputs."""
    states = []
    for use_checkpoint in (False, True):
        run = Run.single(tmp_path / str(use_checkpoint))
        config = small_config(n_steps=3)
        config.nnet.use_checkpoint = use_checkpoint
        trainer.fit(config, regimes.pixels(config), run)
        states.append(weights.read_weights(run.dir / "last.ckpt" / "nnet.pth"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_ema_rule():
    """ema <- r ema + (1 - r) p from the first step: catches a warm-up or a first-step copy."""
    ema, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = [p.clone() for p in ema.parameters()]
    trainer.ema_update(ema, model, 0.9)
    for old, new, p in zip(before, ema.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)


def test_warm_up_starts_at_zero():
    """The released schedule: step 0 has lr 0, step `warmup` the full rate; then constant, or a cosine to zero."""
    config = load("digits_uvit_tiny")
    parameter = torch.nn.Parameter(torch.zeros(1))

    def rates(name):
        config.lr_scheduler.update(name=name, warmup_steps=4)
        optimizer = torch.optim.AdamW([parameter], lr=1.0)
        schedule = trainer.make_lr_scheduler(config.lr_scheduler, optimizer, 12)
        out = []
        for _ in range(13):
            out.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return out

    assert rates("customized") == [0, 0.25, 0.5, 0.75, *[1.0] * 9]
    assert rates("cosine")[4] == 1.0 and rates("cosine")[8] == pytest.approx(0.5) and rates("cosine")[12] == 0


def test_frozen_backbone_stays(tmp_path):
    """Only the estimator and own heads move; catches a freeze that matches nothing or everything."""
    config = small_config(n_steps=3, freeze_backbone=True)
    config.nnet.heads = "own"
    config.lr_scheduler.warmup_steps = 0
    run = Run.single(tmp_path)
    torch.manual_seed(config.seed)
    start = trainer.build_model(config).state_dict()
    trainer.fit(config, regimes.pixels(config), run)
    end = weights.read_weights(run.dir / "last.ckpt" / "nnet.pth")
    moved = {key.split(".")[0] for key in start if not torch.equal(start[key], end[key])}
    assert moved == {"uem", "heads"}


def test_best_and_last(tmp_path):
    """The monitor keeps the best weights beside the newest checkpoints."""
    config = small_config(n_steps=4, eval_interval=2, monitor_samples=8, save_interval=1, keep=2)
    run = Run.single(tmp_path)
    trainer.fit(config, regimes.pixels(config), run)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["3.ckpt", "4.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "4.ckpt" and (tmp_path / "best.pth").is_file()
    monitored = [line for line in log(tmp_path) if any(key.startswith("monitor_") for key in line)]
    assert [line["step"] for line in monitored] == [2, 4]


def test_a_diverged_run_saves_nothing_and_the_advice_works(tmp_path):
    """Catches checkpoints full of NaN that push the good ones out, and a lower rate that the resume ignores."""
    config = small_config(n_steps=2, save_interval=1)
    config.lr_scheduler.update(name="customized", warmup_steps=0)
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.train.n_steps, config.optimizer.lr = 5, 1e30
    with pytest.raises(ValueError, match=r"diverged.* at step 3.*optimizer.lr.*goes on from .*2\.ckpt"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert [path.name for path in checkpoints.found(tmp_path)] == ["1.ckpt", "2.ckpt"]
    config.optimizer.lr = 1e-4
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert [line["lr"] for line in log(tmp_path)][2:] == pytest.approx([1e-4] * 3)
    changes = checkpoints.read_meta(tmp_path)["changes"]
    assert changes == [{"step": 2, "set": {"train.n_steps": [2, 5], "optimizer.lr": [0.0015, 1e-4]}}]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pred", "noise"),
        ("process", "vp_cosine"),
        ("loss.weights", "berxit"),
        ("train.batch_size", 16),
        ("train.ema_rate", 0.5),
        ("optimizer.name", "muon"),
        ("uem.name", "time"),
        ("seed", 1),
        ("pretrained_weight", "other.pth"),
        ("dataset.synthetic.n_images", 300),
    ],
)
def test_a_workdir_is_one_experiment(tmp_path, setting, value):
    """Catches a resume that trains nothing, or something else, under the name of another experiment."""
    config = small_config(n_steps=1)
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.train.n_steps = 2
    old = config
    for key in setting.split("."):
        old = old[key]
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ValueError, match=f"{setting} was {old!r} and is {value!r}"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert checkpoints.read_meta(tmp_path)["config"]["train"]["n_steps"] == 1


def test_other_data_under_the_same_name_are_refused(tmp_path, monkeypatch):
    """Catches a resume on a folder whose images were exchanged; a folder that moved is the same data."""
    config = small_config(n_steps=1)
    regime = regimes.pixels(config)
    trainer.fit(config, regime, Run.single(tmp_path))
    config.train.n_steps = 2
    monkeypatch.setattr(regime.dataset(), "pixels", lambda index: torch.zeros(1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(regime.dataset(), "gather", lambda i, *_: (torch.zeros(len(i), 1, 8, 8), torch.zeros(len(i))))
    with pytest.raises(ValueError, match="dataset.path was .*with other data"):
        trainer.fit(config, regime, Run.single(tmp_path))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    """Catches a half-written checkpoint, a temporary file that stays, and an error that names no file."""
    import errno

    config = small_config(n_steps=1)
    run = Run.single(tmp_path)

    def full(value, file):
        file.write(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left.*nnet.pth"):
        patch.setattr(torch, "save", full)
        trainer.fit(config, regimes.pixels(config), run)
    assert not list(tmp_path.glob("**/*.part")) and not checkpoints.found(tmp_path)
    trainer.fit(config, regimes.pixels(config), run)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["1.ckpt"]


def test_best_survives_a_kill_between_save_and_keep(tmp_path, monkeypatch):
    """Catches a best.pth that is lost when the run dies between the two writes: the resumed run writes the same."""
    config = small_config(n_steps=2, eval_interval=1, monitor_samples=8, save_interval=1)
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path / "whole"))
    for name in ("keep_best", "save_state"):
        original, calls = getattr(checkpoints, name), []

        def killed(*args, original=original, calls=calls):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(checkpoints, name, killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(config, regimes.pixels(config), Run.single(tmp_path / name))
        monkeypatch.setattr(checkpoints, name, original)
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path / name))
        a, b = (weights.read_weights(tmp_path / run / "best.pth") for run in ("whole", name))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_kill_within_the_last_save_is_mended(tmp_path, monkeypatch):
    """Catches last.ckpt that points at an older step for ever, and too many checkpoints, as nothing is saved again."""
    config = small_config(n_steps=3, save_interval=1, keep=1)
    sync, names = checkpoints.sync, []

    def killed(folder):
        names.append(folder)
        if len(names) == 3:
            raise KeyboardInterrupt
        sync(folder)

    monkeypatch.setattr(checkpoints, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert (tmp_path / "last.ckpt").resolve().name == "2.ckpt"
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert (tmp_path / "last.ckpt").resolve().name == "3.ckpt"
    assert [path.name for path in checkpoints.found(tmp_path)] == ["3.ckpt"]


def test_a_look_that_is_made_again_leaves_the_checkpoint_complete(tmp_path, monkeypatch):
    """Catches a kill while one step is saved for the second time, which left half a checkpoint, and plans that went."""
    config = small_config(n_steps=1, sample_interval=1)
    run = Run.single(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit), run.stopping:
        patch.setattr(trainer, "look", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        trainer.fit(config, regimes.pixels(config), run)
    folder = tmp_path / "ckpts/1.ckpt"
    (folder / "plan-0.1.json").write_text("{}")
    names = {path.name for path in folder.iterdir()}

    def killed(path, **_):
        (Path(path) / "nnet.pth").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert {path.name for path in folder.iterdir()} == names
    assert torch.load(folder / "step.pth")["looked"] and (tmp_path / "samples/1.png").exists()


def test_a_monitored_run_keeps_what_it_compares(tmp_path):
    """Catches a best.pth chosen among images of two grids, solvers or classes; without a monitor they may change."""
    config = small_config(eval_interval=1)
    meta = {"config": config.to_dict(), "data": "", "depths": None}
    changed = {"sample.grid": "power:2", "sample.labels": (1,), "sample.forecast.every": 2}
    for name, value in (changed | {"sample.dpm_solver_pp_2m.lower_order_final": False}).items():
        now = small_config(eval_interval=1)
        now.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=f"another experiment: {name} was"):
            checkpoints.changes_since(meta, meta | {"config": now.to_dict()}, tmp_path, 1)
        now.train.eval_interval = config.train.eval_interval = 0
        plain = [{"config": one.to_dict(), "data": "", "depths": None} for one in (config, now)]
        assert checkpoints.changes_since(*plain, tmp_path, 1) == []


@pytest.mark.parametrize("setting", ["extractor", "reference"])
def test_a_monitor_that_cannot_judge_is_found_before_training(tmp_path, setting):
    """Catches hours of training that end at the first look."""
    config = small_config(n_steps=2, eval_interval=2)
    config.eval[setting] = "nowhere.npz"
    with pytest.raises(ValueError, match="nowhere.npz"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    assert not (tmp_path / "train.jsonl").exists()


def test_told_to_stop_at_most_the_step_in_flight_is_lost(tmp_path, monkeypatch):
    """Catches a SIGTERM that ends the run without saving what it had logged."""
    config = small_config(n_steps=9, save_interval=50, log_interval=1)
    log_of = Run.log

    def told(run, step, **values):
        log_of(run, step, **values)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", told)
    run = Run.single(tmp_path)
    with pytest.raises(SystemExit) as stopped, run.stopping:
        trainer.fit(config, regimes.pixels(config), run)
    assert stopped.value.code == 143 and int(checkpoints.found(tmp_path)[-1].stem) >= 5
    assert len(log(tmp_path)) <= 6


def test_muon_of_older_checkpoints_is_read(tmp_path):
    """Catches a resume that loses the momentum of runs whose optimiser was two torch optimisers."""
    config = load("digits_uvit_tiny", "quick")
    config.train.n_steps = 1
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    path = tmp_path / "last.ckpt" / "optimizer.pth"
    new = torch.load(path, weights_only=True)
    n, rest = (len(group["params"]) for group in new["param_groups"])
    states = {i: {k: v for k, v in state.items() if k != "use_muon"} for i, state in new["state"].items()}
    parts = [
        {"state": {i: states[i] for i in range(n)}, "param_groups": [{"lr": 0.02, "params": list(range(n))}]},
        {"state": {i: states[n + i] for i in range(rest)}, "param_groups": [{"lr": 0.1, "params": list(range(rest))}]},
    ]
    torch.save({"parts": parts}, path)
    config.train.n_steps = 2
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    after = torch.load(tmp_path / "last.ckpt" / "optimizer.pth", weights_only=True)
    assert [len(group["params"]) for group in after["param_groups"]] == [n, rest]
    assert after["state"][n]["step"] == 2 and "momentum_buffer" in after["state"][0]


def test_resume_refuses_another_network(tmp_path):
    """Catches a workdir that is shared by two different experiments."""
    config = small_config(n_steps=1)
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    config.nnet.embed_dim = 64
    with pytest.raises(ValueError, match="nnet.embed_dim was 32 and is 64.*--workdir"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))


def test_resume_refuses_a_torn_file(tmp_path):
    """The message names the file and what to do."""
    config = small_config(n_steps=1)
    trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))
    path = tmp_path / "ckpts" / "1.ckpt" / "optimizer.pth"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="optimizer.pth cannot be read"):
        trainer.fit(config, regimes.pixels(config), Run.single(tmp_path))


def test_world_size_must_agree(tmp_path, monkeypatch):
    """On a CPU, plain torchrun starts unsynchronised copies of rank 0: that must not train."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        Run.single(tmp_path)


def test_unwritable_workdir():
    """Found before any work starts."""
    with pytest.raises(ValueError, match="workdir /proc/run cannot be written"):
        Run.single("/proc/run")
