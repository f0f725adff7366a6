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
import contextlib
import difflib
import fcntl
import hashlib
import html
import http.client
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from libs.checkpoints.assets import ASSETS, Asset

# ----------------------------------------------------------------------------------------------------------------------
# The table


KINDS = sorted({asset.kind for asset in ASSETS.values()})

DRIVE_FILE = "https://drive.usercontent.google.com/download"
DRIVE_FOLDER = "https://drive.google.com/embeddedfolderview"
# Formats other than safetensors would double the download.
HUB_FILES = ["*.json", "*.txt", "model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Errors and talking to hosts


class DownloadError(Exception):
    """The file is not in place; the message says why and what to do."""


class Refused(Exception):
    """This address does not give the file: go on to the next one."""


class Interrupted(Exception):
    """The transfer stopped for a reason that may pass: continue after `wait` seconds (None: the usual backoff)."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses worth another try at the same address
LONGEST_WAIT = 60  # seconds; a host that asks for more is left for the next address
_opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())  # Drive's confirmation sets a cookie


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def open_url(url: str, timeout: float, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """GET; raises `Refused` or `Interrupted`. Status 416 raises `urllib.error.HTTPError`: only the caller can judge."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (scripts.download)", **(headers or {})})
    try:
        return _opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise
        reason = f"HTTP {error.code} {error.reason}"
        if error.code not in PASSING:
            raise Refused(reason) from None
        wait = error.headers.get("Retry-After", "")
        if wait.isdigit() and int(wait) > LONGEST_WAIT:
            raise Refused(f"{reason}, come back in {wait} s") from None
        raise Interrupted(reason, float(wait) if wait.isdigit() else None) from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"no answer ({getattr(error, 'reason', None) or error})") from None


def read_page(response: http.client.HTTPResponse, limit: int = 1 << 20) -> str:
    try:
        return response.read(limit).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"connection lost ({error})") from None


def page_reason(page: str) -> str:
    """Why a host sent a web page instead of a file."""
    if "Quota exceeded" in page or "Too many users have viewed or downloaded" in page:
        return (
            "Google Drive's download quota for this file is used up (it opens again within about 24 hours; "
            "a browser that is signed in, and a copy made in one's own Drive, often still work)"
        )
    title = re.search(r"<title[^>]*>(.*?)</title>", page, re.DOTALL | re.IGNORECASE)
    name = f" titled {' '.join(html.unescape(title[1]).split())!r}" if title else ""
    return f"a web page{name} came instead of the file"


def confirmed(page: str) -> str | None:
    """The address behind "Google Drive can't scan this file for viruses: download anyway", or None."""
    form = re.search(r"<form[^>]*\bid=\"download-form\".*?</form>", page, re.DOTALL)
    if form is None:
        return None
    action = re.search(r"\baction=\"([^\"]+)\"", form[0])
    fields = {}
    for tag in re.findall(r"<input[^>]*>", form[0]):
        name, value = (re.search(rf"\b{attribute}=\"([^\"]*)\"", tag) for attribute in ("name", "value"))
        if name and value:
            fields[html.unescape(name[1])] = html.unescape(value[1])
    return f"{html.unescape(action[1])}?{urllib.parse.urlencode(fields)}" if action else None


def resolve(address: str, timeout: float) -> str:
    """Address of the table -> URL. A path in a Drive folder is looked up in the folder's public listing."""
    scheme, _, rest = address.partition(":")
    if scheme == "gdrive-folder":
        file_id, *path = rest.split("/")
        for name in path:
            with open_url(f"{DRIVE_FOLDER}?id={file_id}", timeout) as response:
                page = read_page(response)
            entries = re.findall(r"id=\"entry-([\w-]+)\".*?class=\"flip-entry-title\"[^>]*>([^<]*)<", page, re.DOTALL)
            ids = {html.unescape(title).strip(): entry for entry, title in entries}
            if name not in ids:
                raise Refused(f"the Drive folder lists {sorted(ids) or 'nothing'}, not {name!r}")
            file_id = ids[name]
    elif scheme == "gdrive":
        file_id = rest
    else:
        return address
    return f"{DRIVE_FILE}?id={file_id}&export=download&confirm=t"


def browse(address: str) -> str:
    """The same address for a person with a browser."""
    scheme, _, rest = address.partition(":")
    if scheme == "gdrive":
        return f"https://drive.google.com/file/d/{rest}/view"
    if scheme == "gdrive-folder":
        folder, _, path = rest.partition("/")
        return f"https://drive.google.com/drive/folders/{folder} (there: {path})"
    return address


# ----------------------------------------------------------------------------------------------------------------------
# Verification

TORCH, ZIP = (b"PK\x03\x04", b"\x80"), (b"PK\x03\x04",)  # torch.save writes a zip file, before version 1.6 a pickle
FIRST_BYTES = {".pth": TORCH, ".ckpt": TORCH, ".npz": ZIP}


def check(path: Path, asset: Asset, recorded: str | None) -> str:
    """Check `path` as far as anything is known about it. Returns "sha256:HEX"; raises `Refused` with the reason.

    Without a hash, a file cut short is still found by its size or, for zip files (npz and torch), by the directory
    that ends them.
    """
    size = path.stat().st_size
    if asset.size is not None and size != asset.size:
        raise Refused(f"{asset.dest} has {size} bytes instead of {asset.size}")
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise Refused(
            f"{asset.dest} is not a {Path(asset.dest).suffix} file: {page_reason(head.decode(errors='replace'))}"
        )
    starts = FIRST_BYTES.get(Path(asset.dest).suffix)
    if starts and not head.startswith(starts):
        raise Refused(f"{asset.dest} does not begin like a {Path(asset.dest).suffix} file: {head[:16]!r}")
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        raise Refused(f"{asset.dest} is cut short: {size} bytes without the directory that ends a zip file")
    sha256 = "sha256:" + digest(path, "sha256")
    expected = asset.digest or recorded
    if expected:
        found = sha256 if expected.startswith("sha256:") else "md5:" + digest(path, "md5")
        if found != expected:
            origin = "published" if asset.digest else f"recorded in {record_of(Path(asset.dest))} at the first download"
            raise Refused(f"{asset.dest} has the hash {found} instead of {expected} ({origin})")
    return sha256


def digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def record_of(dest: Path) -> Path:
    return dest.with_name(dest.name + ".sha256")


def recorded_hash(dest: Path) -> str | None:
    """The hash kept at the first download, "sha256:HEX", or None."""
    try:
        text = record_of(dest).read_text()
    except FileNotFoundError:
        return None
    found = re.search(r"^([0-9a-f]{64})\b", text, re.MULTILINE)
    if found is None:
        raise DownloadError(f"{record_of(dest)} holds no SHA-256 hash. Delete it to record the hash anew.")
    return f"sha256:{found[1]}"


def record(dest: Path, sha256: str, origin: str) -> None:
    write(record_of(dest), f"# from {origin}\n{sha256.removeprefix('sha256:')}  {dest.name}\n")


def write(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


# ----------------------------------------------------------------------------------------------------------------------
# One file


class Part:
    """The unfinished file, and beside it where it comes from: bytes of two versions must never be joined."""

    def __init__(self, dest: Path):
        self.path = dest.with_name(dest.name + ".part")
        self.note = dest.with_name(dest.name + ".part.json")

    def read_note(self) -> dict:
        try:
            return json.loads(self.note.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write_note(self, address: str, validator: str | None, total: int | None) -> None:
        write(self.note, json.dumps({"address": address, "validator": validator, "total": total}))

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def ask(address: str, timeout: float, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Request the file at `address`, through Google Drive's page of confirmation where one comes."""
    response = open_url(resolve(address, timeout), timeout, headers)
    for confirming in (True, False):
        if response.headers.get_content_type() != "text/html":
            break
        with response:
            page = read_page(response)
        url = confirmed(page) if confirming else None
        if url is None:
            raise Refused(page_reason(page))
        response = open_url(url, timeout, headers)
    return response


def transfer(address: str, part: Part, asset: Asset, timeout: float) -> None:
    """One request: continue `part` if it came from this address and the file there is the same, else start over."""
    note = part.read_note()
    start = part.size() if note.get("address") == address else 0
    if start and start == note.get("total"):
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and note.get("validator"):
        headers["If-Range"] = note["validator"]
    try:
        response = ask(address, timeout, headers)
    except urllib.error.HTTPError as error:  # 416: the file there is shorter than what we have
        part.drop()
        raise Interrupted(f"HTTP {error.code} {error.reason}; starting over") from None

    with response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        if response.status == 206:
            span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            total, known = int(span[2]) if span and span[2] != "*" else None, note.get("total")
            if not start or span is None or int(span[1]) != start or (None not in (total, known) and total != known):
                part.drop()
                raise Interrupted("the host's file changed since the first part of it came; starting over")
            total = total or known
        elif response.status == 200:
            start = 0  # the host ignores ranges, or If-Range says that the file is another one
        else:
            raise Refused(f"HTTP {response.status} {response.reason}")
        if None not in (asset.size, total) and total != asset.size:
            raise Refused(f"the host offers {total} bytes instead of {asset.size}")
        if not start:
            part.drop()
        etag = response.headers.get("ETag", "")  # If-Range takes strong tags only
        part.write_note(address, etag if etag.startswith('"') else response.headers.get("Last-Modified"), total)
        append(response, part, start, total)


def append(response: http.client.HTTPResponse, part: Part, start: int, total: int | None) -> None:
    """Write the body behind the `start` bytes of `part`; raises `Interrupted` if it ends before `total`."""
    name = part.path.name.removesuffix(".part")
    bar = tqdm(initial=start, total=total, unit="B", unit_scale=True, desc=name, disable=None)
    with open(part.path, "ab") as file, bar:
        while True:
            try:
                chunk = response.read1(1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(f"connection lost at byte {file.tell()} ({error})") from None
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
        if total is not None and file.tell() < total:
            raise Interrupted(f"connection closed at byte {file.tell()} of {total}")
        file.flush()
        os.fsync(file.fileno())


def receive(address: str, part: Part, asset: Asset, *, timeout: float, retries: int, backoff: float) -> None:
    """Bring the whole of `address` into `part`; `retries` counts attempts in a row that got no further."""
    furthest, failures = part.size() if part.read_note().get("address") == address else 0, 0
    while True:
        try:
            return transfer(address, part, asset, timeout)
        except Interrupted as error:
            failures = 0 if part.size() > furthest else failures + 1
            furthest = max(furthest, part.size())
            if failures >= max(retries, 1):
                raise Refused(f"{error} (attempts without progress: {failures})") from None
            wait = error.wait if error.wait is not None else backoff * 2**failures * random.uniform(0.5, 1)
            wait = min(wait, LONGEST_WAIT)
            say(f"{asset.dest}: {error}; trying again in {wait:.0f} s")
            time.sleep(wait)


@contextlib.contextmanager
def locked(dest: Path) -> Iterator[None]:
    """One process at a time, on every node of a shared file system; a killed process lets go by itself.

    The empty lock file stays: deleting it would let two processes hold locks on two files of the same name.
    """
    with open(dest.with_name(f".{dest.name}.lock"), "a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{dest}: waiting for the process that is downloading it")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise DownloadError(
                f"{dest.parent} is on a file system without file locks ({error}). Download to a local disk "
                f"(--root) and copy the files."
            ) from None
        yield


def keep(dest: Path, asset: Asset) -> Path:
    """Verify a file that is already in place; a file put there by hand gets its hash recorded."""
    known = asset.digest or recorded_hash(dest)
    try:
        sha256 = check(dest, asset, known)
    except Refused as error:
        raise DownloadError(
            f"{dest} is already there but is not the expected file: {error}. Delete it to download it again"
            + ("." if asset.digest else f", and {record_of(dest)} as well to accept a file with another hash.")
        ) from None
    if known is None:
        try:
            record(dest, sha256, "a file already in place")
        except OSError as error:  # a shared folder that this user may only read
            say(f"{dest}: the hash could not be recorded ({error})")
    return dest


def by_hand(name: str, asset: Asset, dest: Path, tried: list[tuple[str, str]]) -> str:
    lines = [f"{name}: " + ("no address gave the file." if tried else "this cannot be downloaded by a program.")]
    lines += [f"  tried {address}\n        {reason}" for address, reason in tried]
    lines += ["  By hand (also on another machine): open one of"]
    lines += [f"    {browse(address)}" for address in (*asset.addresses, *asset.mirrors)] + [f"    {asset.page}"]
    verb = "save it as" if asset.addresses else "save its files in"
    lines += [f"  {verb} {dest}, then run `python -m scripts.download {name}` again to check it."]
    return "\n".join(lines)


def fetch(
    name: str, root: Path | str = "assets", *, timeout: float = 30, retries: int = 5, backoff: float = 1.0
) -> Path:
    """Have the file of `ASSETS[name]` below `root`, verified; returns its path.

    `timeout` (seconds) is the longest silence of a host, `backoff` (seconds) the first pause, doubled every time.
    Raises `DownloadError`, whose message says what was tried and what to do by hand.
    """
    asset = ASSETS[name]
    dest = Path(root) / asset.dest
    if asset.addresses and asset.addresses[0].startswith("hub:"):
        return fetch_hub(name, asset.addresses[0].removeprefix("hub:"))
    if not asset.addresses:
        if dest.is_dir() and any(dest.iterdir()):
            return dest
        raise DownloadError(by_hand(name, asset, dest, []))
    if dest.exists():
        return keep(dest, asset)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with locked(dest):
        if dest.exists():  # another process was faster
            return keep(dest, asset)
        part, tried = Part(dest), []
        known = recorded_hash(dest)
        # An unfinished file is worth more than the order of the addresses.
        begun = part.read_note().get("address")
        for address in sorted((*asset.addresses, *asset.mirrors), key=lambda address: address != begun):
            say(f"{name}: from {address}" + (f", continuing at byte {part.size()}" if address == begun else ""))
            try:
                receive(address, part, asset, timeout=timeout, retries=retries, backoff=backoff)
                try:
                    sha256 = check(part.path, asset, known)
                except Refused:
                    part.drop()
                    raise
            except Refused as error:
                say(f"{name}: {error}")
                tried.append((address, str(error)))
                continue
            if address in asset.mirrors and not asset.digest:
                say(f"{name}: NOTE this copy is a mirror; that it equals the original was not verified")
            if asset.digest is None:  # before the file appears: a kill in between must not lose it
                record(dest, sha256, address)
            os.replace(part.path, dest)
            part.drop()
            return dest
        raise DownloadError(by_hand(name, asset, dest, tried))


def fetch_hub(name: str, repository: str) -> Path:
    """A model of the Hugging Face hub, into that library's own cache, where `from_pretrained` finds it offline."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DownloadError(f"{name}: this needs huggingface_hub (pip install huggingface_hub).") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the library raises its own, requests', httpx' and OSError kinds, by version
        raise DownloadError(
            f"{name}: the hub did not give {repository} ({type(error).__name__}: {error}).\n"
            f"  By hand: on a machine with access run `hf download {repository}`, then copy its cache "
            f"(HF_HOME, by default ~/.cache/huggingface) to this machine."
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def listing(root: Path) -> str:
    """The table for people: name, kind, state, destination, what it is."""
    rows = [("NAME", "KIND", "STATE", "DESTINATION", "WHAT")]
    for name, asset in ASSETS.items():
        dest = root / asset.dest
        part = Part(dest).size()
        state = "present" if dest.exists() else f"{part / 1e6:.0f} MB so far" if part else "-"
        rows.append((name, asset.kind, state, asset.dest, asset.about))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="what to download (see --list)")
    parser.add_argument("--all-of", metavar="KIND", choices=KINDS, help="everything of a kind: " + ", ".join(KINDS))
    parser.add_argument("--list", action="store_true", help="print the table and what is already there")
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("assets"), help="default: assets")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=30, help="longest silence (default: 30)")
    parser.add_argument("--retries", metavar="N", type=int, default=5, help="attempts without progress (default: 5)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in ASSETS:
            near = difflib.get_close_matches(name, ASSETS, n=3, cutoff=0.4) or [n for n in ASSETS if name in n]
            parser.error(
                f"there is no asset named {name!r}. "
                + (f"Did you mean {', '.join(near)}? " if near else "")
                + "--list shows all names."
            )
    if not options.list and not options.names and not options.all_of:
        parser.error("name what to download, or use --all-of KIND or --list.")
    if options.timeout <= 0 or options.retries < 1:
        parser.error(
            f"--timeout must be positive and --retries at least 1, not {options.timeout} and {options.retries}."
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print(listing(options.root))
    chosen = [*options.names, *(n for n, asset in ASSETS.items() if asset.kind == options.all_of)]
    failed = []
    for name in dict.fromkeys(chosen):
        try:
            say(f"{name}: in place, {fetch(name, options.root, timeout=options.timeout, retries=options.retries)}")
        except DownloadError as error:
            say(str(error))
            failed.append(name)
        except OSError as error:  # the disk: full, read-only, no permission
            say(f"{name}: {error}. What came so far is kept; the same command continues.")
            failed.append(name)
        except KeyboardInterrupt:
            say(f"\n{name}: stopped. What came so far is kept; the same command continues.")
            return 130
    if failed:
        say(f"Not in place: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
