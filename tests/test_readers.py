"""Files that others made: damaged at random in every reader of data and codecs. MUTATIONS=500 tries more of them."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from libs.codecs import KL
from libs.codecs.kl import compvis
from libs.data.coco import CocoImages
from libs.data.extract import begin_extraction, verify
from libs.data.fashion_mnist import FashionMNIST
from libs.data.features import CaptionShards, LatentShards
from libs.data.features_npy import CaptionFiles, LatentFiles
from libs.data.images import ImageFolder
from libs.data.npy import object_array, plain_array
from libs.data.shards import Sharded, make_index
from libs.files import read_lines
from tests.test_data import make_zip

pytest.importorskip("diffusers")
MUTATIONS = int(os.environ.get("MUTATIONS", 80))
SMALL = {"channels": (8, 16), "layers": 1, "groups": 4}
FORMATS = ("png", "jpg", "gif", "webp", "bmp")


# ---- one valid example of everything, and how it is read


def picture(kind: str, i: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def shards(n: int, text: bool) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((n, 1, 8, 2, 2)).astype("<f2")
    captions = [[f"é {i}", "b"] for i in range(n)] if text else None
    contexts = rng.standard_normal((2 * n, 3, 4)).astype("<f2") if text else None
    (shard,) = Sharded().files(moments, None, captions, contexts)
    index = make_index(
        n=n,
        n_classes=0 if text else 2,
        shape=(8, 2, 2),
        context=(3, 4) if text else None,
        flips=False,
        dtype="<f2",
        shard_size=n,
        files=[{"name": "00000.safetensors", "images": n, "sha256": ""}],
        plan={},
        class_names=None if text else ["cat", "dog"],
    )
    index = json.dumps(index).encode()
    if text:
        return {
            "train/00000.safetensors": shard,
            "train/index.json": index,
            "empty_context.npy": plain_array(np.ones((3, 4), "f4")),
        }
    return {"00000.safetensors": shard, "index.json": index, "labels.npy": plain_array(np.arange(n, dtype="<i4") % 2)}


def coco() -> dict[str, bytes]:
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"image_id": i, "id": i, "caption": "a cat 🐱"} for i in range(2)],
    }
    pictures = {f"{i}.jpg": picture("jpg", i) for i in range(2)}
    return {"captions.json": json.dumps(content).encode()} | pictures


def weights(folder: Path) -> dict[str, bytes]:
    vae = KL(path="random", **SMALL).vae
    torch.save(vae.state_dict(), folder / "vae.pth")
    save_file({compvis(key, 2): value.contiguous() for key, value in vae.state_dict().items()}, folder / "vae.st")
    files = {name: (folder / name).read_bytes() for name in ("vae.pth", "vae.st")}
    (folder / "vae.pth").unlink(), (folder / "vae.st").unlink()
    return files


def read_images(path: Path) -> None:
    data = ImageFolder(path=str(path), resolution=8, labels=True)
    for i in range(len(data)):
        data.pixels(i)


def read_latents(folder: Path, kind=LatentShards, **options) -> None:
    data = kind(path=str(folder), **options)
    rows = torch.arange(len(data)), torch.zeros(len(data), dtype=torch.bool)
    data.gather(*rows, *[torch.linspace(0, 0.99, len(data))] * data.draws)
    if hasattr(data, "empty"):
        data.empty()
    if kind is CaptionShards:
        [data.captions(i) for i in range(len(data))]


def read_plan(folder: Path) -> None:
    begin_extraction(folder, {"flips": True})
    verify(folder, {0: ["a.npy"]})


def examples(folder: Path) -> list[tuple[dict[str, bytes], object]]:
    """Files by name, and a function that reads the folder they are in."""
    pictures = {f"a/{kind}.{kind}": picture(kind) for kind in FORMATS}
    listed = {"dataset.json": json.dumps({"labels": [[name, 1] for name in pictures]}).encode()}
    make_zip(folder / "x.zip", pictures)
    archive = (folder / "x.zip").read_bytes()
    (folder / "x.zip").unlink()
    moments = np.ones((8, 2, 2), np.float32)
    vae = weights(folder)
    return [
        *(({name: data}, read_images) for name, data in pictures.items()),
        (listed | pictures, read_images),
        ({"x.zip": archive}, lambda folder: read_images(folder / "x.zip")),
        (shards(3, False), read_latents),
        (shards(3, True), lambda folder: read_latents(folder, CaptionShards)),
        (
            {f"{i}.npy": object_array([moments, 1]) for i in range(2)},
            lambda folder: read_latents(folder, LatentFiles, read_pickles=True),
        ),
        (
            {"train/0.npy": plain_array(moments), "train/0_0.npy": plain_array(np.ones((3, 4), "f4"))}
            | {"empty_context.npy": plain_array(np.ones((3, 4), "f4"))},
            lambda folder: read_latents(folder, CaptionFiles),
        ),
        (
            {
                "train-images-idx3-ubyte.gz": gzip.compress(
                    bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28] + [7] * 784)
                ),
                "train-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]),
            },
            lambda folder: FashionMNIST(path=str(folder)),
        ),
        (coco(), lambda folder: CocoImages(path=str(folder), captions=str(folder / "captions.json"), resolution=8)),
        ({"prompts.txt": "\ufeffa cat\r\n\x0cun café\u2028x\n".encode()}, lambda f: read_lines(f / "prompts.txt", "x")),
        ({"vae.pth": vae["vae.pth"]}, lambda folder: KL(path=str(folder / "vae.pth"), **SMALL).to("cpu")),
        ({"vae.st": vae["vae.st"]}, lambda folder: KL(path=str(folder / "vae.st"), **SMALL).to("cpu")),
        (
            {
                ".extract/plan.json": b'{"flips": true}',
                ".extract/00000.json": b'{"files": 1, "bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223'
                b'b00361a396177a9cb410ff61f20015ad"}',
                "a.npy": b"abc",
            },
            read_plan,
        ),
    ]


# ---- what happens to files


def mutated(data: bytes, draw: random.Random) -> bytes | None:
    """A damaged copy; None stands for a named pipe in place of the file."""
    at, other = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(14)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[other:]
    if kind == 2:
        return data[:at] + draw.randbytes(draw.choice([1, 8, 300])) + data[at:]
    if kind == 3:
        return data[:other] + data[at:]
    if kind == 4:
        return b""
    if kind == 5:
        return draw.choice(
            [b"<!DOCTYPE html><p>not found", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99]
        )
    if kind == 6:
        return b"[" * 100_000 + b"]" * 100_000
    if kind == 7:
        return b'{"' + b"k" * 1_000_000 + b'": 1}'
    if kind == 8:
        return None
    if kind == 9:  # a number in a text
        numbers = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        at = draw.choice(numbers or [0])
        return (
            data[:at] + draw.choice([b"-1", b"NaN", b"1e400", b"9" * 30, b"9" * 5000, b'"x"', b"null"]) + data[at + 1 :]
        )
    if kind == 10:  # a name or a text
        quotes = [i for i, byte in enumerate(data) if byte == ord('"')] or [0]
        at = draw.choice(quotes)
        return (
            data[:at] + draw.choice([b'"../../../etc/passwd', b'"\\u0000', b'"\\ud800', b"[", b"{}"]) + data[at + 1 :]
        )
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 4, 30])):
        changed[draw.randrange(len(changed))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    return bytes(changed)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def too_long(*_):
    raise AssertionError("reading took longer than 20 seconds")  # no OSError, which a reader may take for the file's


def refuse(*_, **__):
    raise AssertionError("a reader started a program")


def test_damaged_files_are_refused_by_name(tmp_path, monkeypatch):
    """Catches a reader that ends in a traceback, does not say which file, waits, runs something, or changes files."""
    campaign(examples(tmp_path), tmp_path, monkeypatch)


def campaign(readers, tmp_path, monkeypatch) -> None:
    """Damage one file of an example at a time, and read it."""
    for module, name in ((os, "system"), (os, "popen"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, refuse)
    previous = signal.signal(signal.SIGALRM, too_long)
    refusals, faults = 0, []
    for number in range(MUTATIONS):
        files, read = readers[number % len(readers)]
        draw = random.Random(number)
        name = draw.choice(sorted(files))
        folder = tmp_path / str(number)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            data = mutated(data, draw) if path == name else data
            (folder / path).write_bytes(data) if data is not None else os.mkfifo(folder / path)
        before = contents(folder)
        signal.alarm(20)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder)
        except (ValueError, FileNotFoundError) as error:
            refusals += 1
            if not any(Path(path).name in str(error) for path in files):
                faults.append(f"{number} {name}: no file in: {str(error)[:200]}")
        except (Exception, AssertionError) as error:
            faults.append(f"{number} {name}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
        after = contents(folder)
        if read is read_plan:  # the record of a damaged shard is dropped, which is what it is for
            before.pop(".extract/00000.json"), after.pop(".extract/00000.json", None)
        if before != after:
            faults.append(f"{number} {name}: files changed")
    signal.signal(signal.SIGALRM, previous)
    assert not faults, "\n".join(faults)
    assert refusals > MUTATIONS / 3, "the damage is too small to be seen"


def test_undamaged_files_are_read(tmp_path):
    """Catches examples that are refused for another reason than their damage."""
    for number, (files, read) in enumerate(examples(tmp_path)):
        for path, data in files.items():
            (tmp_path / str(number) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / path).write_bytes(data)
        read(tmp_path / str(number))
