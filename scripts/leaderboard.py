"""Append the recommended point of a comparison to docs/leaderboard.md, if it is the fastest so far on its data set.

    python -m scripts.report runs/digits/eval --json runs/digits/numbers.json
    python -m scripts.leaderboard runs/digits/numbers.json

Fast means few seconds against the best plain sampling at that quality, timed in the same run. A file where only evenly
spaced calls were tried for that rival, or whose interval is unknown or includes 1, is refused.
"""

import datetime
import re
from pathlib import Path

import scripts
from libs.files import read_json, write_file
from libs.report.statistics import FEWEST, Estimate
from libs.report.text import sig, signed

BOARD = Path(__file__).resolve().parents[1] / "docs" / "leaderboard.md"


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("leaderboard", __doc__)
    parser.add_argument("numbers", help="JSON file of scripts.report --json or scripts.compare")
    parser.add_argument("--board", type=Path, default=BOARD, metavar="FILE", help="default: docs/leaderboard.md")
    args = parser.parse_args(argv)
    try:
        print(append(args.board, read_json(args.numbers, "numbers")))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def append(board: Path, numbers: dict) -> str:
    """Add a row if it is a record; returns what was done, in a sentence."""
    head, data = numbers.get("headline"), numbers.get("dataset")
    if head is None or not data:
        raise ValueError(
            "the file has no headline or no dataset: nothing was recommended, or it is of an older version"
        )
    if not head["other_grids"]:
        raise ValueError("plain sampling was evaluated on evenly spaced calls only, which is not the rival of a record")
    bounds = head["intervals"]["speedup_over_best_plain"]
    runs = head["training_runs"] if head["training_runs"] > 1 else head["timing_runs"]  # what the interval is over
    if bounds is None or bounds[0] <= 1 or runs < FEWEST:
        raise ValueError(
            f"headline.speedup_over_best_plain is {head['speedup_over_best_plain']} with the interval {bounds}: a "
            f"record needs {FEWEST} runs and an interval above 1"
        )
    text = board.read_text(encoding="utf-8")
    seconds, best = float(sig(1 / head["speedup_over_best_plain"])), record_of(text, data)  # as the board has it
    if best is not None and seconds >= best:
        return f"{sig(seconds)} of the best plain sampling's seconds is no record on {data}: the best is {sig(best)}."
    write_file(board, f"{text.rstrip()}\n{leaderboard_row(head, data, seconds, numbers)}\n")
    return f"{data}: {head['setting']['label']} takes {sig(seconds)} of the best plain sampling's seconds, the record."


def record_of(text: str, data: str) -> float | None:
    """The smallest share of seconds among the rows of a data set; rows without a rival hold no record."""
    found = re.findall(rf"^\| [\d-]+ \| [^|]+ \| {re.escape(data)} \| [^|]+ \| ([\d.]+) ", text, re.M)
    return min(map(float, found), default=None)


def leaderboard_row(head: dict, data: str, seconds: float, numbers: dict) -> str:
    def change(key: str) -> str:
        return (
            "not measured" if head[key] is None else signed(Estimate(head[key], *(head["intervals"][key] or ()), n=3))
        )

    low, high = (1 / bound for bound in reversed(head["intervals"]["speedup_over_best_plain"]))
    even = head["speedup_over_uniform"]
    cells = [
        datetime.date.today().isoformat(),
        str(numbers.get("commit"))[:7],
        data,
        head["setting"]["label"],
        f"{sig(seconds)} [{sig(low)}, {sig(high)}] of {head['best_plain']['label']}",
        change("quality_change_over_best_plain"),
        "not measured" if even is None else sig(1 / even),
        change("quality_change"),
        f"{head['training_runs']} × {head['noise_seeds']}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
