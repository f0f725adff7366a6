"""Write one self-contained HTML page on one or many evaluations: pictures, the claim with its interval, the frontier.

    python -m scripts.report runs/digits/eval
    python -m scripts.report mine=runs/mine-{0,1,2}/eval small=runs/small-{0,1,2}/eval --output all.html --json all.json

Reads only files that evaluations have written. Directories that share a NAME are training seeds of one model; without
names, directories are put together if their weights were trained with the same settings but for the seed. Seconds are
shares of what full depth of the first directory takes. scripts.compare is the same command.
"""

import json
from pathlib import Path

import scripts
from libs import report


def main(argv: list[str] | None = None) -> None:
    path, _ = write_page(argv, "report")
    print(json.dumps({"report": str(path), "bytes": path.stat().st_size}))


def write_page(argv: list[str] | None, command: str) -> tuple[Path, list[str]]:
    """Parse the arguments and write the files; the page's path and its sentences."""
    default = {"report": "report.html", "compare": "comparison.html"}[command]
    parser = scripts.parser(command, __doc__)
    parser.add_argument("directories", nargs="+", metavar="[NAME=]DIR", help="directory with results.jsonl")
    parser.add_argument("--output", metavar="FILE", help=f"the page, .html (default: {default} in the first DIR)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers: headline, verdicts, every point")
    args = parser.parse_args(argv)
    names, directories = zip(*(name_and_directory(text) for text in args.directories), strict=True)
    output = Path(args.output or Path(directories[0]) / default)
    if output.suffix != ".html":
        parser.error(f"--output={output}: the page needs a name that ends in .html")
    numbers = args.json or (output.with_suffix(".json") if command == "compare" else None)
    try:
        found = report.load_report(directories, names)
        found.write(output)
        if numbers:
            found.write_numbers(numbers)
        return output, found.sentences()
    except (ValueError, OSError) as error:
        parser.error(str(error))


def name_and_directory(text: str) -> tuple[str | None, str]:
    """A path may hold "=" itself: what exists is a directory."""
    name, found, directory = text.partition("=")
    return (None, text) if not found or Path(text).is_dir() else (name, directory)


if __name__ == "__main__":
    main()
