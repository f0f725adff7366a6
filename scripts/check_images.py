"""List the images of a folder or zip file that cannot be read, one line each.

    python -m scripts.check_images FOLDER

Reads every image as training with dataset.name=images does. Exits with 1 if there is one that cannot be read.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

import scripts
from libs.data.images import ImageFolder


def main(argv: list[str] | None = None) -> int:
    parser = scripts.parser("check_images", __doc__)
    parser.add_argument("path", metavar="FOLDER", help="a folder or zip file of images, at any depth")
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="that decode images (default: 4)")
    options = parser.parse_args(argv)
    try:
        images = ImageFolder(path=options.path, resolution=1, labels=False)
    except ValueError as error:
        parser.error(str(error))
    faults = 0
    with ThreadPoolExecutor(max(1, options.threads)) as pool, tqdm(total=len(images), unit="image") as bar:
        for start in range(0, len(images), 1024):
            rows = range(start, min(start + 1024, len(images)))
            for fault in filter(None, pool.map(images.fault, rows)):
                print(fault, flush=True)
                faults += 1
            bar.update(len(rows))
    print(f"{faults} of {len(images)} images cannot be read", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
