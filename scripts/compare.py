"""Which method wins at equal seconds: one sentence per budget, one figure and one table, from evaluation directories.

    python -m scripts.compare runs/excess/eval runs/paper/eval runs/small/eval --output compare.html
    python -m scripts.compare excess=runs/excess-{0,1,2}/eval small=runs/small-{0,1,2}/eval

Directories that share a NAME are training seeds of one model. Without names, directories are put together if their
weights were trained with the same settings but for the seed. The first directory's full depth is what the budgets are
shares of. Writes the page, and the numbers beside it as JSON; prints the sentences.
"""

import argparse
from pathlib import Path

from libs import comparison


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="[NAME=]DIR", help="directory with results.jsonl")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: comparison.html in the first DIR)")
    args = parser.parse_args(argv)
    names, directories = zip(*(name_and_directory(text) for text in args.directories), strict=True)
    output = Path(args.output or Path(directories[0]) / "comparison.html")
    if output.suffix != ".html":
        parser.error(f"--output={output}: the page needs a name that ends in .html")
    try:
        sentences = comparison.write(directories, names, output)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join([*sentences, str(output)]))


def name_and_directory(text: str) -> tuple[str | None, str]:
    """A path may hold "=" itself: what exists is a directory."""
    name, found, directory = text.partition("=")
    return (None, text) if not found or Path(text).is_dir() else (name, directory)


if __name__ == "__main__":
    main()
