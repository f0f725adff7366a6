"""scripts.report by another name, for many evaluations: prints its sentences, and writes its numbers beside the page.

python -m scripts.compare excess=runs/excess-{0,1,2}/eval small=runs/small-{0,1,2}/eval --output compare.html
"""

from scripts.report import write_page


def main(argv: list[str] | None = None) -> None:
    path, sentences = write_page(argv, "compare")
    print("\n".join([*sentences, str(path)]))


if __name__ == "__main__":
    main()
