"""Released files: gdown and huggingface_hub bring them; a file has its name only when it is whole and verified."""

import hashlib
import os
import re
import sys
import time
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock, Timeout

from libs.checkpoints.assets import ASSETS, Asset
from libs.files import atomic_write, umask

PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses worth another try at the same address


class DownloadError(Exception):
    """The file is not in place; the message says why and what to do."""


class Refused(Exception):
    """These bytes are not the file, or this address does not give it: go on to the next one."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fetch(name: str, root: Path | str = "assets", *, timeout: float = 30, retries: int = 5) -> Path:
    """Have the file of `ASSETS[name]` below `root`, verified; returns its path.

    A download that stopped is continued; of many processes that ask at once, one downloads.

    Args:
        timeout: the longest silence of a host, seconds.
        retries: attempts without progress before the next address is tried.

    Raises:
        DownloadError: no address gave the file; the message says what was tried and what to do by hand.
        OSError: the disk is full or the folder is read-only; what came so far is kept.
    """
    asset, tried = ASSETS[name], []
    dest = Path(root) / asset.dest
    addresses = [*asset.addresses, *asset.mirrors]
    if addresses and addresses[0].startswith("hub:"):
        return from_hub(name, addresses[0].removeprefix("hub:"))
    if not addresses and dest.is_dir() and any(dest.iterdir()):
        return dest
    if dest.is_file():
        return verify_in_place(dest, asset)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with locked(dest):
        if dest.is_file():  # another process was faster
            return verify_in_place(dest, asset)
        remove_parts_of(dest.with_name(f".{dest.name}.sha256."))  # of a process that was killed while it wrote the hash
        # What came so far is worth more than the order. If it is no part of the file, its address has its turn again.
        for address in [a for a in addresses if bytes_so_far(part_path(dest, a))] + addresses:
            whole = part_path(dest, address)
            begun = bytes_so_far(whole)
            say(f"{name}: from {address}" + (f", continuing at byte {begun}" if begun else ""))
            try:
                receive(address, whole, name, timeout, retries)
                check_download(whole, dest, asset, address)  # records the hash before the file appears
            except Refused as error:
                whole.unlink(missing_ok=True)
                say(f"{name}: {error}")
                tried.append(f"  tried {address}: {error}")
                continue
            if address in asset.mirrors and not asset.digest:
                say(f"{name}: NOTE this copy is a mirror; that it equals the original was not verified")
            os.replace(whole, dest)
            remove_parts_of(dest.with_name(f"{dest.name}.part"))
            return dest
    why = "no address gave the file." if tried else "this cannot be downloaded by a program."
    verb = "save it as" if addresses else "save its files in"
    page = re.sub("^gdrive:", "https://drive.google.com/open?id=", addresses[0] if addresses else asset.page)
    raise DownloadError(
        "\n".join([f"{name}: {why}", *tried])
        + f"\n  By hand: open {page} (or see {asset.page}), {verb} {dest}, then run this again to check it."
    )


def receive(address: str, whole: Path, name: str, timeout: float, retries: int) -> None:
    """Bring `address` to the file `whole`. Progress renews the attempts; raises `Refused` when they are used up."""
    try:
        import gdown
        import requests
        from gdown.exceptions import DownloadError as Stopped
    except ImportError:
        raise DownloadError(f"{name}: this needs gdown 6.3 or later (pip install -U gdown).") from None
    furthest, failures, options = bytes_so_far(whole), 0, dict(use_cookies=False, timeout=timeout)
    while not whole.exists():
        try:
            scheme, _, rest = address.partition(":")
            folder, _, path = rest.partition("/")
            if scheme == "gdrive-folder":
                files = gdown.download_folder(id=folder, skip_download=True, quiet=True, **options)
                ids = {file.path: file.id for file in files}
                if path not in ids:
                    raise Refused(f"the Drive folder holds {sorted(ids) or 'nothing'}, not {path!r}")
                rest = ids[path]
            url = f"https://drive.google.com/uc?id={rest}" if scheme.startswith("gdrive") else address
            quiet = not sys.stderr.isatty()
            gdown.download(url, str(whole), quiet=quiet, resume=True, retries=retries - 1, **options)
            whole.chmod(0o666 & ~umask())
        except (Stopped, requests.RequestException) as error:
            reason, status = " ".join(str(error).split()), getattr(getattr(error, "response", None), "status_code", 0)
            elsewhere = "byte range" in reason  # gdown's words: the host ignores ranges, or has another file by now
            if elsewhere:
                remove_parts_of(whole)
            if bytes_so_far(whole) > furthest:
                furthest, failures = bytes_so_far(whole), 0
            else:
                failures += 1
                if failures >= retries or not (elsewhere or status in PASSING):
                    raise Refused(reason) from None
                time.sleep(2**failures)
            say(f"{name}: {reason}; trying again")


def from_hub(name: str, repository: str) -> Path:
    """A model of the Hugging Face hub, into that library's own cache, where `from_pretrained` finds it offline."""
    try:
        from huggingface_hub import snapshot_download

        # Other formats would double the download.
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "model.safetensors"]))
    except Exception as error:  # the library raises its own, requests', httpx' and OSError kinds, by version
        raise DownloadError(
            f"{name}: the hub did not give {repository} ({type(error).__name__}: {error}).\n  By hand: run "
            f"`hf download {repository}` on a machine with access and copy its cache (HF_HOME, ~/.cache/huggingface)."
        ) from None


def part_path(dest: Path, address: str) -> Path:
    """Where the bytes of `address` go: those of two addresses must never be joined."""
    return dest.with_name(f"{dest.name}.part-{zlib.crc32(address.encode()):08x}")


def bytes_so_far(whole: Path) -> int:
    """Bytes that have come: gdown's unfinished file has eight more characters and .part behind its name."""
    return sum(part.stat().st_size for part in whole.parent.glob(f"{whole.name}*"))


def remove_parts_of(whole: Path) -> None:
    for part in whole.parent.glob(f"{whole.name}*"):
        part.unlink()


def locked(dest: Path):
    """One process at a time, on every node of a shared file system; a killed process lets go by itself."""
    lock = FileLock(dest.with_name(f".{dest.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"{dest}: waiting for the process that is downloading it")
        return lock.acquire()


def verify_in_place(dest: Path, asset: Asset) -> Path:
    """Verify a file that is already in place; one that was put there by hand gets its hash recorded."""
    try:
        check_download(dest, dest, asset, "a file already in place")
    except Refused as error:
        raise DownloadError(
            f"{dest} is already there but is not the expected file: {error}. Delete it to download it again"
            + ("." if asset.digest else f", and {dest}.sha256 as well to accept a file with another hash.")
        ) from None
    return dest


def check_download(path: Path, dest: Path, asset: Asset, origin: str) -> None:
    """Check `path` by size and hash; raises `Refused` with the reason.

    Where no hash was published, the checksums inside a zip file (npz, torch) stand for it, and the hash of this
    first time is kept beside `dest` for all later ones (`sha256sum -c` reads it).
    """
    size, note = path.stat().st_size, dest.with_name(f"{dest.name}.sha256")
    if asset.size is not None and size != asset.size:
        raise Refused(f"it has {size} bytes instead of {asset.size}")
    kept = re.search("^[0-9a-f]{64}", note.read_text(errors="replace"), re.M) if note.exists() else None
    known = asset.digest or (f"sha256:{kept[0]}" if kept else "")
    algorithm = known.partition(":")[0] or "sha256"
    with open(path, "rb+" if path != dest else "rb") as file:
        head = file.read(64)
        file.seek(0)
        found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
        if path != dest:
            os.fsync(file.fileno())
    zipped = head.startswith(b"PK\x03\x04")
    if not zipped and (dest.suffix == ".npz" or not head.startswith(b"\x80")):  # before torch 1.6 a bare pickle
        raise Refused(f"it is no {dest.suffix} file: {size} bytes that begin with {head!r}")
    if known and found != known:
        raise Refused(f"its hash is {found} instead of {known} ({'published' if asset.digest else f'kept in {note}'})")
    if zipped and not known:
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except Exception:  # zipfile and zlib raise several kinds for damaged files
            broken = "the end, where a zip file has its directory"
        if broken:
            raise Refused(f"it is damaged or cut short: {size} bytes, wrong at {broken}")
    if not known:
        try:
            with atomic_write(note, "w") as file:
                file.write(f"# from {origin}\n{found.removeprefix('sha256:')}  {dest.name}\n")
        except OSError as error:  # a shared folder that this user may only read
            say(f"{dest}: its hash could not be recorded ({error})")
