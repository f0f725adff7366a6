"""The report: evaluation directories in, one static HTML file out. Reads files only; needs numpy and matplotlib.

`read` turns files into points, `verdict` turns points into sentences, `plots` into figures, `page` into HTML.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from libs.report.page import render
from libs.report.read import Evaluation, Point, read

__all__ = ["Evaluation", "Point", "read", "render", "write"]


def write(directories: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report on one or more evaluation directories and return its path.

    The first directory is the reference: its full-depth point is what everything is compared with, and
    `<first>/report.html` is the default output. Raises ValueError, naming file and line, where a file is malformed.
    """
    html = render(read(directories))
    output = Path(output) if output is not None else Path(directories[0]) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, output)
    return output
