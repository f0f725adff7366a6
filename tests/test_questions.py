"""docs/questions.md: every question has a command that would start, and the page is what its data say."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from libs.evaluation.sweep import read_entry
from scripts import questions

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = questions.load_questions(questions.DATA)
RECORD = json.loads(questions.DATA.with_name("record.json").read_text())
NAMES = [f"Q{n}" for n in range(1, 48)]


def test_every_question_is_there():
    """Catches a question that was dropped, or that has no command, place, answer or date."""
    assert list(QUESTIONS) == ["model", *NAMES] and list(RECORD) == NAMES
    for name in NAMES:
        entry, kept = QUESTIONS[name], RECORD[name]
        assert entry["commands"] and entry["where"] and entry["answer"] and entry["short"].startswith("**"), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"]) and kept["commit"], name
        assert set(kept["values"]) == set(entry.get("values", {})), name
        assert ("table" in kept) == ("table" in entry), name


def test_the_page_is_what_the_data_say():
    """Catches a page that was edited by hand, or that is older than the numbers it quotes."""
    assert questions.PAGE.read_text() == questions.questions_page(QUESTIONS, RECORD), (
        "run python -m scripts.questions --write"
    )


def test_the_page_answers_first():
    """Catches answers after commands, pictures that are not there, links of the index that lead nowhere."""
    text = questions.PAGE.read_text()
    index, *sections = re.split(r"^## ", text, flags=re.M)
    assert len(sections) == len(NAMES) and "```" not in text and "python eval.py" not in text
    for name, section in zip(NAMES, sections, strict=True):
        heading, answer = section.split("\n\n")[:2]
        assert heading.startswith(f"{name}. ") and answer.startswith("**"), name
        assert f"](#{questions.anchor(name, QUESTIONS[name]['ask'])})" in index, name
    for picture in re.findall(r"!\[.+\]\((.+)\)", text):
        assert (questions.PAGE.parent / picture).is_file(), picture
    assert text.count(questions.EVEN) == sum(QUESTIONS[name]["even"] for name in NAMES)


@pytest.mark.parametrize("name", QUESTIONS)
def test_commands_would_start(name):
    """Catches commands with files, settings, flags or sweep entries that do not exist."""
    for words in QUESTIONS[name]["commands"]:
        if words[0] == "/usr/bin/time":
            words = words[2:]
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
            continue
        if words[0] == "cp":
            assert len(words) == 3, words
            continue
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
                    read_entry(entry)
        else:
            assert key in flags_of(module), (module, key)


def flags_of(module: str) -> list[str]:
    sources = [(ROOT / f"{name.replace('.', '/')}.py").read_text() for name in ("utils", module)]
    return re.findall(r'DEFINE_\w+\(\s*"(\w+)"', "".join(sources))


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Folder with an own questions.toml, and nothing of the real one."""
    data = tmp_path / "docs" / "questions" / "questions.toml"
    data.parent.mkdir(parents=True)
    monkeypatch.setattr(questions, "DATA", data)
    monkeypatch.setattr(questions, "PAGE", tmp_path / "docs" / "questions.md")
    monkeypatch.chdir(tmp_path)
    return data


def test_values_are_read_from_the_files(document, capsys):
    """Catches numbers that stay as they were after their files were written anew, or dates that do not change."""
    spec = '{ file = "results.jsonl", key = ["fast", "seconds"], over = ["slow", "seconds"], less = true, scale = 100 }'
    document.write_text(
        '[variables]\nC = "x"\n[model]\nintroduction = "# T"\ncommands = []\n'
        '[Q1]\nask = "Is it fast?"\nshort = "**Yes**"\neven = true\n'
        'number = "{less:.0f} %"\ncommands = ["a"]\nwhere = "There."\nanswer = "It saves {less:.0f} %."\n'
        f'values.less = {spec}\npicture = {{ file = "runs/p.png", alt = "A picture" }}\n'
    )
    record = {"date": "2020-01-01", "commit": "abc", "values": {"less": 10.0}}
    document.with_name("record.json").write_text(json.dumps({"Q1": record}))
    questions.main(["--write"])
    assert "It saves 10 %." in questions.PAGE.read_text() and "2020-01-01 at abc" in questions.PAGE.read_text()

    lines = [{"slug": slug, "metrics": {"seconds": s}} for slug, s in (("fast", 1.0), ("slow", 4.0))]
    Path("results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("runs/questions").mkdir(parents=True)
    Path("runs/p.png").write_bytes(b"picture")
    questions.main(["--write"])
    text = questions.PAGE.read_text()
    assert "| 75 % |" in text and "It saves 75 %." in text and "2020-01-01" not in text
    assert document.with_name("p.png").read_bytes() == b"picture" and "![A picture](questions/p.png)" in text
    with pytest.raises(ValueError, match="has no 'slower'"):
        questions.measure({"file": "results.jsonl", "key": ["slower", "seconds"]})

    document.with_name("record.json").write_text(json.dumps({"Q1": record | {"values": {"less": 75.0}}}))
    Path("runs/questions/Q1.log").write_text("ran")
    capsys.readouterr()
    questions.main(["--write"])
    assert "Q1: was run after its words were recorded" in capsys.readouterr().out


def test_tables_are_read_from_the_files(tmp_path):
    """Catches shares of another row than full depth, and rows that were not asked for."""
    metrics = {"gmacs": 2.0, "seconds_per_image": 4.0, "mean_depth": 3.0, "fd": 5.0}
    half = {key: value / 2 for key, value in metrics.items()}
    lines = [("full depth", metrics), ("threshold 0.98", half), ("schedule", half)]
    records = [json.dumps({"label": label, "metrics": m, "quality_key": "fd"}) for label, m in lines]
    (tmp_path / "results.jsonl").write_text("\n".join(records))
    share = "seconds_relative_to_full"
    same = [{"label": label, "quality": m["fd"], share: m["seconds_per_image"] / 4, **m} for label, m in lines]
    points = [point | {"model": "big"} for point in same[::-1]] + [same[0] | {"model": "small"}]
    found = {"points": points[::-1], "headline": {"uniform": {"model": "big"}}}
    (tmp_path / "frontier.json").write_text(json.dumps(found))
    (tmp_path / "levels.md").write_text("| a |\n")
    for name in ("results.jsonl", "frontier.json"):
        rows = questions.markdown_table({"file": str(tmp_path / name), "only": "^threshold"}).splitlines()[2:]
        assert rows == ["| threshold 0.98 | 1.50 | 0.50 | 0.50 | 2.50 |"]
    (row,) = questions.markdown_table({"file": str(tmp_path / "frontier.json"), "only": "^small"}).splitlines()[2:]
    assert row == "| small: full depth | 3.00 | 1.00 | 1.00 | 5.00 |"
    spec = {"file": str(tmp_path / "frontier.json"), "key": ["small: full depth", "quality"]}
    assert questions.measure(spec) == 5.0
    assert questions.markdown_table({"file": str(tmp_path / "levels.md")}) == "| a |"


def test_runner(document, capsys):
    """Catches a failure that goes unnoticed, what runs after one or twice, and variables that are not filled in."""
    one = "'''python -c 'print(\"${C}:small $C\")''''"
    document.write_text(
        f'[variables]\nC = "x.py"\n[model]\ncommands = ["python -c \'print(1)\'"]\n[Q1]\ncommands = [{one}]\n'
        f'[Q2]\ncommands = [{one}, "python -c 1/0", "python -c 3"]\n'
    )
    with pytest.raises(SystemExit) as exit:
        questions.main([])
    assert exit.value.code == 1
    logs = {path.stem: path.read_text() for path in Path("runs/questions").iterdir()}
    assert "\nx.py:small x.py\n" in logs["Q1"] and "exit status 0" in logs["Q1"]
    assert "# see Q1" in logs["Q2"] and "ZeroDivisionError" in logs["Q2"] and "-c 3" not in logs["Q2"]
    with pytest.raises(SystemExit):
        questions.main(["Q3"])
    assert "Q3: there are Q1, Q2" in capsys.readouterr().err
