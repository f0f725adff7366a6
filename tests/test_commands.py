"""The commands as people type them: a real run from training to report, and mistakes that end in one clear line."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from absl import app, flags
from conftest import finished
from ml_collections import config_flags
from test_training import CONFIG, SMALL, finish, start

import utils
from configs import base
from libs import checkpoints as weights
from libs import regimes, trainer
from libs.evaluation import evaluate as evaluator
from libs.evaluation.sweep import read_entry

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ["--config.nnet.embed_dim=32", "--config.nnet.depth=4", "--config.mixed_precision=no"]
SAMPLING = [
    "--config.sample.n_samples=32",
    "--config.sample.mini_batch_size=16",
    "--config.sample.sample_steps=4",
    "--config.eval.timing_runs=1",
    "--config.eval.timing_batch=4",
    "--config.eval.fewer_steps=(2,)",
    "--config.eval.fixed=(2,)",
    "--config.eval.sweep=()",
    "--config.eval.seeds=(1,2)",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    finish(start("train.py", f"--config={CONFIG}", f"--workdir={workdir}", *SMALL, "--config.train.n_steps=3"))
    return workdir


@pytest.mark.slow
def test_train_evaluate_report(trained):
    """The README's steps: every point is measured, full depth is exact, the report holds every point."""
    checkpoint, out = trained / "last.ckpt", trained / "eval"
    flags = [f"--config={CONFIG}", f"--nnet_path={checkpoint}", f"--output_path={out}", *NETWORK, *SAMPLING]
    finished(trained / "log", "eval.py", *flags, "--exit_threshold=0.999,0.9", "--is_train=False")
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["family"] for r in records] == ["full", "threshold", "threshold", "fixed", "steps"]
    full, tight, loose, fixed, fewer = (r["metrics"] for r in records)
    assert full["psnr"] == 100 and full["mean_depth"] == 5 and fixed["mean_depth"] == 2
    assert loose["mean_depth"] <= tight["mean_depth"] <= 5
    assert records[4]["nfe"] == 2 and fewer["gmacs"] == pytest.approx(full["gmacs"] / 2)
    for metrics in (r["metrics"] for r in records):
        assert metrics["seconds_per_image"] > 0 and len(metrics["fd_digits_cnn_per_seed"]) == 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("points/*/quality.json")}
    finished(trained / "log", "eval.py", *flags, "--exit_threshold=0.999,0.9")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "finished points are not measured again"
    line = json.loads(finished(trained / "log-report", "-m", "scripts.report", str(out))[-1])
    page = Path(line["report"]).read_text()
    assert all(record["label"].split()[-1] in page for record in records)


@pytest.mark.slow
def test_sample(trained, tmp_path):
    """Catches --n that is not there, and the evaluation's list of thresholds that refuses a set of images."""
    flags = [f"--config={CONFIG}", f"--nnet_path={trained / 'last.ckpt'}", *NETWORK, f"--output={tmp_path}"]
    command = ["-m", "scripts.sample", *flags, "--n=3", "--labels=1", "--config.sample.sample_steps=2"]
    (summary,) = (line for line in finished(trained / "sample.log", *command) if line.startswith("{"))
    assert json.loads(summary)["images"] == 3
    noted = json.loads((tmp_path / "sample.json").read_text())["images"]
    assert {i: image["label"] for i, image in noted.items()} == {"0": 1, "1": 1, "2": 1}


def mistakes(tmp_path, trained):
    good = str(trained / "last.ckpt")
    truncated, text, pickled = (tmp_path / name for name in ("truncated.pth", "text.pth", "pickled.pth"))
    whole = (trained / "last.ckpt" / "nnet_ema.pth").read_bytes()
    truncated.write_bytes(whole[: len(whole) // 2])
    text.write_text("<html>quota exceeded</html>")
    torch.save({"model": Path("x")}, pickled)
    uvit = tmp_path / "uvit.pth"
    weights.write_weights(weights.export(weights.read_weights(good), "uvit"), uvit)
    (tmp_path / "empty").mkdir()
    evaluate = ["eval.py", f"--config={CONFIG}", *NETWORK, *SAMPLING]
    train = ["train.py", f"--config={CONFIG}", *SMALL]
    return [
        ([*train, "--config.train.batchsize=3"], "--config.train.batchsize: there is no such setting; did you mean"),
        (["train.py", "--config=configs/digit_uvit_tiny.py"], "did you mean configs/digits_uvit_tiny.py?"),
        ([*train, "--workdr=x"], "workdir"),
        (["train.py"], "--config is missing"),
        ([*train, "--config.train.grad_clip=-1"], "train.grad_clip is -1.0; it must be a number, at least 0"),
        ([*train, "--config.train.ema_rate=2"], "train.ema_rate is 2.0"),
        ([*train, "--config.train.n_steps=-5"], "train.n_steps is -5"),
        ([*train, "--config.train.accumulate=0"], "train.accumulate is 0"),
        ([*train, "--config.train.batch_size=0"], "train.batch_size is 0"),
        ([*train, "--config.eval.seeds=()"], "eval.seeds is ()"),
        ([*train, "--config.nnet.points=('a',)", "--dry_run"], "nnet.points is ('a',)"),
        ([*train, "--config.sample.labels=('a',)"], "labels are ['a']"),
        ([*train, "--config.eval.seeds=(1,1)"], "eval.seeds is (1, 1)"),
        ([*train, "--config.eval.seeds=(99,)"], "eval.selection_seed, 99"),
        ([*train, f"--config.eval.seeds=({10**23},)"], "eval.seeds is (1000"),
        ([*train, "--config.exit.name=treshold", "--dry_run"], "did you mean threshold?"),
        ([*train, "--config.optimizer.name=muonn", "--dry_run"], "did you mean muon?"),
        ([*train, "--config.sample.algorithm=ddimm"], "sample.algorithm is 'ddimm'"),
        ([*evaluate, f"--nnet_path={good}", "--config.exit.name=full", "--exit_threshold=0.9"], "exit.name is 'full'"),
        (
            [
                *train,
                "--config.dataset.name=images",
                f"--config.dataset.path={tmp_path}/empty",
                f"--workdir={tmp_path}/a",
            ],
            "empty",
        ),
        ([*train, "--workdir=/proc/nowhere"], "workdir /proc/nowhere cannot be written"),
        ([*train, f"--pretrained_weight={text}", f"--workdir={tmp_path}/b"], "text.pth cannot be read as weights"),
        ([*evaluate], "--nnet_path is missing"),
        ([*evaluate, f"--nnet_path={good}", "--exit_threshold=0"], "--exit_threshold=0: it is a certainty"),
        ([*evaluate, f"--nnet_path={good}", "--exit_threshold=0.9,nan"], "--exit_threshold=nan: it is a certainty"),
        ([*evaluate, f"--nnet_path={good}", "--exit_threshold=1.2"], "--exit_threshold=1.2: it is a certainty"),
        ([*evaluate, f"--nnet_path={truncated}"], "truncated.pth"),
        ([*evaluate, f"--nnet_path={pickled}"], "pickled.pth cannot be read as weights"),
        ([*evaluate, f"--nnet_path={uvit}"], "--pretrained_weight"),
        ([*evaluate, f"--nnet_path={good}", "--config.nnet.embed_dim=64"], "in the file"),
        ([*evaluate, f"--nnet_path={good}", "--plan=x.json", "--config.exit.name=fixed"], "exit.name are given"),
        ([*evaluate, f"--nnet_path={good}", "stray"], "stray"),
    ]


def in_process(arguments, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a train or eval command, run here: no seconds of imports each time."""
    script, *rest = arguments
    monkeypatch.setattr(utils, "FLAGS", flags.FlagValues())
    for module, name in [
        (config_flags, "config_file"),
        *((flags, name) for name in ("bool", "string", "float", "list", "alias")),
    ]:
        define = partial(getattr(module, f"DEFINE_{name}"), flag_values=utils.FLAGS)
        monkeypatch.setattr(module, f"DEFINE_{name}", define)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    kind = "train" if script.startswith("train") else "eval"
    work = trainer.fit if kind == "train" else evaluator.evaluate
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    try:
        utils.launch(work, regimes.pixels, kind)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        monkeypatch.undo()
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_mistakes_end_in_one_clear_line(tmp_path, trained, capsys):
    """Each names the setting, the value and what is allowed, and ends with a failure code, not with a traceback."""
    for arguments, message in mistakes(tmp_path, trained):
        with pytest.MonkeyPatch.context() as patch:
            code, _, err = in_process(arguments, patch, capsys)
        assert code == 2 and message in err, (arguments, code, err[-2000:])
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err


@pytest.mark.slow
def test_a_mistake_as_a_process():
    """The same through a real start: no traceback, one line, a failure code."""
    process = start("eval.py", f"--config={CONFIG}", "--config.train.batchsize=3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.splitlines() == [
        "error: --config.train.batchsize: there is no such setting; did you mean train.batch_size?"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["sample.sample_steps=3", "sample.forecast.every=2", "exit.fixed.layer=1"])
def test_what_a_plan_holds_is_refused(setting, tmp_path):
    """Catches images of a plan under the name of a setting that it ignored."""
    weights = f"--nnet_path={ROOT / 'assets' / 'released' / 'digits.safetensors'}"
    process = start("-m", "scripts.sample", weights, "--budget=0.15", f"--output={tmp_path}", f"--config.{setting}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and f"--config.{setting.partition('=')[0]} are given" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scripts.calibrate", "--budget=0.5", "--nodes=keep", "--objective=teacher"], "leave --objective out"),
        (["scripts.calibrate", "--budget=0.5", "--bins=10"], "--bins=10 is of the thresholds"),
        (
            ["scripts.sample", "--n=1", "--config.eval.thresholds=(0.5,)"],
            "--config.eval.thresholds is of an evaluation",
        ),
    ],
)
def test_flags_without_effect_are_refused(command, message, tmp_path):
    """Catches a flag that is given and changes nothing."""
    weights = f"--nnet_path={ROOT / 'assets' / 'released' / 'digits.safetensors'}"
    process = start("-m", *command, weights, f"--output={tmp_path}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and message in err


@pytest.mark.slow
def test_help_names_every_flag(tmp_path):
    """Catches a --help without flags, or that ends as a failure."""
    out = "\n".join(finished(tmp_path / "log", "eval.py", "--help"))
    assert all(f"--{name}" in out for name in ("config", "nnet_path", "output", "exit_threshold", "dry_run")), out


@pytest.mark.slow
def test_weights_know_their_experiment(trained, monkeypatch, capsys):
    """The run's folder is enough for a command: catches a network of one's own that must be retyped everywhere."""
    code, out, _ = in_process(["eval.py", f"--nnet_path={trained}", "--dry_run"], monkeypatch, capsys)
    assert code == 0 and "nnet.embed_dim = 32" in out and re.search(r"after +5 of 5 layers", out)


def test_statistics_of_other_data_are_left_out(monkeypatch, capsys):
    """Catches photos that are scored against CIFAR-10 without a word."""
    seen = []
    monkeypatch.setattr(utils, "dry_run", lambda config: seen.append(config.eval.reference))
    own = "assets/fid_stats/fid_stats_cifar10_train_pytorch.npz"
    given = {
        "": own,
        "name=cifar10": own,
        "name=images --config.eval.reference=mine.npz": "mine.npz",
        "name=images": "",
    }
    for chosen, reference in given.items():
        more = f"--config.dataset.{chosen}".split() if chosen else []
        command = ["train.py", "--config=configs/cifar10_uvit_small.py", "--config.dataset.images.resolution=32", *more]
        with monkeypatch.context() as patch:
            code, _, err = in_process([*command, "--dry_run"], patch, capsys)
        assert (code, seen.pop()) == (0, reference), err
        assert ("statistics of cifar10, is left out, as dataset.name is images" in err) == (reference == "")


def test_dry_run(tmp_path, monkeypatch, capsys):
    """Prints what was chosen and its cost, not what was not, and leaves nothing behind.

    It left out forecasts, and refused a setting in front of the experiment.
    """
    command = ["train.py", "--config.sample.forecast.every=2", f"--config={CONFIG}", f"--workdir={tmp_path}/run"]
    command += ["--dry_run"]
    code, out, _ = in_process(command, monkeypatch, capsys)
    assert code == 0 and "parameters" in out and re.search(r"after +3 of 3 layers", out)
    assert "optimizer.name = 'muon'" in out and "time_bank" not in out and len(out.splitlines()) < 80
    assert "sample.forecast.every = 2" in out
    assert not (tmp_path / "run").exists()


def options() -> dict:
    return json.loads((ROOT / "tests/golden/public_settings.json").read_text())


@pytest.mark.parametrize("setting", options())
def test_public_settings(setting, tmp_path, monkeypatch, capsys):
    """Catches a setting of the public configs that is unknown here, or accepted with a value that means nothing."""
    for value in options()[setting]:
        value = tuple(value) if isinstance(value, list) else value
        command = ["train.py", f"--config={CONFIG}", f"--config.{setting}={value}", f"--workdir={tmp_path}"]
        monkeypatch.setattr(utils, "dry_run", lambda config: print("accepted"))
        with monkeypatch.context() as patch:
            code, out, err = in_process([*command, "--dry_run"], patch, capsys)
        instead = base.PUBLIC.get(setting) or base.PUBLIC.get(f"{setting}={value}")
        assert (code, err.strip().endswith(instead)) == (2, True) if instead else "accepted" in out, (value, err)


def test_what_public_settings_became_is_there():
    """Catches a message that names a setting that was renamed since, and a row about a setting that came back."""
    known = {*utils.setting_names(base.config().to_dict()), *(f"nnet.{key}" for key in ("clip_dim", "num_classes"))}
    for public, instead in base.PUBLIC.items():
        assert "=" in public or public not in known
        assert set(re.findall(r"(?:[a-z_]+\.)+[a-z_]+", instead)) <= known, instead


def test_public_and_other_files(tmp_path, monkeypatch, capsys):
    """A config file of the public code, or one without all settings, ended as an AttributeError."""
    path = tmp_path / "cifar10.py"
    for line, message in (("c.z_shape = (4, 32, 32)", "z_shape: there is no such setting here"), ("", "starts from")):
        path.write_text(
            f"from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict()\n    {line}\n"
            "    return c\n"
        )
        code, _, err = in_process(["train.py", f"--config={path}"], monkeypatch, capsys)
        assert code == 2 and message in err


def test_a_wrong_script_says_the_right_one():
    """Catches a launcher that ends with the shell's own error, names of U-ViT's scripts without an answer, and a
    download that there is not."""
    env = os.environ | {"PROCESSES": "1", "PRECISION": "no", "NNET": "assets/cifar10.pth"}
    for arguments, message in (
        (["train_ldm_discrete.py"], "are train_ldm.py and eval_ldm.py here"),
        (["train", "cifar"], "it is one of celeba64, cifar10"),
        (["eval"], "it is one of celeba64, cifar10"),
        (["eval", "cifar10"], "no weights at assets/cifar10.pth; train first"),
    ):
        command = ["bash", "scripts/launch.sh", *arguments]
        process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert process.returncode == 2 and message in process.stderr, process.stderr
    with pytest.raises(ValueError, match="train_ldm.py.*train_ldm_discrete.py"):
        regimes.pixels(utils.load_experiment("configs/imagenet256_uvit_large.py"))


def test_readme_commands_exist():
    """Catches a README that names a file, flag or script that is gone."""
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:scripts|configs|libs)/[\w/]+\.(?:sh|py)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (scripts\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (ROOT / image).exists(), image


@pytest.mark.slow
def test_readme_six_lines(trained, tmp_path, monkeypatch):
    """Catches the first lines that a user types from Python going out of date."""
    code = re.search(r"```python\n(from libs import Sampler.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "demo").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert names["images"].depth.shape == (8, 16) and (tmp_path / "three.png").stat().st_size > 0


@pytest.fixture
def scripts(tmp_path) -> Path:
    """A copy of the shell scripts whose python and accelerate print what they are given."""
    shutil.copytree(
        ROOT / "scripts", tmp_path / "scripts", ignore=lambda _, names: [n for n in names if ".sh" not in n]
    )
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "accelerate"):
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (binaries / name).chmod(0o755)
    (binaries / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (binaries / "nvidia-smi").chmod(0o755)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def shell(scripts: Path, name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{scripts / '.venv' / 'bin'}:{os.environ['PATH']}", **variables}
    return subprocess.run(["sh", f"scripts/{name}", *flags], cwd=scripts, env=env, capture_output=True, text=True)


SHELL = sorted(path.name for pattern in ("train_*.sh", "eval_*.sh") for path in (ROOT / "scripts").glob(pattern))


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts(name, scripts):
    """By sh, without a GPU, without weights, and with them: catches 62 lines under a launcher, and a lost setting."""
    assert "PRECISION=no PROCESSES=1" in shell(scripts, name).stderr
    two = dict(PRECISION="fp16", PROCESSES="2")
    missing = shell(scripts, name, **two)
    remedy = "python -m scripts.download" if name.startswith("train") else "scripts/train_"
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1 and remedy in missing.stderr
    job, config = (
        name.split("_")[0],
        re.search(r"configs/(\w+)\.py", shell(scripts, name, **two, **there(scripts)).stdout)[1],
    )
    assert (ROOT / "configs" / f"{config}.py").is_file()
    many = shell(scripts, name, "--seed=1", **two, **there(scripts))
    assert many.returncode == 0 and re.match(rf"accelerate launch .*--num_processes 2 .*{job}\w*\.py", many.stdout)
    assert "--seed=1" in many.stdout and ("lr=" in many.stdout) == (name[6:-3] in ("cifar10", "celeba64", "imagenet64"))
    one = shell(scripts, name, PRECISION="no", PROCESSES="1", **there(scripts))
    assert re.match(rf"python {job}\w*\.py --config=", one.stdout)
    if job == "train":
        scratch = shell(scripts, name, PRETRAINED="", **two)
        assert f"--workdir=workdir/{config}-scratch" in scratch.stdout and "pretrained" not in scratch.stdout


def test_comparison_script(scripts):
    """Catches settings that no sweep knows, a training seed that is left out, and plans that are made and not run."""
    more = ["--config.dataset.name=images", "--config.sample.n_samples=64"]
    done = subprocess.run(
        ["bash", "scripts/comparison.sh", "digits", "out", *more],
        cwd=scripts, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in done.stdout.splitlines()]
    started = [call for call in calls if any(a.startswith("--config=") for a in call)]
    assert started and all("--config.dataset.name=images" in call for call in started)
    assert {[a for a in call if "n_samples=" in a][-1] for call in started} == {"--config.sample.n_samples=64"}
    sweeps = [ast.literal_eval(a.partition("=")[2]) for call in calls for a in call if "eval.sweep=" in a]
    assert len(sweeps) == 9 and all(len(methods) == len(set(methods)) for methods in sweeps)
    for entry in (entry for sweep in sweeps for entry in sweep):
        read_entry(entry)
    searched = [call for call in calls if "scripts.calibrate" in call and "--nodes=keep" not in call]
    own = [call for call in searched if "--config=configs/digits_uvit_tiny.py" in call]
    asked = [a for call in own for a in call if a.startswith("--budget=")]
    fitted = [a.partition("=")[2] for call in calls if "scripts.fit_rivals" in call for a in call if "kind=" in a]
    assert sum(f"{kind}.path" in entry for kind in fitted[:2] for entry in sweeps[0]) == 2 and len(fitted) == 6
    plans = [[entry for entry in sweep if entry.startswith("plan=")] for sweep in sweeps[::3]]
    assert len(asked) == 3 and len(plans[0]) == sum(len(a.split(",")) for a in asked)
    assert plans[0] == plans[1] == plans[2] and len(searched) == 7  # made once, and twice for each other network
    others = [call for call in calls if any(a.endswith((":small,exit0", ":plain,exit0")) for a in call)]
    assert sum("train.py" in call for call in others) == 6 and sum("-ends.json" in str(sweep) for sweep in sweeps) == 9
    directories = [a.partition("=")[2] for a in calls[-1] if a.endswith("/eval")]
    assert len(directories) == 9 and set(directories) < set(calls[-2])
    assert "benchmarks/results/frontier-digits-cpu.json" in calls[-1]
    for arguments, message in (
        (["moons"], "digits, digits-deep, fashion or cifar10"),
        (["digits", "out"], "out holds a comparison with other settings"),  # its plans would have been taken
        (["digits", "new", "--config.train.n_steps=9"], "train.n_steps"),
    ):
        wrong = subprocess.run(
            ["bash", "scripts/comparison.sh", *arguments], cwd=scripts, capture_output=True, text=True
        )
        assert wrong.returncode == 2 and message in wrong.stderr


def there(scripts: Path) -> dict[str, str]:
    (scripts / "weights.pth").touch()
    return dict(PRETRAINED="weights.pth", NNET="weights.pth")
