"""The released files that scripts.download knows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """One file to have.

    Addresses are tried in order, then mirrors: copies by other people, which nobody compared with the original.
    An address is a URL, `gdrive:ID`, `gdrive-folder:ID/path/of/file` or `hub:OWNER/MODEL`.
    """

    kind: str
    dest: str  # below the assets folder; a folder for what can be fetched only by hand
    about: str
    addresses: Sequence[str] = ()
    mirrors: Sequence[str] = ()
    digest: str | None = None  # published hash, "sha256:HEX" or "md5:HEX"
    size: int | None = None  # bytes, where published
    page: str = ""  # where its authors publish it, for people


# The sizes in its "about" texts are derived from parameter counts (4 bytes each), not measured.
ASSETS = {
    name: Asset(**row) for name, row in json.loads(Path(__file__).with_name("assets.json").read_text("utf-8")).items()
}


def how_to_get(path: str | Path) -> str:
    """ "; python -m scripts.download NAME fetches it", where `path` is a released file's place; "" elsewhere."""
    where = Path(path).as_posix()
    name = next((name for name, asset in ASSETS.items() if asset.dest and f"/{where}".endswith(f"/{asset.dest}")), None)
    return f"; python -m scripts.download {name} fetches it" if name else ""
