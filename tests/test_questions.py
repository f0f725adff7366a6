"""docs/questions.md: every question has a command, and every command would start."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from libs.evaluation.sweep import parse
from scripts import questions

ROOT = Path(__file__).resolve().parents[1]
TEXT = questions.DOCUMENT.read_text()
SECTIONS = questions.sections(TEXT)
COMMANDS = questions.commands(TEXT)


def test_every_question_is_there():
    """Catches a question that was dropped, or that has no command, place or answer."""
    head, *names = SECTIONS
    assert head == "" and names == [f"Q{n}" for n in range(1, 35)]
    for name in names:
        section = SECTIONS[name]
        assert COMMANDS[name], name
        assert "\nPrinted: " in section and "\nOn the digits: " in section, name


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_would_start(name):
    """Catches commands with files, settings, flags or sweep entries that do not exist."""
    for words in COMMANDS[name]:
        if words[0] == "/usr/bin/time":
            words = words[2:]
        assert words[0] == "python"
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        if any(word.startswith("--config=") for word in words):
            check_settings(module, words[2 if words[1] != "-m" else 3 :])


def check_settings(module: str, arguments: list[str]) -> None:
    values = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    file, _, presets = values["config"].partition(":")
    assert (ROOT / file).is_file(), file
    config = importlib.import_module(f"configs.{Path(file).stem}").get_config(presets)
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


def test_runner(tmp_path, monkeypatch, capsys):
    """Catches a failure that goes unnoticed, what runs after one or twice, and variables that are not filled in."""
    document = tmp_path / "questions.md"
    one = "python -c 'print(\"${C}:small $C\")'"
    lines = ["C=x.py", "python -c 'print(1)'"], [one], [one, "python -c 1/0", "python -c 3"]
    blocks = ["```bash\n" + "\n".join(block) + "\n```\n" for block in lines]
    document.write_text(f"# Title\n{blocks[0]}\n## Q1. One\n{blocks[1]}\n## Q2. Two\n{blocks[2]}\n")
    monkeypatch.setattr(questions, "DOCUMENT", document)
    with pytest.raises(SystemExit) as exit:
        questions.main(["--logs", str(tmp_path / "logs")])
    assert exit.value.code == 1
    logs = {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert "\nx.py:small x.py\n" in logs["Q1"] and "exit status 0" in logs["Q1"]
    assert "# see Q1" in logs["Q2"] and "ZeroDivisionError" in logs["Q2"] and "-c 3" not in logs["Q2"]
    with pytest.raises(SystemExit):
        questions.main(["Q3"])
    assert "Q3: there are Q1, Q2" in capsys.readouterr().err
