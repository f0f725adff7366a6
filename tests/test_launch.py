"""Several processes: what accelerate's own launcher makes of our files, and what is refused before anything starts."""

import os
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from test_configs import load

import utils
from libs import regimes, trainer
from libs.run import Run

ROOT = Path(__file__).resolve().parents[1]
FILES = {"1-gpu": (1, 1), "4-gpus": (1, 4), "8-gpus": (1, 8), "2-nodes": (2, 16)}


def parsed(*arguments):
    """What `accelerate launch` makes of its arguments."""
    return _validate_launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))[0]


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_files(name):
    """Catches a key that accelerate does not know, and a file that starts another number of processes than it says."""
    assert {path.stem for path in ROOT.glob("configs/accelerate/*.yaml")} == set(FILES)
    path = str(ROOT / f"configs/accelerate/{name}.yaml")
    config = load_config_from_file(path)
    assert (config.num_machines, config.num_processes) == FILES[name]
    arguments = parsed("--config_file", path)
    assert arguments.num_processes == FILES[name][1] and arguments.mixed_precision == "fp16"
    assert bool(arguments.multi_gpu) == (FILES[name][1] > 1) and not arguments.use_fsdp and not arguments.use_deepspeed


@pytest.mark.parametrize(
    "machines, processes, file", [(1, 4, "4-gpus"), (1, 2, "8-gpus"), (1, 8, "8-gpus"), (2, 16, "2-nodes")]
)
def test_the_launcher_takes_the_files(machines, processes, file, tmp_path):
    """Catches a launcher with another file than its processes need, or whose own numbers lose against the file."""
    weights = tmp_path / "weights.pth"
    weights.touch()
    several = {"MACHINES": machines, "PROCESSES": processes, "MACHINE_RANK": 1, "MAIN_IP": "10.0.0.1"}
    environment = os.environ | {key: str(value) for key, value in several.items()} | {"NNET": str(weights)}
    stubs = 'accelerate() { echo "$@"; }; python() { :; }; export -f accelerate python; '
    stubs += "bash scripts/launch.sh eval cifar10"
    done = subprocess.run(["bash", "-c", stubs], cwd=ROOT, env=environment, capture_output=True, text=True)
    words = done.stdout.split()
    assert words[:1] == ["launch"], done.stderr
    arguments = parsed(*words[1 : words.index("eval.py")])
    assert arguments.config_file == f"configs/accelerate/{file}.yaml"
    assert (int(arguments.num_machines), int(arguments.num_processes)) == (machines, processes)
    assert machines == 1 or (int(arguments.machine_rank), arguments.main_process_ip) == (1, "10.0.0.1")


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_shards_are_refused_by_name(kind, tmp_path, monkeypatch):
    """Without this, the average of the weights holds one process's shard, and so does what is saved."""
    shards = {
        "FSDP": "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n",
        "DeepSpeed": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n",
    }
    path = tmp_path / "config.yaml"
    common = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 2\nmachine_rank: 0\nuse_cpu: false\n"
    path.write_text(common + "main_process_port: 0\nmixed_precision: bf16\n" + shards[kind])
    arguments = parsed("--config_file", str(path))
    if kind == "FSDP":
        environment = prepare_multi_gpu_env(arguments)
    else:
        arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` sets it before it gets here
        _, environment = prepare_deepspeed_cmd_env(arguments)
    changed = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    for key, value in changed.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"asks for {kind}.*MULTI_GPU.*8-gpus.yaml"):
        utils.make_accelerator(load("digits_uvit_tiny", "quick"), tmp_path)


def test_what_processes_share(tmp_path):
    """Catches an option that training replaces, and processes that give up while one measures for an hour."""
    config = load("digits_uvit_tiny", "quick")
    config.train.depths, config.mixed_precision = "random", "no"  # as the processes before it, on any machine
    run = Run(tmp_path, utils.make_accelerator(config, tmp_path))
    trainer.fit(config, regimes.pixels(config), run)
    options = run.accelerator.ddp_handler.to_kwargs()
    shared = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    assert options == shared | {"find_unused_parameters": True}
    assert run.accelerator.init_handler.timeout == timedelta(hours=24)


@pytest.mark.parametrize("call", ["source scripts/environment.sh", "set -e; source scripts/environment.sh; exit 0"])
def test_a_failed_install_is_tried_again(call, tmp_path):
    """Catches an environment that counts as complete although pip was cut off."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "scripts" / "environment.sh").write_text((ROOT / "scripts" / "environment.sh").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "not all installed" in done.stderr
    assert not (tmp_path / ".venv" / "installed").exists()
