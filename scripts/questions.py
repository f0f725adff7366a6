"""Run the commands behind docs/questions.md, and write the page from what they left.

    python -m scripts.questions Q2 Q33          # run those two; without arguments, all of them
    python -m scripts.questions --list Q2       # print questions and commands, run nothing
    python -m scripts.questions --write         # read the values again where their files are, and write the page

Questions, commands and answers are docs/questions/questions.toml. Commands start in the current folder, the model that
all share first; one that several questions share runs once. Output goes to runs/questions/<question>.log with the
seconds of each command; a command that fails ends its question, and the exit status tells. --write keeps every value
with its date and commit in docs/questions/record.json, and names the questions that were run after their words were
recorded: read those again.
"""

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import scripts
from libs.files import read_json, write_file, write_json

PAGE = Path(__file__).resolve().parents[1] / "docs" / "questions.md"
DATA = PAGE.with_suffix("") / "questions.toml"
EVEN = "calls are evenly spaced: no speed-up here is over the best plain sampling"


def load_questions(path: Path) -> dict[str, dict]:
    """Question -> its entry, with the variables filled into the commands; "model" is what all questions share.

    `file` of an entry is where its values and its table are, but those that name another file.
    """
    with open(path, "rb") as file:
        found = tomllib.load(file)
    variables = found.pop("variables")

    def filled(line: str) -> list[str]:
        return shlex.split(re.sub(r"\$(?:(\w)\b|\{(\w)\})", lambda m: variables[m[1] or m[2]], line))

    for entry in found.values():
        entry["commands"] = [filled(line) for line in entry["commands"]]
        for spec in [*entry.get("values", {}).values(), *([entry["table"]] if "table" in entry else [])]:
            spec.setdefault("file", entry.get("file"))
    return found


# ---- running -------------------------------------------------------------------------------------------------------


def run_commands(name: str, lines: list[list[str]], log: Path, finished: dict[str, str]) -> bool:
    """Run a question's commands but those in `finished` (command -> question); returns whether all succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # `python` is this one
    with log.open("w") as file:
        for words in lines:
            command = shlex.join(words)
            print(f"$ {command}", file=file, flush=True)
            if command in finished:
                print(f"# see {finished[command]}\n", file=file, flush=True)
                continue
            print(f"{name}: {command}", flush=True)
            start = time.perf_counter()
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path})
            said = f"{time.perf_counter() - start:.0f} s, exit status {done.returncode}"
            print(f"# {said}\n", file=file, flush=True)
            print(f"{name}: {said}", flush=True)
            if done.returncode:
                print(f"{name}: see {log}", file=sys.stderr)
                return False
            finished[command] = name
    return True


# ---- the page ------------------------------------------------------------------------------------------------------


def measure(spec: dict) -> float:
    """The number that `spec` names: `file` (results.jsonl by slug; JSON, that of scripts.compare by label), `key`, what
    it is relative to.

    `over`: another key of the file to divide by; `less`: one minus that; `scale`: a factor, 100 for percents.
    """
    if spec["file"].endswith(".jsonl"):
        records = [json.loads(line) for line in Path(spec["file"]).read_text().splitlines()]
        found = {record["slug"]: record["metrics"] for record in records}
    else:
        found = read_json(spec["file"], "file")
        found |= compared(found) if "headline" in found else {}

    def at(keys: list[str]) -> float:
        value = found
        for key in keys:
            there = range(len(value)) if isinstance(value, list) else value
            if key not in there:
                raise ValueError(f"{spec['file']} has no {key!r} of {keys}; it has {', '.join(map(str, there))}")
            value = value[key]
        return float(value)

    value = at(spec["key"]) / (at(spec["over"]) if "over" in spec else 1)
    return (1 - value if spec.get("less") else value) * spec.get("scale", 1)


def compared(found: dict) -> dict[str, dict]:
    """The points of the JSON of scripts.compare by label, with the model in front unless it is the first one."""
    ours = (found["headline"] or {"uniform": found["points"][0]})["uniform"]["model"]
    return {
        point["label"] if point["model"] == ours else f"{point['model']}: {point['label']}": point
        for point in found["points"]
    }


def markdown_table(spec: dict) -> str:
    """Markdown: a file as it is (.md), or points (results.jsonl, or the JSON of scripts.compare) beside the first one.

    `only`: regular expression of the labels that have a row.
    """
    path = Path(spec["file"])
    if path.suffix == ".md":
        return path.read_text().strip()
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        points = [(r["label"], r["metrics"] | {"quality": r["metrics"][r["quality_key"]]}) for r in records]
        seconds = "seconds_per_image"
    else:
        points, seconds = list(compared(read_json(path, "file")).items()), "seconds_relative_to_full"
    _, first = next((pair for pair in points if pair[0] == "full depth"), points[0])
    lines = ["| | layers | GMACs | seconds | Fréchet distance |", "|---|---|---|---|---|"]
    for label, point in points:
        if re.search(spec.get("only", ""), label):
            shares = [f"{point[key] / first[key]:.2f}" for key in ("gmacs", seconds)]
            lines.append(f"| {label} | {point['mean_depth']:.2f} | {' | '.join(shares)} | {point['quality']:.2f} |")
    return "\n".join(lines)


def refresh(questions: dict[str, dict], record: dict[str, dict], folder: Path, now: dict[str, str]) -> dict[str, dict]:
    """The record with values, tables and pictures read again where all files of a question are there."""
    fresh = {}
    for name, entry in questions.items():
        old, specs = record.get(name, {"values": {}}), entry.get("values", {})
        fresh[name] = dict(old)
        if specs and all(Path(spec["file"]).is_file() for spec in specs.values()):
            values = {key: float(f"{measure(spec):.6g}") for key, spec in specs.items()}
            if values != old.get("values"):
                fresh[name] |= now | {"values": values}
        spec = entry.get("table")
        if spec and Path(spec["file"]).is_file() and markdown_table(spec) != old.get("table"):
            fresh[name] |= now | {"table": markdown_table(spec)}
        picture = entry.get("picture")
        if picture and Path(picture["file"]).is_file():
            target = folder / Path(picture["file"]).name
            if not target.is_file() or target.read_bytes() != Path(picture["file"]).read_bytes():
                shutil.copyfile(picture["file"], target)
                fresh[name]["picture"] = now
    return fresh


def questions_page(questions: dict[str, dict], record: dict[str, dict]) -> str:
    """The document: an index (question, answer, number), then every question with its answer first, and its table."""
    names = [name for name in questions if name != "model"]
    texts = {name: filled(questions[name], record[name]) for name in names}
    rows = [
        f"| [{name}](#{anchor(name, questions[name]['ask'])}) | {questions[name]['ask']} | {texts[name]['short']} | "
        f"{texts[name]['number']} |"
        for name in names
    ]
    parts = [
        questions["model"]["introduction"].strip(),
        "| | Question | Answer | Number |\n|---|---|---|---|\n" + "\n".join(rows),
    ]
    for name in names:
        entry, text, kept = questions[name], texts[name], record[name]
        parts += [f"## {name}. {entry['ask']}", f"{text['short']}. {text['answer']}"]
        parts += [kept["table"]] if "table" in entry else []
        if picture := entry.get("picture"):
            drawn = kept.get("picture", kept)
            parts.append(f"![{picture['alt']}](questions/{Path(picture['file']).name})")
            parts.append(f"*{picture['alt']}. Drawn {drawn['date']} at {drawn['commit']}.*")
        even = f"; {EVEN}" if entry["even"] else ""
        parts.append(f"Where: {entry['where']} Recorded {kept['date']} at {kept['commit']}{even}.")
    return "\n\n".join(parts) + "\n"


def filled(entry: dict, kept: dict) -> dict[str, str]:
    return {key: entry[key].format(**kept.get("values", {})) for key in ("short", "number", "answer")}


def anchor(name: str, ask: str) -> str:
    """GitHub's anchor of the heading."""
    return re.sub(r"[^\w\- ]", "", f"{name}. {ask}".lower()).replace(" ", "-")


def commit() -> str:
    words = ["git", "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PAGE.parent)
    return done.stdout.strip() or "unknown"


def write_questions(logs: Path) -> list[str]:
    """Refresh the record, write the page; returns the questions whose words are older than their last run."""
    questions = load_questions(DATA)
    path = DATA.with_name("record.json")
    now = {"date": datetime.date.today().isoformat(), "commit": commit()}
    record = refresh({k: v for k, v in questions.items() if k != "model"}, read_json(path, "record"), DATA.parent, now)
    write_json(path, record)
    write_file(PAGE, questions_page(questions, record))

    def last_run(name: str) -> str:
        log = logs / f"{name}.log"
        return datetime.date.fromtimestamp(log.stat().st_mtime).isoformat() if log.is_file() else ""

    return [name for name in record if last_run(name) > record[name]["date"]]


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("questions", __doc__)
    parser.add_argument("questions", nargs="*", metavar="Q", help="default: all")
    parser.add_argument("--list", action="store_true", help="print questions and commands, run nothing")
    parser.add_argument("--write", action="store_true", help="write docs/questions.md, run nothing")
    parser.add_argument("--logs", type=Path, default=Path("runs/questions"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    known = load_questions(DATA)
    model = known.pop("model")["commands"]
    if unknown := [name for name in args.questions if name not in known]:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(known)}")
    wanted = {name: known[name] for name in args.questions or known}
    if args.write:
        for name in write_questions(args.logs):
            print(f"{name}: was run after its words were recorded; read them again")
        print(PAGE)
        return
    if args.list:
        for name, entry in wanted.items():
            lines = [shlex.join(words) for words in model + entry["commands"]] if args.questions else []
            print("\n    ".join([f"{name}  {entry['ask']}", *lines]))
        return
    lines, finished = {"model": model} | {name: entry["commands"] for name, entry in wanted.items()}, {}
    sys.exit(not all([run_commands(name, lines[name], args.logs / f"{name}.log", finished) for name in lines]))


if __name__ == "__main__":
    main()
