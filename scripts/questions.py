"""Run the commands of docs/questions.md and keep what they print.

    python -m scripts.questions Q2 Q33          # those two; without arguments, all of them
    python -m scripts.questions --list

Commands start in the current folder, in the document's order, the model that all of them share first; one that several
questions share runs once. Output goes to runs/questions/<question>.log with the seconds that each command took; a
command that fails ends its question, and the exit status tells.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "questions.md"


def sections(text: str) -> dict[str, str]:
    """Name -> text, "" for what stands before the first question."""
    head, *rest = re.split(r"^## (Q\d+)\. ", text, flags=re.M)
    return {"": head} | dict(zip(rest[::2], rest[1::2], strict=True))


def commands(text: str) -> dict[str, list[list[str]]]:
    """Question -> its commands as arguments, with the variables of the document's head filled in."""
    variables = dict(re.findall(r"^(\w)=(.*)$", text, re.M))

    def lines(section: str) -> list[str]:
        blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
        return [line for block in blocks for line in block.splitlines() if not re.match(r"\w=", line)]

    def filled(line: str) -> list[str]:
        return shlex.split(re.sub(r"\$(?:(\w)\b|\{(\w)\})", lambda m: variables[m[1] or m[2]], line))

    return {name: [filled(line) for line in lines(section)] for name, section in sections(text).items()}


def run(name: str, lines: list[list[str]], log: Path, finished: dict[str, str]) -> bool:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.questions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="Q", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the questions and run nothing")
    parser.add_argument("--logs", type=Path, default=Path("runs/questions"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    text = DOCUMENT.read_text()
    known = commands(text)
    if unknown := [name for name in args.questions if name not in known or not name]:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(filter(None, known))}")
    if args.list:
        print("\n".join(f"{name}  {section.splitlines()[0]}" for name, section in sections(text).items() if name))
        return
    wanted = args.questions or [name for name in known if name]
    lines, finished = {"model": known[""]} | {name: known[name] for name in wanted}, {}
    results = [run(name, lines[name], args.logs / f"{name}.log", finished) for name in lines]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
