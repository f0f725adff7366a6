"""Download released weights and reference statistics into assets/.

    python -m scripts.download --list
    python -m scripts.download cifar10_uvit_small fid_stats_cifar10
    python -m scripts.download --all-of fid_stats --root /data/assets

A download that stops is continued by the same command. A file appears under its name only when it is whole and
verified; many processes may ask for it at once and one of them downloads. Where no hash was published, the hash of
the first download is kept beside the file (`sha256sum -c` reads it) and every later run compares with it.

Exit status: 0 when every file asked for is in place, 1 when one is not, 2 for a mistake on the command line.
"""

import argparse
import difflib
import sys
from pathlib import Path

import scripts
from libs.checkpoints.assets import ASSETS
from libs.checkpoints.download import DownloadError, bytes_so_far, fetch, say


def listing(root: Path) -> str:
    """The table for people: name, kind, state, destination, what it is."""
    from huggingface_hub import try_to_load_from_cache

    rows = [("NAME", "KIND", "STATE", "DESTINATION", "WHAT")]
    for name, asset in ASSETS.items():
        dest = root / asset.dest
        part = bytes_so_far(dest.with_name(f"{dest.name}.part"))
        if hub := next((a.removeprefix("hub:") for a in asset.addresses if a.startswith("hub:")), None):
            there = isinstance(try_to_load_from_cache(hub, "config.json"), str)
        else:
            there = dest.exists()
        state = "present" if there else f"{part / 1e6:.0f} MB so far" if part else "-"
        rows.append((name, asset.kind, state, asset.dest, asset.about))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = scripts.parser("download", __doc__)
    kinds = sorted({asset.kind for asset in ASSETS.values()})
    parser.add_argument("names", metavar="NAME", nargs="*", help="what to download (see --list)")
    parser.add_argument("--all-of", metavar="KIND", choices=kinds, help="everything of a kind: " + ", ".join(kinds))
    parser.add_argument("--list", action="store_true", help="print the table and what is already there")
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("assets"), help="default: assets")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=30, help="longest silence (default: 30)")
    parser.add_argument("--retries", metavar="N", type=int, default=5, help="attempts without progress (default: 5)")
    options = parser.parse_args(arguments)
    for name in set(options.names) - set(ASSETS):
        near = difflib.get_close_matches(name, ASSETS, n=3, cutoff=0.4) or [n for n in ASSETS if name in n]
        meant = f"Did you mean {', '.join(near)}? " if near else ""
        parser.error(f"there is no asset named {name!r}. {meant}--list shows all names.")
    if not options.list and not options.names and not options.all_of:
        parser.error("name what to download, or use --all-of KIND or --list.")
    if not (options.timeout > 0 and options.retries >= 1):
        parser.error(f"--timeout must be positive and --retries at least 1, not {options.timeout}, {options.retries}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options, failed = parse(arguments), []
    if options.list:
        print(listing(options.root))
    chosen = [*options.names, *(n for n, asset in ASSETS.items() if asset.kind == options.all_of)]
    for name in dict.fromkeys(chosen):
        try:
            say(f"{name}: in place, {fetch(name, options.root, timeout=options.timeout, retries=options.retries)}")
        except KeyboardInterrupt:
            say(f"\n{name}: stopped. What came so far is kept; the same command continues.")
            return 130
        except (DownloadError, OSError) as error:
            say(str(error) if isinstance(error, DownloadError) else f"{name}: {error}. What came so far is kept.")
            failed.append(name)
    if failed:
        say(f"Not in place: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
