"""What scripts.calibrate has stored for the schedule and the calibrated thresholds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

NEEDED = {"schedule": ("t", "layers"), "thresholds": ("edges", "max_u")}


def read_calibration(path: str, part: str, setting: str) -> dict:
    """The `part` ("schedule" or "thresholds") of a calibration file, with the model's exits as "points".

    ValueError, naming `setting`, where there is no such file or it lacks what is needed.
    """
    if not path:
        raise ValueError(f"{setting} is not set; it must name a JSON file of scripts.calibrate")
    try:
        stored = json.loads(Path(path).read_text())
        found = {"points": stored["points"], **{name: stored[part][name] for name in NEEDED[part]}}
    except OSError as error:
        raise ValueError(f"{setting} is {path}, which cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{setting} is {path}, which is no file of scripts.calibrate ({error!r})") from error
    rows, columns = (found[name] for name in NEEDED[part])
    if len(columns) != len(rows) + (part == "thresholds"):
        raise ValueError(f"{setting} is {path}, whose {part} do not fit together: the file is damaged")
    return found


def between(nodes: Sequence[float]) -> list[float]:
    """The middles between ascending nodes: what lies between two of them belongs to the nearer one."""
    return [(a + b) / 2 for a, b in zip(nodes[:-1], nodes[1:], strict=True)]
