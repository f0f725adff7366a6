"""Where images lie: a folder or a zip file. Both list names in one order and read one file at a time."""

import os
import re
import warnings
import zipfile
from collections.abc import Sequence

from libs.files import first_line, open_regular

LARGEST = 2**30  # bytes of one image file; a small zip may claim to hold more than the memory


class Folder:
    """Files below a folder.

    Links to files and folders are followed, and every folder is read once: a link to one that is read under another
    name, such as a parent, is left out with a warning.
    """

    def __init__(self, path: str):
        self.path = path

    def names(self, extensions: tuple[str, ...]) -> list[str]:
        """Visible files with these extensions, as paths with "/" from the folder, in natural order."""
        names, seen = [], set()
        links = [""]  # folders below self.path that are still to be read; what is no link goes first
        while links:
            start = links.pop(0)
            for folder, inner, files in os.walk(os.path.join(self.path, start), onerror=refuse):
                below = os.path.relpath(folder, self.path).replace(os.sep, "/")
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    inner.clear()
                    warnings.warn(f"{folder} leads to a folder that is read already; it is left out.", stacklevel=2)
                    continue
                seen.add((status.st_dev, status.st_ino))
                inner[:] = sorted(name for name in inner if visible(name))
                links += [f"{below}/{name}" for name in inner if os.path.islink(os.path.join(folder, name))]
                names += [file if below == "." else f"{below}/{file}" for file in files]
        return with_extension(names, extensions)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return os.path.join(self.path, name)

    def read(self, name: str) -> bytes:
        return read_file(self.where(name))


class Zip:
    """Files in a zip archive, read without unpacking it, from any number of processes."""

    def __init__(self, path: str):
        self.path = path
        self._open = None  # (process id, archive)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_open": None}

    def _archive(self) -> zipfile.ZipFile:
        # A forked worker inherits the file descriptor *and its position*, which parent and siblings move: each process
        # opens the archive for itself.
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except Exception as error:  # zipfile raises many kinds on damaged archives
                raise ValueError(f"{self.path} cannot be read as a zip file: {first_line(error)}.") from error
        return self._open[1]

    def names(self, extensions: tuple[str, ...]) -> list[str]:
        """Visible files with these extensions, in natural order."""
        return with_extension(self._archive().namelist(), extensions)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}:{name}"

    def read(self, name: str) -> bytes:
        archive = self._archive()
        try:
            size = archive.getinfo(name).file_size
            if size > LARGEST:
                raise ValueError(f"it would be {size} bytes unpacked, more than {LARGEST}")
            return archive.read(name)
        except Exception as error:  # damaged, encrypted, compressed in another way: zipfile and zlib raise many kinds
            raise ValueError(f"{self.where(name)} cannot be read: {first_line(error)}.") from error


def open_storage(path: str) -> Folder | Zip | None:
    """The folder or zip file at `path`; None when it is neither."""
    if os.path.isdir(path):
        return Folder(path)
    # is_zipfile would wait for ever for a pipe
    return Zip(path) if os.path.isfile(path) and zipfile.is_zipfile(path) else None


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises ValueError, with its name, for what is no file, too large or not readable."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST:
                raise ValueError(f"it has {size} bytes, more than {LARGEST}")
            return file.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}.") from error


def refuse(error: OSError) -> None:
    """Without this, os.walk leaves out what it may not list."""
    raise ValueError(f"{error.filename} cannot be listed: {error}.") from error


def with_extension(names: Sequence[str], extensions: tuple[str, ...]) -> list[str]:
    """Names that end in one of the extensions (in any case) with no hidden part, in natural order, each once."""
    names = [name for name in names if name.lower().endswith(extensions) and all(map(visible, name.split("/")))]
    return sorted(set(names), key=natural)


def visible(part: str) -> bool:
    return not part.startswith(".") and part != "__MACOSX"


def natural(name: str) -> tuple[str, str]:
    """Sort key of a path: folder by folder, numbers by value; the name itself settles 1 against 01."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name).replace("/", "\0"), name
