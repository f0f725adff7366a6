"""Time the points of several evaluations in one interleaved run, so that their seconds can be compared.

    python -m scripts.time_together runs/excess-0/eval runs/small-0/eval
    python -m scripts.report runs/excess-0/eval runs/small-0/eval

Seconds within one evaluation are measured in turn; those of two evaluations are not, and the machine may have been
slower during one of them. Loads every directory's config and weights, measures nothing but seconds, and writes
timing.json into each directory; scripts.report uses it where all its directories were timed together.
"""

import json
from pathlib import Path

import scripts
from libs.evaluation.timing import time_together


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("time_together", __doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="directory with config.json of an evaluation")
    parser.add_argument("--runs", type=int, default=5, help="rounds through all points, after one to warm up")
    args = parser.parse_args(argv)
    try:
        if args.runs < 1:
            raise ValueError(f"--runs={args.runs}: at least 1 is needed")
        print(json.dumps(time_together([Path(text) for text in args.directories], args.runs)))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
