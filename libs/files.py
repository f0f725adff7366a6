"""Files that are complete or absent, and files that others made: every error names the file."""

import errno
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np


def umask() -> int:
    """The process's file mode mask. Reading it sets it for a moment, which other threads would see."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = umask()  # mkstemp ignores it


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", sync: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path`; when the block ends well it replaces `path`, otherwise nothing is left.

    The bytes are on the disk (fsync) before the name is, unless `sync` is False: for many files at once, followed by
    one `os.sync()`. `mode` is "w" (UTF-8 text), "wb" or "w+b". A process that is killed leaves the temporary file, see
    `remove_parts`.

    Raises:
        OSError: the disk is full or the folder is read-only; `filename` is `path`, not the temporary file.
    """
    path = Path(path)
    part = None
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            os.chmod(part, 0o666 & ~UMASK)
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if part is not None:
            with suppress(FileNotFoundError):
                os.unlink(part)


def write_file(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write a whole file atomically (see `atomic_write`)."""
    with atomic_write(path, "w" if isinstance(content, str) else "wb", sync) as file:
        file.write(content)


def write_json(path: str | Path, value) -> None:
    """Write `value` atomically. NaN and infinity are refused with a ValueError: they are not JSON."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def remove_parts(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed; nobody may be writing to `folder`."""
    for part in Path(folder).glob(".*.part"):
        part.unlink(missing_ok=True)


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file to read its bytes.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device, which might keep the reader waiting for ever.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would block in open already
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))
    return open(handle, "rb")


def read_bytes(path: str | Path, setting: str) -> bytes:
    """The content of a file that somebody else may have made; `setting` names it in errors, as for `read_json`.

    Raises:
        ValueError: the file is absent or not readable; the message names it.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"{setting} is {str(path)!r}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read: {first_line(error)}") from None


def read_text(path: str | Path, setting: str) -> str:
    """The content of a UTF-8 text file, with or without a byte order mark; errors as for `read_bytes`.

    Raises:
        ValueError: also where the text has another encoding.
    """
    data = read_bytes(path, setting)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{setting} is {str(path)!r}, which is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}): "
            "save it again as UTF-8"
        ) from None


def read_lines(path: str | Path, setting: str) -> list[str]:
    """The lines of a text file that hold something, without the blanks around them; errors as for `read_text`.

    Only line feeds (and the carriage returns before them) end a line: form feeds and Unicode's own line separators
    belong to it.
    """
    lines = (line.strip() for line in read_text(path, setting).split("\n"))
    return [line for line in lines if line]


def read_json(path: str | Path, setting: str, kind: type = dict):
    """The value of a JSON file that somebody else may have made.

    Args:
        setting: the setting or flag that names the file; it stands in every error.
        kind: the type that the outermost value must have.

    Raises:
        ValueError: the file is absent, not readable, not JSON, or holds another type; the message names the file.
    """
    text = read_text(path, setting)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read as JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{setting} is {str(path)!r}, which holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: str | Path) -> str:
    """The first 16 digits of a file's sha256; a file that has not changed since is not read again."""
    stat = Path(path).stat()
    return hash_once(str(path), stat.st_mtime_ns, stat.st_size)


@cache
def hash_once(path: str, changed: int, size: int) -> str:
    """Weights are large, and every point asks."""
    return sha256(path)[:16]


def first_line(error: Exception) -> str:
    """What an error says, in one line and without a file's name; its kind where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__


def read_npz(
    path: str | Path, setting: str, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz file that somebody else may have made, and the `optional`; nothing pickled is read.

    Raises:
        ValueError: the file is absent, damaged, or lacks an array; the message names the file.
    """
    data = read_bytes(path, setting)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            arrays = {name: archive[name] for name in (*names, *optional) if name in archive.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        raise ValueError(f"{setting} is {str(path)!r}, which is no readable npz file: {first_line(error)}") from None
    if missing:
        raise ValueError(f"{setting} is {str(path)!r}, which lacks the arrays {', '.join(missing)}")
    return arrays
