"""docs/questions.md: every question has a command, and every command would start."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from libs.points import parse

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/questions.md").read_text()
SECTIONS = dict(re.findall(r"^## (Q\d+)\. (.*?)(?=^## |\Z)", TEXT, re.M | re.S))
WITHOUT_COMMAND = {"Q13"}  # there is no U-Net
VARIABLES = dict(re.findall(r"^([CW])=(.*)$", TEXT, re.M))


def commands(section: str) -> list[list[str]]:
    """The lines of its code blocks as arguments, variables filled in."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.S) for line in block.splitlines()]
    return [shlex.split(re.sub(r"\$([CW])", lambda m: VARIABLES[m[1]], line)) for line in lines]


def test_every_question_is_there():
    """Catches a question that was dropped, or that has no command, place or answer."""
    assert list(SECTIONS) == [f"Q{n}" for n in range(1, 35)]
    for name, section in SECTIONS.items():
        assert bool(commands(section)) == (name not in WITHOUT_COMMAND), name
        assert "\nPrinted: " in section and "\nOn the digits: " in section, name


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in WITHOUT_COMMAND])
def test_commands_would_start(name):
    """Catches commands with files, settings, flags or sweep entries that do not exist."""
    for words in commands(SECTIONS[name]):
        if words[0] == "/usr/bin/time":
            words = words[2:]
        assert words[0] == "python"
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        if any(word.startswith("--config=") for word in words):
            check_settings(module, words[2 if words[1] != "-m" else 3 :])


def check_settings(module: str, arguments: list[str]) -> None:
    values = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    file = Path(values["config"])
    assert (ROOT / file).is_file(), file
    config = importlib.import_module(f"configs.{file.stem}").get_config()
    for key, value in values.items():
        if key.startswith("config."):
            node = config
            for part in key.split(".")[1:]:
                node = node[part]
            if key == "config.eval.sweep":
                for entry in ast.literal_eval(value):
                    parse(entry)
        else:
            assert key in flags_of(module), (module, key)


def flags_of(module: str) -> list[str]:
    sources = [(ROOT / f"{name.replace('.', '/')}.py").read_text() for name in ("utils", module)]
    return re.findall(r'DEFINE_\w+\(\s*"(\w+)"', "".join(sources))
