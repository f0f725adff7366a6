"""Downloads from hostile hosts on 127.0.0.1 (no test leaves the machine)."""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from libs.checkpoints import download
from libs.checkpoints.assets import ASSETS, Asset
from libs.checkpoints.download import DownloadError
from scripts.download import main

REPOSITORY = Path(__file__).parents[1]


def zipped(seed: int, size: int = 3_000_000) -> bytes:
    """A file of the kind that torch.save and np.savez write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data"), hashlib.shake_128(bytes([seed])).digest(size))
    return buffer.getvalue()


CHUNK = 2**19  # what gdown reads at once: a connection that breaks earlier than this brings nothing
FILE, OTHER = zipped(0), zipped(1)
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>no</body></html>"


@dataclass
class Answer:
    """How the host answers one request."""

    body: bytes = FILE
    status: int = 200
    ranges: bool = True  # honours Range
    stop: int | None = None  # closes the connection after so many bytes of the body
    hold: threading.Event | None = None  # sends the rest only after this
    hold_at: int = 0
    claim: int | None = None  # Content-Length, when it lies
    etag: str | None = '"1"'
    headers: dict = field(default_factory=lambda: {"Content-Type": "application/octet-stream"})


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        self.server.seen.append((self.path, self.headers.get("Range")))
        answers = self.server.routes.get(self.path) or self.server.routes[url.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        span = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, answer.etag)
        start = int(span[1]) if span and answer.ranges and same and answer.status == 200 else 0
        if start >= len(answer.body) > 0:
            self.send_error(416)
            return
        body = answer.body[start:]
        self.send_response(206 if start else answer.status)
        self.send_header("Content-Length", str(len(body) if answer.claim is None else answer.claim))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}")
        if answer.etag:
            self.send_header("ETag", answer.etag)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if answer.hold is not None:
                self.wfile.write(body[: answer.hold_at])
                self.wfile.flush()
                assert answer.hold.wait(120)
                body = body[answer.hold_at :]
            self.wfile.write(body[: answer.stop])
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            pass
        self.close_connection = True


class Host:
    """A server with scripted answers per path; the last answer of a path repeats."""

    def __init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.routes, self.server.seen = {}, []
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __call__(self, path: str, *answers: Answer) -> str:
        self.server.routes[path] = list(answers)
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    @property
    def seen(self) -> list[tuple[str, str | None]]:
        return self.server.seen


@pytest.fixture
def host():
    host = Host()
    yield host
    host.server.shutdown()
    host.server.server_close()


@pytest.fixture
def get(monkeypatch, tmp_path):
    """Download an asset with the given addresses; returns its path."""

    def get(*addresses, dest="uvit/net.pth", retries=3, **fields):
        monkeypatch.setitem(ASSETS, "net", Asset("uvit", dest, "a net", addresses, **fields))
        return download.fetch("net", tmp_path, timeout=5, retries=retries)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)  # gdown's pauses
    return get


def sha256(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def command(root: Path, address: str) -> list[str]:
    """The real command line in another process, with one asset of our own in the table."""
    row = dict(kind="uvit", dest="uvit/net.pth", about="a net", addresses=(address,))
    code = (
        "import sys; from libs.checkpoints.assets import ASSETS, Asset; from scripts.download import main; "
        f"ASSETS['net'] = Asset(**{row!r}); sys.exit(main(['net', '--root', {str(root)!r}]))"
    )
    return [sys.executable, "-c", code]


def run(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def left(root: Path) -> set[str]:
    """What is in the folder of the file, lock aside."""
    return {path.name for path in (root / "uvit").iterdir()} - {".net.pth.lock"}


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


def test_a_dropped_connection_is_continued_byte_exact(host, get, tmp_path):
    """Would catch: starting over after every drop, and joining the two parts at the wrong byte."""
    url = host("/net", Answer(stop=2 * CHUNK), Answer(stop=CHUNK + 5), Answer())
    assert get(url).read_bytes() == FILE
    assert [range_ for _, range_ in host.seen] == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]
    assert left(tmp_path) == {"net.pth", "net.pth.sha256"}


def test_progress_renews_the_retries(host, get):
    """Would catch: a long file over a bad line given up although every attempt brought some of it."""
    lines = [answer for _ in range(4) for answer in (Answer(stop=CHUNK + 5), Answer(stop=0))]
    assert get(host("/net", *lines, Answer()), retries=2).read_bytes() == FILE


def test_no_progress_ends(host, get):
    """Would catch: trying for ever at a host that accepts connections and closes them."""
    url = host("/net", Answer(stop=0))
    with pytest.raises(DownloadError, match="incomplete: received 0 bytes"):
        get(url)
    assert len(host.seen) == 3


def test_a_host_that_ignores_ranges_starts_over_cleanly(host, get):
    """Would catch: appending a whole file (status 200) to the part that is already there."""
    url = host("/net", Answer(stop=2 * CHUNK), Answer(ranges=False))
    assert get(url).read_bytes() == FILE
    assert host.seen[1][1] == f"bytes={2 * CHUNK}-"


@pytest.mark.parametrize("etag", ['"2"', None])
def test_a_file_that_changed_in_between_is_not_joined(host, get, etag):
    """Would catch: the beginning of one version followed by the end of another (found by ETag, else by size)."""
    new = OTHER if etag else zipped(2, 4_000_000)
    first = '"1"' if etag else None
    url = host("/net", Answer(stop=2 * CHUNK, etag=first), Answer(new, etag=etag))
    assert get(url).read_bytes() == new


def test_a_file_that_became_shorter_starts_over(host, get):
    """Would catch: status 416 taken for a refusal, with the useless part kept for ever."""
    url = host("/net", Answer(stop=2 * CHUNK, etag=None), Answer(zipped(3, 1000), etag=None))
    assert get(url).read_bytes() == zipped(3, 1000)


def test_a_wrong_length_is_continued_and_a_right_length_of_a_cut_file_is_refused(host, get, tmp_path):
    """Would catch: taking a file cut on the host for whole because its Content-Length agrees."""
    get(host("/net", Answer(FILE[:1000], claim=len(FILE), stop=1000), Answer())).unlink()
    (tmp_path / "uvit/net.pth.sha256").unlink()
    with pytest.raises(DownloadError, match="damaged or cut short: 1000 bytes"):
        get(host("/cut", Answer(FILE[:1000])))
    with pytest.raises(DownloadError, match="1000 bytes instead of"):
        get(host("/cut", Answer(FILE[:1000])), size=len(FILE))
    assert left(tmp_path) == set()


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def test_a_false_hash_is_refused(host, get, tmp_path):
    """Would catch: a file with another hash left under its name, or a message that does not say which is which."""
    with pytest.raises(DownloadError) as error:
        get(host("/net", Answer(OTHER)), digest=sha256(FILE))
    assert all(part in str(error.value) for part in ("net", sha256(FILE), sha256(OTHER)))
    assert left(tmp_path) == set()


def test_a_false_hash_at_one_address_leaves_the_next(host, get):
    """Would catch: one corrupt mirror making the file unobtainable, and its bytes continued at another address."""
    digest = "md5:" + hashlib.md5(FILE).hexdigest()
    assert get(host("/bad", Answer(OTHER)), host("/good", Answer()), digest=digest).read_bytes() == FILE


def test_the_hash_of_the_first_download_is_kept_and_compared(host, get, tmp_path):
    """Would catch: a host that exchanges an unpublished-hash file later, and a file damaged on disk, unnoticed.

    A hash that sha256sum wrote, without our line above it, was compared with nothing.
    """
    path = get(host("/net", Answer()))
    kept = (tmp_path / "uvit/net.pth.sha256").read_text()
    assert f"{hashlib.sha256(FILE).hexdigest()}  net.pth\n" in kept
    requests = len(host.seen)
    assert get("http://unused") == path and len(host.seen) == requests  # verified, not downloaded again
    for text in (kept.splitlines()[1] + "\n", hashlib.sha256(FILE).hexdigest()):
        (tmp_path / "uvit/net.pth.sha256").write_text(text)
        assert get("http://unused") == path
    path.write_bytes(FILE[:5000] + b"?" + FILE[5001:])
    with pytest.raises(DownloadError, match="already there but is not the expected file"):
        get("http://unused")
    path.unlink()
    with pytest.raises(DownloadError, match="kept in .*net.pth.sha256"):
        get(host("/net", Answer(OTHER)))
    assert not path.exists()


def test_a_file_put_there_by_hand_is_checked(host, get, tmp_path):
    """Would catch: an HTML page saved from a browser accepted as weights, and a good one downloaded again."""
    path = tmp_path / "uvit/net.pth"
    path.parent.mkdir()
    path.write_bytes(PAGE)
    with pytest.raises(DownloadError, match="no .pth file: 78 bytes that begin with b'<!DOCTYPE html>"):
        get("http://unused")
    path.write_bytes(FILE)
    assert get("http://unused") == path
    assert left(tmp_path) == {"net.pth", "net.pth.sha256"}


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_a_file(host, get, tmp_path, kind):
    """Would catch: a sign-in page with status 200 stored as weights, whatever type the host declares."""
    with pytest.raises(DownloadError, match="no .pth file: 78 bytes that begin with b'<!DOCTYPE html>"):
        get(host("/net", Answer(PAGE, headers={"Content-Type": kind})))
    assert left(tmp_path) == set()


def test_an_error_document_with_status_200_is_not_a_file(host, get):
    """Would catch: a JSON error recorded as the first download, whose hash then rejects the real file."""
    with pytest.raises(DownloadError, match="no .npz file: 17 bytes that begin with"):
        get(host("/net", Answer(b'{"error": "gone"}')), dest="uvit/net.npz")


# ----------------------------------------------------------------------------------------------------------------------
# Hosts that refuse


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (404, 1), (429, 3), (500, 3)])
def test_a_refusal_leads_to_the_next_address(host, get, status, requests):
    """Would catch: giving up at the first address, hammering a 403, and not trying a passing 500 again."""
    bad = host("/bad", Answer(b"no", status=status))
    assert get(bad, host("/good", Answer())).read_bytes() == FILE
    assert [path for path, _ in host.seen] == ["/bad"] * requests + ["/good"]


def test_the_message_tells_what_was_tried_and_what_to_do(host, get, tmp_path):
    """Would catch: "download failed" without status, addresses, or where to put the file."""
    first, second = host("/a", Answer(status=403)), host("/b", Answer(status=404))
    with pytest.raises(DownloadError) as error:
        get(first, mirrors=(second,), page="https://example.org/paper")
    for part in (
        first,
        "403 Client Error",
        second,
        "404 Client Error",
        "https://example.org/paper",
        str(tmp_path / "uvit/net.pth"),
    ):
        assert part in str(error.value)


def test_a_mirror_is_named_as_one(host, get, capsys, tmp_path):
    """Would catch: someone else's copy silently taken for the authors' file."""
    mirror = host("/mirror", Answer())
    get(host("/gone", Answer(status=404)), mirrors=(mirror,))
    assert "was not verified" in capsys.readouterr().err
    assert f"# from {mirror}" in (tmp_path / "uvit/net.pth.sha256").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Google Drive and the hub

HTML = {"Content-Type": "text/html; charset=utf-8"}
ATTACHED = {"Content-Type": "application/octet-stream", "Content-Disposition": 'attachment; filename="x.pth"'}
IDS = {name: f"{name:_<33}" for name in ("top", "stable", "fid", "kl", "kl_ema")}


@pytest.fixture
def drive(host, monkeypatch):
    """gdown's own code, with Google Drive played by the host."""
    send = requests.Session.get

    def local(session, url, **options):
        return send(
            session, url.replace("https://drive.google.com/", host("/nothing", Answer(status=404))[:-7]), **options
        )

    monkeypatch.setattr(requests.Session, "get", local)
    return host


def test_drive_confirmation_is_passed(drive, get):
    """Would catch: the "can't scan for viruses" page of large files ending the download, or lost on a resume."""
    action = drive("/confirmed", Answer(stop=2 * CHUNK, headers=ATTACHED), Answer(headers=ATTACHED))
    form = (
        f'<html><form id="download-form" action="{action}" method="get"><input type="submit" value="Download anyway"/>'
        '<input type="hidden" name="id" value="ID"><input type="hidden" name="uuid" value="a&amp;b"></form></html>'
    )
    drive("/uc", Answer(form.encode(), headers=HTML, ranges=False))
    assert get("gdrive:" + IDS["kl"]).read_bytes() == FILE
    asked = [(path, span) for path, span in drive.seen if path.startswith("/confirmed")]
    assert asked == [("/confirmed?id=ID&uuid=a%26b", None), ("/confirmed?id=ID&uuid=a%26b", f"bytes={2 * CHUNK}-")]


def test_drive_quota_is_recognised(drive, get):
    """Would catch: "a web page came" where the user needs to hear whose fault it is, or a message of ten lines."""
    page = '<html><p class="uc-error-subcaption">Too many users have viewed this file recently.</p></html>'
    drive("/uc", Answer(page.encode(), headers=HTML))
    with pytest.raises(DownloadError, match="tried gdrive:.*Too many users have viewed this file"):
        get("gdrive:" + IDS["kl"])


def test_drive_folders_are_looked_up_by_name(drive, get):
    """Would catch: taking another file of the folder, and a renamed file without a list of what is there."""

    def listing(title, *files, folders=()):
        links = [f'<a href="https://drive.google.com/file/d/{IDS[name]}/view">{name}.pth</a>' for name in files]
        links += [f'<a href="https://drive.google.com/drive/folders/{IDS[name]}">{name}</a>' for name in folders]
        return Answer(f"<html><title>{title}</title>{''.join(links)}</html>".encode(), headers=HTML)

    drive(f"/embeddedfolderview?id={IDS['top']}", listing("top", folders=("fid", "stable")))
    drive(f"/embeddedfolderview?id={IDS['fid']}", listing("fid"))
    drive(f"/embeddedfolderview?id={IDS['stable']}", listing("stable", "kl_ema", "kl"))
    drive(f"/uc?id={IDS['kl']}", Answer(headers=ATTACHED))
    assert get(f"gdrive-folder:{IDS['top']}/stable/kl.pth").read_bytes() == FILE
    with pytest.raises(DownloadError, match=r"holds \['stable/kl.pth', 'stable/kl_ema.pth'\], not 'stable/x.pth'"):
        get(f"gdrive-folder:{IDS['top']}/stable/x.pth", dest="uvit/x.pth")


def test_the_hub_is_asked_for_no_other_formats(monkeypatch, tmp_path):
    """Would catch: downloading CLIP three times over (TensorFlow, Flax), and a bare ImportError or hub traceback."""
    asked = []
    hub = types.SimpleNamespace(snapshot_download=lambda repo, **o: asked.append((repo, o)) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert download.fetch("clip") == tmp_path
    repository, options = asked[0]
    assert repository == "openai/clip-vit-large-patch14" and "model.safetensors" in options["allow_patterns"]
    hub.snapshot_download = lambda *_, **__: (_ for _ in ()).throw(OSError("offline"))
    with pytest.raises(DownloadError, match="offline.*\n.*By hand"):
        download.fetch("clip")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="huggingface_hub"):
        download.fetch("clip")


def test_what_no_program_can_fetch_says_so(tmp_path):
    """Would catch: a shared folder's web page stored as weights; and the folder not accepted once it is there."""
    with pytest.raises(DownloadError, match=r"sharepoint(.|\n)*save its files in"):
        download.fetch("adadiff", tmp_path)
    (tmp_path / "adadiff").mkdir()
    (tmp_path / "adadiff/x.pth").touch()
    assert download.fetch("adadiff", tmp_path) == tmp_path / "adadiff"


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def test_a_killed_download_is_continued(host, get, tmp_path):
    """Would catch: a file that appears under its name before it is whole; a restart at byte 0 after SIGKILL."""
    stuck = threading.Event()
    url = host("/net", Answer(hold=stuck, hold_at=3 * CHUNK), Answer())
    process = run(command(tmp_path, url))
    part = download.part_path(tmp_path / "uvit/net.pth", url)
    deadline = time.monotonic() + 60
    while download.bytes_so_far(part) < 2 * CHUNK and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    stuck.set()
    begun = download.bytes_so_far(part)
    assert begun >= 2 * CHUNK and not (tmp_path / "uvit/net.pth").exists()
    assert get(url).read_bytes() == FILE
    assert [span for _, span in host.seen] == [None, None, f"bytes={begun}-"]
    assert left(tmp_path) == {"net.pth", "net.pth.sha256"}


def test_what_a_kill_left_of_the_hash_is_removed(host, monkeypatch, tmp_path):
    """Catches an unfinished hash of a killed download that stays for good."""
    monkeypatch.setitem(ASSETS, "net", Asset("uvit", "uvit/net.pth", "a net", (host("/", Answer()),)))
    (tmp_path / "uvit").mkdir()
    (tmp_path / "uvit" / ".net.pth.sha256.f27d8d2x.part").write_text("# from")
    assert download.fetch("net", tmp_path).read_bytes() == FILE
    assert left(tmp_path) == {"net.pth", "net.pth.sha256"}


def test_killed_at_any_byte_it_ends_in_the_same_bytes(host, monkeypatch, tmp_path):
    """Would catch: bytes lost, doubled or joined wrongly by a kill, and what it leaves. KILLS=100 makes a campaign."""
    kills, dice = int(os.environ.get("KILLS", 4)), random.Random(0)
    for number in range(kills):
        root, held = tmp_path / str(number // 4), threading.Event()
        url = host(f"/{number // 4}", Answer(hold=held, hold_at=dice.randrange(len(FILE))), Answer())
        monkeypatch.setitem(ASSETS, "net", Asset("uvit", "uvit/net.pth", "a net", (url,)))
        asked = len(host.seen)
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                download.fetch("net", root, timeout=30)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # one that finds the whole file asks for nothing
        while len(host.seen) == asked and time.monotonic() < deadline and not os.waitid(os.P_PID, child, ended):
            time.sleep(0.001)
        time.sleep(dice.random() * 0.1)
        number_of_signal = dice.choice([signal.SIGKILL, signal.SIGTERM])
        os.kill(child, number_of_signal)
        held.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-number_of_signal, 0)
        if number % 4 == 3 or number == kills - 1:
            assert download.fetch("net", root).read_bytes() == FILE
            assert left(root) == {"net.pth", "net.pth.sha256"}


def test_killed_between_the_last_byte_and_the_name(host, get, tmp_path):
    """Would catch: a whole file fetched again, or taken for the asset without a look at it."""
    url = host("/net", Answer())
    (tmp_path / "uvit").mkdir()
    download.part_path(tmp_path / "uvit/net.pth", url).write_bytes(FILE)
    assert get(url).read_bytes() == FILE and host.seen == []


@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_part_of_another_version_is_not_joined_by_a_later_run(host, get, tmp_path, etag):
    """Would catch: the beginning that an earlier run left, of an older file, with the end of today's."""
    url = host("/net", Answer(etag=etag))
    (tmp_path / "uvit").mkdir()
    part = download.part_path(tmp_path / "uvit/net.pth", url)
    part.with_name(part.name + "abcd1234.part").write_bytes(OTHER[: 2 * CHUNK])
    assert get(url).read_bytes() == FILE


def test_a_part_of_another_address_is_not_continued_here(host, get, tmp_path):
    """Would catch: the bytes of two mirrors in one file, or the left part staying for ever."""
    (tmp_path / "uvit").mkdir()
    part = download.part_path(tmp_path / "uvit/net.pth", "http://elsewhere")
    part.with_name(part.name + "abcd1234.part").write_bytes(OTHER[: 2 * CHUNK])
    assert get(host("/net", Answer())).read_bytes() == FILE
    assert left(tmp_path) == {"net.pth", "net.pth.sha256"}


def test_two_processes_download_once(host, tmp_path):
    """Would catch: two ranks writing one .part, or the second one failing instead of finding the file."""
    release = threading.Event()
    url = host("/net", Answer(hold=release, hold_at=1000))
    first = run(command(tmp_path, url))
    while not host.seen and first.poll() is None:
        time.sleep(0.01)
    second = run(command(tmp_path, url))
    try:
        assert "waiting for the process" in second.stderr.readline()
    finally:
        release.set()
        errors = first.communicate(timeout=120)[1], second.communicate(timeout=120)[1]
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert len(host.seen) == 1 and (tmp_path / "uvit/net.pth").read_bytes() == FILE


# ----------------------------------------------------------------------------------------------------------------------
# Command line and table


def test_exit_statuses_and_one_failure_not_stopping_the_rest(host, monkeypatch, tmp_path, capsys):
    """Would catch: status 0 after a failure, the assets behind a failed one never tried, CLIP listed as absent."""
    good = Asset("uvit", "uvit/good.pth", "", (host("/good", Answer()),))
    bad = Asset("uvit", "uvit/bad.pth", "", (host("/bad", Answer(status=403)),))
    for name in list(ASSETS):
        monkeypatch.delitem(ASSETS, name)
    monkeypatch.setitem(ASSETS, "bad", bad)
    monkeypatch.setitem(ASSETS, "good", good)
    monkeypatch.setitem(ASSETS, "clip", Asset("clip", "(a cache)", "", ("hub:a/b",)))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    root = ["--root", str(tmp_path)]
    assert main(["--all-of", "uvit", *root]) == 1
    assert (tmp_path / "uvit/good.pth").exists()
    assert "Not in place: bad" in capsys.readouterr().err
    assert main(["good", *root]) == 0
    assert main(["--list", *root]) == 0
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "present" in table["good"] and "present" not in table["bad"] and "present" in table["clip"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar_uvit_small"], "cifar10_uvit_small"),
        (["--all-of", "uvits"], "invalid choice"),
        ([], "name what to download"),
        (["inception", "--retries", "0"], "--retries at least 1"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    """Would catch: a misspelt name ignored or answered with a traceback, without the name that was meant."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_table_is_well_formed():
    """Would catch: two assets with one destination, a path that leaves the folder, a malformed hash or address."""
    rows = json.loads((REPOSITORY / "libs/checkpoints/assets.json").read_text("utf-8"))
    assert len({row["dest"] for row in rows.values()}) == len(rows)
    for name, asset in ASSETS.items():
        assert asset.page.startswith("https://"), name
        assert not Path(asset.dest).is_absolute() and ".." not in Path(asset.dest).parts, name
        assert asset.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", asset.digest), name
        for address in (*asset.addresses, *asset.mirrors):
            assert re.match(r"https://\S+$|gdrive:[\w-]{33}$|gdrive-folder:[\w-]{33}/\S+$|hub:[\w-]+/[\w-]+$", address)
    assert sum(asset.kind == "uvit" for asset in ASSETS.values()) == 10
