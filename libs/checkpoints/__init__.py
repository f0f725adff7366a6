"""Weight files of all known kinds, and the training state that a resumed run needs."""

from __future__ import annotations

from libs.checkpoints.files import about, file_of, read, settled, write
from libs.checkpoints.infer import ASSUMED, infer
from libs.checkpoints.layouts import LAYOUTS, complete, export, kind, to_ours
from libs.checkpoints.load import check_config, check_fit, flags, known, load

__all__ = [
    "ASSUMED",
    "LAYOUTS",
    "about",
    "check_config",
    "check_fit",
    "complete",
    "export",
    "file_of",
    "flags",
    "infer",
    "kind",
    "known",
    "load",
    "read",
    "settled",
    "to_ours",
    "write",
]
