"""The tables of level skipping (Giladi, Meir, Kawar and Elad) on the networks that scripts/digits_levels.sh trains.

    python -m scripts.digits_levels runs/levels
    python -m scripts.digits_levels runs/levels --steps 1000 --ours 20 40 100 200 1000 --ddim 10 20 50 100 1000

FOLDER has the runs plain, zero, duplicate, interpolate, control and matched. Prints Markdown and writes it to
FOLDER/levels.md; numbers are in FOLDER/levels.json, where an interrupted call goes on. One CPU process. The second line
has the published numbers of steps: hours.
"""

from pathlib import Path

import scripts
from libs.analysis.levels import markdown, tables
from libs.files import atomic_write


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("digits_levels", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=100, help="DDPM steps of the first table; default: %(default)s")
    parser.add_argument("--ours", type=int, nargs="+", default=[20, 40, 100, 200], help="steps with exits")
    parser.add_argument("--ddim", type=int, nargs="+", default=[10, 20, 50, 100], help="steps without")
    parser.add_argument("--images", type=int, default=512, help="per noise seed; default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="rounds of timing; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        text = markdown(tables(**vars(args)))
    except ValueError as error:
        parser.error(str(error))
    with atomic_write(args.folder / "levels.md", "w") as file:
        file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
