"""The commands of docs/reproduction.md: files, settings and downloads that they name exist."""

import ast
import re
from pathlib import Path

import pytest
from test_configs import load

from libs.checkpoints.assets import ASSETS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "reproduction.md").read_text()
COMMANDS = re.findall(r"`((?:train|eval)\w*\.py --config=configs/[^`]*)`", TEXT)


def test_commands_are_found():
    """Catches a change of the page's form that leaves nothing to check."""
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """Catches a renamed config, a mistyped setting, a value of the wrong type, an unknown flag, a file not offered."""
    script, first, *flags = command.split()
    assert (ROOT / script).is_file()
    config = load(Path(first.removeprefix("--config=")).stem)
    for flag in flags:
        name, value = re.fullmatch(r"--([\w.]+)=(\S+)", flag).groups()
        if name.startswith("config."):
            *path, last = name.removeprefix("config.").split(".")
            node = config
            for part in path:
                node = node[part]
            kind = type(node[last])
            with node.unlocked():
                node[last] = value if kind is str else ast.literal_eval(value)
        else:
            assert name in ("nnet_path", "pretrained_weight", "workdir", "output_path", "exit_threshold")
        if name == "nnet_path" and "/uvit/" in value:
            assert value.removeprefix("assets/") in {asset.dest for asset in ASSETS.values()}
        if name == "exit_threshold":
            assert 0 < float(value) < 1
