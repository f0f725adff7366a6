"""Files that are complete or absent, and files that others made: every error names the file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; when the block ends well it replaces `path`, otherwise nothing is left.

    The bytes are on the disk (fsync) before the name is. `mode` is "w" (UTF-8 text) or "wb".

    Raises:
        OSError: the disk is full or the folder is read-only; `filename` is `path`, not the temporary file.
    """
    path = Path(path)
    part = None
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            os.chmod(part, 0o666 & ~umask())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if part is not None:
            with suppress(FileNotFoundError):
                os.unlink(part)


def umask() -> int:
    """The process's file mode mask, which mkstemp ignores."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value) -> None:
    """Write `value` atomically. NaN and infinity are refused with a ValueError: they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def read_json(path: str | Path, setting: str, kind: type = dict):
    """The value of a JSON file that somebody else may have made.

    Args:
        setting: the setting or flag that names the file; it stands in every error.
        kind: the type that the outermost value must have.

    Raises:
        ValueError: the file is absent, not readable, not JSON, or holds another type; the message names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{setting} is {str(path)!r}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read as JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{setting} is {str(path)!r}, which holds a {type(value).__name__}, not a {kind.__name__}")
    return value
