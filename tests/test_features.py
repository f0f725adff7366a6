"""Extracted features: both layouts, reading them safely, and an extraction that is killed and continued."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import item
from PIL import Image

from libs import regimes
from libs.codecs import KL, ClipText
from libs.data import batches, features
from libs.data import extract as extraction
from libs.data.coco import CocoImages
from libs.data.features import CaptionShards, LatentShards
from libs.data.features_npy import CaptionFiles, LatentFiles, Npy, count_files
from libs.data.images import ImageFolder
from libs.data.npy import object_array, read_objects
from libs.data.shards import Sharded, make_index
from libs.run import Run
from scripts import extract_features
from tests.test_codecs import SMALL, small_clip

pytest.importorskip("diffusers")
KL(path="random", **SMALL).to("cpu")  # imports the library now, or every forked process would, for seconds


def picture_folder(folder: Path, n: int) -> str:
    """n noisy pictures, 20 x 24, in the class folders a, b and c."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return str(folder)


def coco_folder(folder: Path, n: int) -> tuple[str, str]:
    """n pictures with one to three captions each; ids fall while file names rise."""
    picture_folder(folder / "all", n)
    files = sorted((folder / "all").rglob("*.png"))
    content = {
        "images": [{"id": 100 - i, "file_name": str(f.relative_to(folder / "all"))} for i, f in enumerate(files)],
        "annotations": [
            {"image_id": 100 - i, "caption": f"picture {i} caption {k} é"}
            for k in range(3)
            for i in range(n)
            if k <= i % 3
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return str(folder / "all"), str(folder / "captions.json")


def extract(data, out: Path, layout, run=None, text=None, **options) -> dict:
    settings = {"flips": text is None, "batch_size": 2, "shard_size": 4, "workers": 0} | options
    codec = KL(path="random", **SMALL)
    return extraction.extract(data, codec, text, out, run or Run.single(out), layout=layout, **settings)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> ImageFolder:
    return ImageFolder(path=picture_folder(tmp_path_factory.mktemp("pictures"), 10), resolution=8)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> CocoImages:
    path, captions = coco_folder(tmp_path_factory.mktemp("coco"), 7)
    return CocoImages(path=path, captions=captions, resolution=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> ClipText:
    pytest.importorskip("transformers")
    return ClipText(path=small_clip(tmp_path_factory.mktemp("clip")), length=6)


def expected_moments(data, index: int, flip: bool) -> torch.Tensor:
    image = data.pixels(index)[None].float() / 127.5 - 1
    return KL(path="random", **SMALL).moments(image.flip(-1) if flip else image)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Extraction, then reading


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_latents_are_the_encoders(tmp_path, pictures, dtype):
    """Catches rows that shift at the end of a shard or batch, moments written in their memory's order instead of their
    own, and mirrored moments in place of the moments of the mirrored image."""
    summary = extract(pictures, tmp_path, Sharded(dtype))
    assert (summary["images"], summary["computed"], summary["files"]) == (10, 10, 3)
    data = LatentShards(path=str(tmp_path))
    assert (len(data), data.n_classes, data.shape) == (10, 3, (8, 4, 4))
    indices, flips = torch.tensor([9, 0, 3, 4, 7, 9]), torch.tensor([True, False, False, True, True, False])
    moments, labels = data.gather(indices, flips)
    assert labels.tolist() == pictures.labels[indices].tolist()
    assert moments.dtype == {"<f2": torch.float16, "<f4": torch.float32}[dtype]
    moments, tolerance = moments.float(), {"<f2": 1e-3, "<f4": 1e-5}[dtype]
    for row, (i, flip) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
        torch.testing.assert_close(moments[row], expected_moments(pictures, i, flip), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(moments[0].flip(-1), moments[5], atol=0.01)


def test_class_names_travel(tmp_path, pictures):
    """Catches names of classes that are lost between the folders and the features, and a label asked for by name that
    is another class."""
    extract(pictures, tmp_path, Sharded())
    data = LatentShards(path=str(tmp_path))
    assert data.class_names == pictures.class_names == ("a", "b", "c")
    assert regimes.class_numbers("c, 0-1,2,a", data.class_names) == (2, 0, 1, 2, 0)
    for labels, names, message in (
        ("dog", ("cat", "dogs"), "'dog' is no class number and no range such as 0-9; names are dogs, ..."),
        ("dog", None, "these weights know no names of classes"),
        ("3-1", None, "3-1 is no range"),
        ("", ("cat",), "'' is no class number"),
    ):
        with pytest.raises(ValueError, match=f"--labels={labels}: .*{message}"):
            regimes.class_numbers(labels, names)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["class_names"]  # as written before there were names
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert LatentShards(path=str(tmp_path)).class_names is None


def test_captions_are_clips(tmp_path, coco, text):
    """Catches contexts of a neighbouring image, captions cut inside a character, images in the order of the file."""
    extract(coco, tmp_path / "train", Sharded(), text=text)
    data = CaptionShards(path=str(tmp_path))
    assert (len(data), data.shape, data.context_shape) == (7, (8, 4, 4), (6, 16))
    for i in range(7):
        original = 6 - i  # ids fall
        assert data.captions(i) == [f"picture {original} caption {k} é" for k in range(original % 3 + 1)]
        contexts = text.encode(data.captions(i))
        for k, context in enumerate(contexts):
            moments, read = item(data, i, False, (k + 0.5) / len(contexts))
            torch.testing.assert_close(read, context, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moments, expected_moments(coco, i, False), rtol=1e-3, atol=1e-3)


def test_the_draw_picks_the_caption(tmp_path, coco, text):
    """Catches a draw close to 1 that reads the next image's caption, and a caption that is never read."""
    extract(coco, tmp_path / "train", Sharded("<f4"), text=text)
    extract(coco, tmp_path / "npy" / "train", Npy(), text=text)
    shards, files = CaptionShards(path=str(tmp_path)), CaptionFiles(path=str(tmp_path / "npy"))
    draws = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-53], dtype=torch.float64)
    three = next(i for i in range(7) if len(shards.captions(i)) == 3)
    row = torch.full((6,), three)
    _, contexts = shards.gather(row, torch.zeros(6, dtype=torch.bool), draws)
    choice = text.encode(shards.captions(three))[[0, 0, 1, 1, 2, 2]]
    torch.testing.assert_close(contexts, choice, rtol=1e-5, atol=1e-5)
    assert torch.equal(files.gather(row, torch.zeros(6, dtype=torch.bool), draws)[1], contexts)


def test_npy_is_numbered_as_in_public_code(tmp_path, pictures):
    """Catches mirror images at the wrong numbers, above all after the last, smaller batch; and files that public code
    (np.load with allow_pickle, unpacked in two) cannot read."""
    extract(pictures, tmp_path, Npy(), shard_size=4)
    number = 0
    for start in (0, 4, 8):  # what the public script does: a batch, then its mirror images
        for flip in (False, True):
            for i in range(start, min(start + 4, 10)):
                moments, label = np.load(tmp_path / f"{number}.npy", allow_pickle=True)
                assert moments.dtype == np.float32 and label == pictures.labels[i]
                expected = expected_moments(pictures, i, flip)
                torch.testing.assert_close(torch.from_numpy(moments), expected, rtol=1e-5, atol=1e-5)
                number += 1
    data = LatentFiles(path=str(tmp_path), n_classes=3, batch=4, read_pickles=True)
    extract(pictures, tmp_path / "shards", Sharded("<f4"))
    shards = LatentShards(path=str(tmp_path / "shards"))
    indices, flips = torch.arange(10).repeat(2), torch.arange(20) >= 10
    for a, b in zip(data.gather(indices, flips), shards.gather(indices, flips), strict=True):
        assert torch.equal(a, b)
    assert len(data) == 10 and data.shape == (8, 4, 4)


def test_coco_npy_needs_no_pickle(tmp_path, coco, text):
    """Catches object arrays where public code calls np.load without allow_pickle."""
    extract(coco, tmp_path / "val", Npy(), text=text)
    assert np.load(tmp_path / "val" / "0.npy", allow_pickle=False).shape == (8, 4, 4)
    data = CaptionFiles(path=str(tmp_path), split="val")
    assert data.n_captions.tolist() == [len(captions) for captions in coco.captions]
    for i in (0, 6):
        context = np.load(tmp_path / "val" / f"{i}_0.npy", allow_pickle=False)
        assert np.array_equal(item(data, i, False, 0.0)[1].numpy(), context)
    (tmp_path / "val" / "3.npy").rename(tmp_path / "val" / "30.npy")
    with pytest.raises(ValueError, match="without gaps; .* look at 3"):
        CaptionFiles(path=str(tmp_path), split="val")
    (tmp_path / "val" / "30.npy").rename(tmp_path / "val" / "3.npy")
    (tmp_path / "val" / "6_0.npy").rename(tmp_path / "val" / "6_9.npy")  # was found in the middle of a training
    with pytest.raises(ValueError, match="without gaps; .* look at 6"):
        CaptionFiles(path=str(tmp_path), split="val")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(tmp_path, pictures, workers):
    """Catches batches that come in the order in which the threads finish, and files shared with a wrong position."""
    extract(pictures, tmp_path, Sharded())
    data = LatentShards(path=str(tmp_path))
    item(data, 0, False)  # a shard is open before the workers start
    stream = batches(data, batch_size=6, seed=3, flip=True, workers=workers)
    first = [next(stream) for _ in range(5)]
    again = batches(LatentShards(path=str(tmp_path)), batch_size=6, seed=3, flip=True)
    for (x, labels), (expected, wanted) in zip(first, again, strict=False):
        assert torch.equal(x, expected) and torch.equal(labels, wanted)
    assert torch.equal(item(pickle.loads(pickle.dumps(data)), 4, True)[0], item(data, 4, True)[0])


def test_captions_of_training_follow_the_position(tmp_path, coco, text):
    """Catches a caption chosen by the worker's or the process's own random numbers: another one after a resume."""
    extract(coco, tmp_path / "train", Sharded(), text=text)

    def read(steps: int, **options) -> list:
        stream = batches(CaptionShards(path=str(tmp_path)), batch_size=4, seed=1, **options)
        return [next(stream) for _ in range(steps)]

    whole = read(12)
    for resumed in (read(4, start_step=8), read(4, start_step=8, workers=2)):
        for got, expected in zip(resumed, whole[8:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    ranks = [read(12, rank=rank, world=2) for rank in range(2)]
    for parts, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([contexts for _, contexts in parts]), expected[1])


def test_reading_keeps_nothing(tmp_path):
    """Catches a reader whose memory grows by what it has read: 48 MB here, 42 GB for ImageNet."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    n, size = 1536, 512
    moments = np.zeros((size, 1, 8, 32, 32), "<f2")
    for number in range(3):
        (content,) = Sharded().files(moments, None, None, None)
        (tmp_path / f"{number:05d}.safetensors").write_bytes(content)
    index = make_index(
        n=n,
        n_classes=1,
        shape=(8, 32, 32),
        context=None,
        flips=False,
        dtype="<f2",
        shard_size=size,
        files=[{"name": f"{i:05d}.safetensors"} for i in range(3)],
        plan={},
    )
    (tmp_path / "index.json").write_text(json.dumps(index))
    np.save(tmp_path / "labels.npy", np.zeros(n, "<i4"))
    del moments, content
    data = LatentShards(path=str(tmp_path))
    item(data, 0, False)
    before = resident()
    for start in range(0, n, 16):
        data.gather(torch.arange(start, start + 16), torch.zeros(16, dtype=torch.bool))
    assert resident() - before < 12e6


def test_threads_share_few_open_shards(tmp_path, pictures, monkeypatch):
    """Catches a shard that one thread closes while another reads it."""
    monkeypatch.setattr(features, "OPEN_SHARDS", 1)
    extract(pictures, tmp_path, Sharded(), shard_size=1)
    streams = [batches(LatentShards(path=str(tmp_path)), batch_size=8, seed=5, workers=n) for n in (0, 8)]
    data = LatentShards(path=str(tmp_path))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for _, (x, _), (ahead, _) in zip(range(100), *streams, strict=False):
            assert torch.equal(x, ahead)
        with ThreadPoolExecutor(8) as threads:  # nothing but opening and dropping: list() raises what a thread raised
            list(threads.map(data.shard, [i % 10 for i in range(3000)]))
    finally:
        sys.setswitchinterval(interval)


def test_damage_is_named_by_a_thread(tmp_path, pictures):
    """Catches a thread that dies in silence: training would wait for ever."""
    extract(pictures, tmp_path, Sharded(), shard_size=1)
    os.truncate(tmp_path / "00000.safetensors", 200)
    with pytest.raises(ValueError, match=r"00000\.safetensors.* cut"):
        for _, _ in zip(range(20), batches(LatentShards(path=str(tmp_path)), batch_size=2, workers=2), strict=False):
            pass


def test_few_shards_are_open(tmp_path, pictures, monkeypatch):
    """Catches a descriptor per shard: more shards than a process may open files."""
    monkeypatch.setattr(features, "OPEN_SHARDS", 2)
    extract(pictures, tmp_path, Sharded(), shard_size=1)
    data = LatentShards(path=str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    values = [item(data, i, False)[0] for i in range(10)]
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    assert all(torch.equal(item(data, i, False)[0], value) for i, value in enumerate(values))


def test_what_cannot_be_read_says_why(tmp_path, pictures, coco, text):
    """Catches features that are read although they are unfinished, cut, of the other kind, or lack mirror images."""
    extract(pictures, tmp_path / "a", Sharded(), flips=False)
    extract(coco, tmp_path / "b" / "train", Sharded(), text=text)
    plain = LatentShards(path=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="mirror image was asked for, .*dataset.random_flip=False"):
        item(plain, 0, True)
    with pytest.raises(IndexError):
        item(plain, 10, False)
    with pytest.raises(IndexError):
        item(plain, -1, False)
    with pytest.raises(ValueError, match="reference statistics from the images"):
        plain.pixels(0)
    with pytest.raises(ValueError, match="dataset.name=captions"):
        LatentShards(path=str(tmp_path / "b" / "train"))
    with pytest.raises(ValueError, match="dataset.name=latents"):
        CaptionShards(path=str(tmp_path), split="a")
    with pytest.raises(ValueError, match="nothing was extracted there"):
        LatentShards(path=str(tmp_path))
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(ValueError, match="not finished; run the same command again"):
        LatentShards(path=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="read_pickles=True"):
        LatentFiles(path=str(tmp_path))
    shard = tmp_path / "b" / "train" / "00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 5)
    with pytest.raises(ValueError, match="it was cut"):
        CaptionShards(path=str(tmp_path / "b")).captions(6)
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        item(CaptionShards(path=str(tmp_path / "b")), 6, False, 0.0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 31])
def test_counting_files(tmp_path, n):
    """Catches a search that is off by one at a power of two."""
    for i in range(n):
        (tmp_path / f"{i}.npy").touch()
    assert count_files(str(tmp_path)) == n


# ----------------------------------------------------------------------------------------------------------------------
# Object arrays


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def npy_of(pickled: bytes, path: Path) -> str:
    array = object_array([1, 2])
    path.write_bytes(array[: array.index(b"\n") + 1] + pickled)
    return str(path)


@pytest.mark.parametrize("hidden", ["whole", "element", "label", "state"])
def test_malicious_pickles_are_refused(tmp_path, hidden):
    """Catches an unpickler that looks a name up before it refuses it, or refuses only the outermost object."""
    sprung = tmp_path / "sprung"
    call = Call(open, str(sprung), "w")
    array = np.empty(2, object)
    array[:] = [np.zeros(3, np.float32), 1]
    if hidden == "element":
        array[0] = call
    elif hidden == "label":
        array[1] = [call]
    elif hidden == "state":
        array = Call(array.__reduce__()[0], call, (0,), b"b")
    path = npy_of(pickle.dumps(call if hidden == "whole" else array), tmp_path / "x.npy")
    with pytest.raises(ValueError, match="is refused: .*it names .*open"):
        read_objects(path)
    assert not sprung.exists()
    with open(path, "rb") as file:  # the same file does harm where it is unpickled
        np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
        with contextlib.suppress(TypeError):
            pickle.load(file)
    assert sprung.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x03.",
        b"cnumpy\nndarray\n.",
        b"cnumpy\nfromfile\n.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\ndtype\n}(S'numpy'\nNdb.",  # sets attributes of a stand-in
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 1}),
        pickle.dumps(np.zeros(3)),
        pickle.dumps(np.array([np.datetime64("2020-01-01"), None], object)),
        pickle.dumps(np.array([np.array(["text"]), 1], object), protocol=5),
    ],
)
def test_other_pickles_are_refused(tmp_path, pickled):
    """Catches anything but an object array of arrays, numbers and texts that passes, or fails without its name."""
    with pytest.raises(ValueError, match="x.npy is refused"):
        read_objects(npy_of(pickled, tmp_path / "x.npy"))


def test_files_of_other_kinds_are_refused(tmp_path):
    """Catches a plain array taken for an object array, and an error that does not name the file."""
    np.save(tmp_path / "plain.npy", np.zeros(2))
    (tmp_path / "text.npy").write_text("hello")
    for name in ("plain.npy", "text.npy"):
        with pytest.raises(ValueError, match=f"{name} is refused"):
            read_objects(str(tmp_path / name))
    with pytest.raises(ValueError, match="absent.npy does not exist"):
        read_objects(str(tmp_path / "absent.npy"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", ">f4", "uint8", "bool"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpys_object_arrays_are_read(tmp_path, dtype, order):
    """Catches wrong byte order, transposed arrays and unknown label types: files of public code, by np.save."""
    values = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 4, 5)), dtype=dtype, order=order)
    for label in (3, np.int64(3), np.array(3), "a prompt é"):
        array = np.empty(2, object)
        array[0], array[1] = values, label
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        for path in (tmp_path / "x.npy", tmp_path / "y.npy"):
            if path.name == "y.npy":
                path.write_bytes(object_array([values, label]))
            read, read_label = read_objects(str(path))
            assert np.array_equal(read, values) and read.dtype == values.dtype
            assert read_label == label


def test_written_pickles_name_the_module_that_every_numpy_has():
    """Catches files that numpy 1, which public code was written for, cannot load."""
    content = object_array([np.zeros(3, np.float32), 1])
    assert b"numpy.core.multiarray" in content and b"numpy._core" not in content


# ----------------------------------------------------------------------------------------------------------------------
# Killed and continued


class Slow(ImageFolder):
    """Pictures that take long enough to be killed over."""

    def pixels(self, index: int) -> torch.Tensor:
        time.sleep(0.02)
        return super().pixels(index)


def in_child(data, out: Path, layout, environment: dict | None = None, dies_at: int = -1) -> multiprocessing.Process:
    """Start an extraction in a process of its own. Forked, because importing everything again takes seconds.

    `dies_at`: the number of the file in the midst of whose writing it kills itself.
    """
    written = []

    def replace_or_die(part: str, path: Path, replace=os.replace) -> None:
        if len(written) == dies_at:
            os.truncate(part, os.path.getsize(part) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        replace(part, path)

    def work():
        os.replace = replace_or_die
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        # accelerate gives each of several processes its share of the cores, and the last bit depends on the threads
        os.environ.update({"OMP_NUM_THREADS": "1"} | (environment or {}))
        AcceleratorState._reset_state(reset_partial_state=True)
        run = Run(out, Accelerator(cpu=True))
        with run.stopping:
            extract(data, out, layout, run=run, shard_size=2)
        PartialState().destroy_process_group()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Slow:
    return Slow(path=picture_folder(tmp_path_factory.mktemp("many"), 24), resolution=8)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> ImageFolder:
    return ImageFolder(path=picture_folder(tmp_path_factory.mktemp("few"), 5), resolution=8)


@pytest.mark.parametrize("dies_at", range(9))
def test_no_moment_to_die_is_a_bad_one(tmp_path, few, dies_at):
    """Catches what random kills seldom hit: death within and between the writing of plan, shard, record and index."""
    for out, moment in (("whole", -1), ("out", dies_at), ("out", -1)):
        process = in_child(few, tmp_path / out, Sharded(), dies_at=moment)
        process.join()
        assert process.exitcode == (0 if moment < 0 else -signal.SIGKILL)
        if 0 <= moment:
            with pytest.raises(ValueError, match="has no index.json"):
                LatentShards(path=str(tmp_path / out))
    assert len(hashes(tmp_path / "out")) == 9  # plan, 3 x (shard, record), labels, index
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path, many):
    """Catches shards that two processes both take or both leave, also when they continue what one began."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = in_child(many, tmp_path / "one", Sharded())
    begun = in_child(many, tmp_path / "two", Sharded())
    while begun.is_alive() and len(list((tmp_path / "two").glob(".extract/0*.json"))) < 3:
        time.sleep(0.001)
    begun.kill()
    begun.join()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared for rank in range(2)]
    both = [in_child(many, tmp_path / "two", Sharded(), environment) for environment in ranks]
    for process in (alone, *both):
        process.join()
        assert process.exitcode == 0
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_a_finished_extraction_is_only_checked(tmp_path, pictures):
    """Catches a second run that computes everything again."""
    first = extract(pictures, tmp_path, Sharded())
    second = extract(pictures, tmp_path, Sharded())
    assert second["computed"] == 0 and second["sha256"] == first["sha256"]


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
@pytest.mark.parametrize("layout", [Sharded(), Npy()], ids=["sharded", "npy"])
def test_damaged_files_are_found_and_made_again(tmp_path, pictures, damage, layout):
    """Catches a verification that looks at records or sizes alone."""
    extract(pictures, tmp_path, layout)
    before = hashes(tmp_path)
    file = tmp_path / ("00001.safetensors" if isinstance(layout, Sharded) else "9.npy")
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        changed = content[:-1] + (bytes([content[-1] ^ 1]) if damage == "byte" else b"")
        file.write_bytes(changed)
    with pytest.raises(ValueError, match="are not what was computed .*run the same command again"):
        extract(pictures, tmp_path, layout)
    assert extract(pictures, tmp_path, layout)["computed"] == 4
    assert hashes(tmp_path) == before


def test_other_settings_do_not_continue(tmp_path, pictures):
    """Catches a folder made half with one setting and half with another, and foreign features overwritten."""
    extract(pictures, tmp_path / "a", Sharded())
    with pytest.raises(ValueError, match=r"other settings \(flips was True and is False\)"):
        extract(pictures, tmp_path / "a", Sharded(), flips=False)
    with pytest.raises(ValueError, match="dtype was <f2 and is <f4"):
        extract(pictures, tmp_path / "a", Sharded("<f4"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.npy").touch()
    with pytest.raises(ValueError, match="do not come from this command"):
        extract(pictures, tmp_path / "b", Npy())


def test_features_that_do_not_fit_the_type_are_refused(tmp_path, pictures, monkeypatch):
    """Catches infinities in the shards: a moment beyond 65504 in float16."""
    monkeypatch.setattr(KL, "moments", lambda self, x: torch.full((len(x), 8, 4, 4), 1e5))
    with pytest.raises(ValueError, match="not finite as float16: use --precision fp32 and --dtype float32"):
        extract(pictures, tmp_path / "a", Sharded("<f2"))
    extract(pictures, tmp_path / "b", Sharded("<f4"))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_command_on_class_folders(tmp_path, pictures, monkeypatch, capsys):
    """Catches options that do not reach the work: the folder written by the command equals the one by the function."""
    monkeypatch.setattr(extract_features, "KL", functools.partial(KL, **SMALL))
    arguments = f"imagenet --images {pictures.files.path} --resolution 8 --autoencoder random --batch_size 2"
    arguments += f" --shard_size 4 --workers 0 --dtype float32 --no-flips --cpu --out {tmp_path / 'a'}"
    extract_features.main(arguments.split())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    again = extract(pictures, tmp_path / "b", Sharded("<f4"), flips=False)
    assert summary["sha256"] == again["sha256"] and summary["images"] == 10


def test_told_to_stop_it_ends_after_the_batch(tmp_path, many):
    """Catches a SIGTERM that tears the work, is answered with a traceback, or exits with 0 as if all was done."""
    process = in_child(many, tmp_path / "out", Sharded())
    while process.is_alive() and not list(tmp_path.glob("out/.extract/0*.json")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert 1 <= len(list(tmp_path.glob("out/.extract/0*.json"))) < 12 and not list(tmp_path.rglob("*.part"))
    for out in ("out", "whole"):
        process = in_child(many, tmp_path / out, Sharded())
        process.join()
        assert process.exitcode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("layout", ["sharded", "npy"])
def test_command_for_text(tmp_path, coco, text, monkeypatch, capsys, layout):
    """Catches a text-to-image folder that lacks something training needs: contexts, the empty context, the prompts."""
    monkeypatch.setattr(extract_features, "KL", functools.partial(KL, **SMALL))
    monkeypatch.setattr(extract_features, "ClipText", lambda path, device: text)
    annotations = str(Path(coco.path).parent / "captions.json")
    common = f"--out {tmp_path} --layout {layout} --cpu"
    encoder = "--resolution 8 --autoencoder random --batch_size 2 --workers 0"
    for split in ("train", "val"):
        command = f"coco --split {split} --images {coco.path} --captions {annotations} {encoder} {common}"
        extract_features.main(command.split())
    extract_features.main(f"empty {common}".split())
    (tmp_path / "prompts.txt").write_text("a red cat\n\n two dogs \n")
    extract_features.main(f"prompts --prompts {tmp_path / 'prompts.txt'} {common}".split())
    data = CaptionShards if layout == "sharded" else CaptionFiles
    for split in ("train", "val"):
        assert len(data(path=str(tmp_path), split=split)) == 7
    torch.testing.assert_close(features.empty_context(str(tmp_path)), text.encode([""])[0], rtol=0, atol=1e-6)
    for i, expected in enumerate(["a red cat", "two dogs"]):  # as public code reads them
        prompt, context = np.load(tmp_path / "run_vis" / f"{i}.npy", allow_pickle=True)
        assert prompt == expected
        wanted = text.encode([expected])[0]  # alone; the command encodes both in one batch
        torch.testing.assert_close(torch.from_numpy(context), wanted, rtol=1e-6, atol=1e-6)
    (tmp_path / "prompts.txt").write_text("only one")
    with pytest.raises(ValueError, match="files of more prompts than these 1"):
        extract_features.main(f"prompts --prompts {tmp_path / 'prompts.txt'} {common}".split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--layout npy --dtype float16", "stores float32"),
        ("--layout npy --no-flips", "always mirror images"),
        ("--layout npy --shard_size 100", "groups ImageNet by 256"),
        ("--resolution 100", "multiple of 8"),
        ("--batch_size 0", "at least 1"),
        ("--workers -1", "at least 0"),
    ],
)
def test_impossible_arguments(arguments, words, capsys):
    """Catches an option that is silently overruled by the layout."""
    with pytest.raises(SystemExit) as stop:
        extract_features.parse(f"imagenet --images x --out y {arguments}".split())
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_images_without_classes_are_refused(tmp_path):
    """Catches labels of -1 in the features of a folder without class folders."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    options = extract_features.parse(f"imagenet --images {tmp_path} --out {tmp_path} --resolution 8".split())
    with pytest.raises(ValueError, match="has no class folders"):
        extract_features.open_images(options)


@pytest.mark.parametrize("fault", ["no json", "other json", "no caption", "no image"])
def test_captions_files_that_cannot_be_used(tmp_path, fault):
    """Catches an image without captions (no context to draw) and a run that meets an absent image after hours."""
    path, captions = coco_folder(tmp_path, 4)
    content = json.loads(Path(captions).read_text())
    if fault == "no json":
        Path(captions).write_text("hello")
    elif fault == "other json":
        Path(captions).write_text('{"images": [{"name": 1}], "annotations": []}')
    elif fault == "no caption":
        content["annotations"] = content["annotations"][1:]
        content["images"][0]["id"] = 1000
        Path(captions).write_text(json.dumps(content))
    else:
        next(Path(path).rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="captions.json"):
        CocoImages(path=path, captions=captions, resolution=8)
