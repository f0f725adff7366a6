"""Write one static HTML report on evaluated points: frontiers, verdicts, exits, samples, uncertainty, provenance.

    python -m scripts.report runs/digits/eval
    python -m scripts.report runs/digits/eval runs/digits_small/eval --output compare.html

Reads only files that an evaluation has written. With several directories the first is the reference: everything is
compared with its full-depth point.
"""

import argparse
import json

from libs import report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="directory with results.jsonl")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: report.html in the first DIR)")
    args = parser.parse_args(argv)
    try:
        path = report.write(args.directories, args.output)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps({"report": str(path), "bytes": path.stat().st_size}))


if __name__ == "__main__":
    main()
