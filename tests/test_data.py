"""Data sets, and the order in which training reads them."""

import gzip
import io
import json
import os
import pickle
import shutil
import signal
import time
import warnings
import zipfile
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import item
from PIL import Image
from torchvision import datasets as published

from libs.data import DATASETS, Dataset, batches, workers
from libs.data.images import centre_crop
from libs.data.storage import natural
from scripts import check_images

IMAGES = ("digits", "images", "cifar10", "fashion_mnist", "digits_and_clothes", "celeba", "imagenet", "synthetic")
BAD = b"\x89PNG\r\n\x1a\n and then nothing of a picture"


def picture(number: int, width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(noise.squeeze(-1) if mode == "L" else noise)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def make_folder(path, files: dict[str, bytes]):
    path.mkdir()
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def make_zip(path, files: dict[str, bytes], compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


CLASSES = {
    f"{name}/img{i}.png": png(picture(10 * k + i)) for k, name in enumerate(["b10", "b2", "a"]) for i in (10, 2, 1)
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Builds any data set of the registry, with small files in the published layouts."""

    def cifar10():
        folder = tmp_path / "cifar10" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
            data = np.random.default_rng(i).integers(0, 256, (2, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i, i + 1]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        for attribute in ("train_list", "test_list"):  # md5 sums are class attributes; None asks for existence only
            files = [[name, None] for name, _ in getattr(published.CIFAR10, attribute)]
            monkeypatch.setattr(published.CIFAR10, attribute, files)
        monkeypatch.setattr(published.CIFAR10, "meta", {**published.CIFAR10.meta, "md5": None})
        return {"path": str(tmp_path / "cifar10")}

    def celeba(images=None):
        images = images or [picture(i, 178, 218) for i in range(3)]
        folder = tmp_path / "celeba" / "celeba"
        (folder / "img_align_celeba").mkdir(parents=True)
        names = [f"{i + 1:06d}.jpg" for i in range(len(images) + 1)]
        for name, image in zip(names, images, strict=False):  # the last name is of the test split: no file, no item
            (folder / "img_align_celeba" / name).write_bytes(png(image))
        split = [f"{name} {0 if name != names[-1] else 2}" for name in names]
        (folder / "list_eval_partition.txt").write_text("\n".join(split) + "\n")
        (folder / "identity_CelebA.txt").write_text("".join(f"{name} 7\n" for name in names))
        for table, columns in (("list_bbox_celeba", 4), ("list_landmarks_align_celeba", 10), ("list_attr_celeba", 40)):
            header = f"{len(names)}\n" + " ".join(f"c{i}" for i in range(columns)) + "\n"
            rows = "".join(name + " 1" * columns + "\n" for name in names)
            (folder / f"{table}.txt").write_text(header + rows)
        monkeypatch.setattr(published.CelebA, "file_list", [(a, None, b) for a, _, b in published.CelebA.file_list])
        return {"path": str(tmp_path / "celeba")}

    def imagenet():
        files = {
            "train/n02/n02_7.png": png(picture(1, 40, 20)),
            "train/deeper/n01/n01_3.JPEG": png(picture(2, 9, 11)),
            "train/n01_1.png": png(picture(3, 16, 16)),
            "val/n09_1.png": png(picture(4)),
        }
        return {"path": make_folder(tmp_path / "imagenet", files), "resolution": 8}

    def images():
        return {"path": make_zip(tmp_path / "images.zip", CLASSES)}

    def fashion_mnist(split="train"):
        folder = tmp_path / "fashion"
        folder.mkdir()
        for prefix, number in (("train", 3), ("t10k", 2)):
            (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(clothes(number)))
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
                bytes([0, 0, 8, 1, 0, 0, 0, number, *range(9, 9 - number, -1)])
            )
        return {"path": str(folder), "split": split}

    settings = {
        "fashion_mnist": fashion_mnist,
        "digits_and_clothes": lambda: {"path": fashion_mnist()["path"]},
        "cifar10": cifar10,
        "celeba": celeba,
        "imagenet": imagenet,
        "images": images,
    }

    def build(name, **more):
        return DATASETS[name](**(settings[name](**more) if name in settings else more))

    return build


# ---- every data set


@pytest.mark.parametrize("name", IMAGES)
def test_contract(name, make):
    """An item that changes between reads, a wrong range, labels out of range, statistics of mirrored images."""
    data = make(name)
    assert data.name == name and len(data) > 0
    for i in {0, len(data) // 2, len(data) - 1}:
        x, label = item(data, i, False)
        assert x.shape == data.shape and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1
        assert torch.equal(data.pixels(i), ((x + 1) / 2 * 255).round().to(torch.uint8))
        assert torch.equal(item(data, i, False)[0], x) and torch.equal(item(data, i, True)[0], x.flip(-1))
        assert 0 <= label < data.n_classes if data.n_classes else label == -1
    with pytest.raises(IndexError):
        item(data, len(data), False)


@pytest.mark.parametrize("name", IMAGES)
def test_gather_is_get_for_many(name, make):
    """A batch path that orders, mirrors or labels rows unlike single items, or edits the stored data."""
    data = make(name)
    indices, flips = torch.tensor([2, 0, 2, 1]), torch.tensor([True, False, False, True])
    x, labels = data.gather(indices, flips)
    items = [item(data, int(i), bool(f)) for i, f in zip(indices, flips, strict=True)]
    assert torch.equal(x, torch.stack([x for x, _ in items]))
    assert labels.dtype == torch.int64 and labels.tolist() == [label for _, label in items]


@pytest.mark.parametrize("name", IMAGES)
def test_pickled_copy_reads_the_same(name, make):
    """Workers that are not forked get a pickled copy: an open archive inside it could not travel."""
    data = make(name)
    data.pixels(0)
    assert torch.equal(pickle.loads(pickle.dumps(data)).pixels(1), data.pixels(1))


# ---- single data sets


def test_digits_levels():
    """Digits divided by 15 or 255, or statistics on another scale than decoded samples."""
    data = DATASETS["digits"]()
    assert data.shape == (1, 8, 8) and len(data) == 1797 and data.n_classes == 10
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    x, _ = data.gather(torch.arange(1797), torch.zeros(1797, dtype=torch.bool))
    assert sorted(x.unique().tolist()) == [i / 8 - 1 for i in range(17)]
    levels = torch.stack([data.pixels(i) for i in range(1797)])
    assert torch.equal(levels, ((x + 1) / 2 * 255).round().to(torch.uint8))


def test_cifar10_layout(make):
    """Channels last read as channels first; the test batch among the training images."""
    data = make("cifar10")
    stored = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    assert len(data) == 10 and data.shape == (3, 32, 32)
    assert data.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert np.array_equal(data.pixels(1).flatten().numpy(), stored[1])
    expected = (torch.from_numpy(stored[1]).float() / 255 - 0.5) / 0.5  # ToTensor, Normalize(0.5, 0.5)
    torch.testing.assert_close(item(data, 1, False)[0].flatten(), expected)


def test_fashion_mnist_layout(make, tmp_path):
    """Test images among the training ones, a picture off its centre, rows read as columns, names of other classes."""
    data = make("fashion_mnist")
    assert len(data) == 3 and data.shape == (1, 32, 32) and data.n_classes == 10
    assert data.labels.tolist() == [9, 8, 7] and data.class_names[9] == "Ankle boot" and len(data.class_names) == 10
    stored = np.frombuffer(clothes(3), np.uint8, offset=16).reshape(3, 28, 28)
    assert np.array_equal(data.pixels(1)[0, 2:-2, 2:-2].numpy(), stored[1])
    assert data.pixels(1).sum() == stored[1].sum() and item(data, 1, False)[0][0, 0, 0] == -1
    path = str(tmp_path / "fashion")
    assert len(DATASETS["fashion_mnist"](path=path, split="test")) == 2
    refused("fashion_mnist", "split is 'val'; it must be train or test", split="val")
    refused("fashion_mnist", "dataset.path='x' must hold train-images-idx3-ubyte", "dataset-fashion-mnist", path="x")
    with mock.patch.object(published.FashionMNIST, "download", side_effect=RuntimeError("no host")):  # was a traceback
        refused("fashion_mnist", "no host; put the files there", path=str(tmp_path / "none"), download=True)
    (tmp_path / "fashion" / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 1, 1]))
    refused("fashion_mnist", "t10k-labels-idx1-ubyte", "(2, 28, 28) and (3,)", path=path, split="test")
    (tmp_path / "fashion" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(clothes(3))[:-50])
    refused("fashion_mnist", "train-images-idx3-ubyte.gz cannot be read", path=path)


def test_digits_and_clothes(make):
    """Clothes numbered as digits, digits of 17 levels among bytes, a picture that is cut instead of made smaller."""
    data, digits = make("digits_and_clothes"), DATASETS["digits"]()
    assert data.shape == (1, 16, 16) and data.n_classes == 20 and len(data) == 1797 + 3
    assert data.labels[-3:].tolist() == [19, 18, 17] and data.class_names[19] == "Ankle boot"
    assert torch.equal(data.pixels(4)[:, ::2, 1::2], digits.pixels(4)) and data.class_names[data.labels[4]] == "4"
    stored = np.pad(np.frombuffer(clothes(3), np.uint8, offset=16).reshape(3, 28, 28), ((0, 0), (2, 2), (2, 2)))
    assert data.pixels(1797 + 1)[0, 7, 5] == round(stored[1, 14:16, 10:12].mean())


def clothes(number: int) -> bytes:
    """The content of an idx file of pictures."""
    noise = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
    return bytes([0, 0, 8, 3, 0, 0, 0, number, 0, 0, 0, 28, 0, 0, 0, 28]) + noise.tobytes()


@pytest.mark.parametrize("row, column, corner", [(57, 25, (0, 0)), (184, 152, (-1, -1)), (57, 152, (0, -1))])
def test_celeba_crop_box(row, column, corner, make):
    """A box that is off by one, or with rows and columns exchanged: statistics would not match the published ones."""
    inside, outside = np.zeros((218, 178, 3), np.uint8), np.full((218, 178, 3), 255, np.uint8)
    inside[row, column] = 255
    outside[57:185, 25:153] = 0
    data = make("celeba", images=[Image.fromarray(inside), Image.fromarray(outside)])
    assert len(data) == 2 and data.shape == (3, 64, 64)
    marked = data.pixels(0)[0]
    assert marked[corner] == marked.max() > 0
    assert data.pixels(1).max() == 0


def test_imagenet_classes(make):
    """Classes taken from folders instead of file names; validation images or a depth left out."""
    data = make("imagenet")
    assert data.class_names == ("n01", "n02") and data.shape == (3, 8, 8)
    assert [name.decode() for name in data.names] == ["deeper/n01/n01_3.JPEG", "n01_1.png", "n02/n02_7.png"]
    assert data.labels.tolist() == [0, 0, 1]


def test_centre_crop():
    """A crop that is off centre, or a resize that skips the halving by a box filter."""
    strip = np.zeros((64, 256, 3), np.uint8)
    strip[:, 96:160] = 255
    for image in (strip, strip.transpose(1, 0, 2)):
        assert np.asarray(centre_crop(Image.fromarray(image), 32)).min() == 255
    point = np.zeros((128, 128, 3), np.uint8)
    point[40, 72] = 255
    reduced = np.asarray(centre_crop(Image.fromarray(point), 32))  # two halvings: a sixteenth, in one pixel
    assert np.argwhere(reduced[..., 0]).tolist() == [[10, 18]] and reduced[10, 18, 0] == 16
    assert centre_crop(picture(0, 131, 67), 32).size == (32, 32)
    assert centre_crop(picture(0, 5, 7), 32).size == (32, 32)
    same = picture(0, 32, 32)
    assert np.array_equal(centre_crop(same, 32), same)


def test_synthetic_classes_and_images_differ():
    """Images that repeat, or classes that cannot be told apart: a quick run would test less than it seems to."""
    data = DATASETS["synthetic"](resolution=16, n_classes=4, n_images=40)
    images = torch.stack([data.pixels(i) for i in range(40)])
    assert len(images.flatten(1).unique(dim=0)) == 40
    assert data.labels.tolist() == [i % 4 for i in range(40)]
    colour = torch.stack([images[data.labels == k].float().std((0, 2, 3)) for k in range(4)])  # (classes, C)
    assert torch.pdist(colour).min() > 5
    again = DATASETS["synthetic"](resolution=16, n_classes=4, n_images=40)
    assert torch.equal(images, torch.stack([again.pixels(i) for i in range(40)]))
    assert DATASETS["synthetic"](n_classes=0, channels=1).labels.unique().tolist() == [-1]


# ---- folders and zips


def test_folder_and_zip_are_the_same_data_set(tmp_path):
    """An order that follows the archive or the file system; thumbnails of a desktop read as images."""
    clutter = {
        "__MACOSX/a/img1.png": BAD,
        "a/.img1.png": BAD,
        ".cache/x.png": BAD,
        "a/readme.txt": b"",
        "b2/x.npy": b"",
    }
    files = {**clutter, **CLASSES}
    backwards = {**dict(reversed(files.items())), "a/": b""}
    folder = DATASETS["images"](path=make_folder(tmp_path / "folder", files))
    archive = DATASETS["images"](path=make_zip(tmp_path / "x.zip", backwards))
    wrapped = DATASETS["images"](path=make_zip(tmp_path / "y.zip", {f"data/train/{n}": d for n, d in files.items()}))
    order = [f"{k}/img{i}.png" for k in ("a", "b2", "b10") for i in (1, 2, 10)]
    assert [name.decode() for name in folder.names] == order
    for data in (folder, archive, wrapped):
        assert data.class_names == ("a", "b2", "b10") and data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for i, name in enumerate(order):
            stored = np.array(Image.open(io.BytesIO(CLASSES[name])))
            assert np.array_equal(data.pixels(i).permute(1, 2, 0).numpy(), stored)


def test_natural_order():
    """A class whose images are torn apart by another class, or two names that tie and keep the order of the disk."""
    order = ["a/2.png", "a/10.png", "a/b/1.png", "a-b/01.png", "a-b/1.png", "a01/x.png"]
    assert sorted(reversed(order), key=natural) == order


def test_flat_folder_and_shards_have_no_labels(tmp_path):
    """A label per file where there are no classes, or per shard where folders only spread the files."""
    flat = DATASETS["images"](path=make_folder(tmp_path / "flat", {f"{i}.png": png(picture(i)) for i in range(3)}))
    assert flat.n_classes == 0 and item(flat, 2, False)[1] == -1
    shards = DATASETS["images"](path=make_zip(tmp_path / "s.zip", {**CLASSES, "x.png": png(picture(1))}), labels=False)
    assert len(shards) == 10 and shards.n_classes == 0 and shards.labels.unique().tolist() == [-1]


@pytest.mark.parametrize("channels, kind", [(3, "L"), (1, "RGB"), (3, "RGBA")])
def test_channels(channels, kind, tmp_path):
    """A grey or transparent image among colour ones that breaks the batch."""
    files = {"1.png": png(picture(1, mode="RGB")), "2.png": png(picture(2, mode=kind))}
    data = DATASETS["images"](path=make_zip(tmp_path / "x.zip", files), channels=channels)
    assert data.shape == (channels, 8, 8)
    expected = np.array(Image.open(io.BytesIO(files["2.png"])).convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(data.pixels(1).permute(1, 2, 0).squeeze(-1).numpy(), expected)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp", "gif", "bmp", "PNG"])
def test_extensions(suffix, tmp_path):
    """A format that is documented and not found, or found only in lower case."""
    folder = tmp_path / "folder"
    folder.mkdir()
    picture(0, 6, 4).save(folder / f"x.{suffix}")
    assert DATASETS["images"](path=str(folder)).pixels(0).shape == (3, 4, 6)


def test_resolution_crops_images_of_any_size(tmp_path):
    """Images of several sizes that reach the batch uncropped."""
    files = {"1.png": png(picture(1, 40, 20)), "2.png": png(picture(2, 9, 30))}
    data = DATASETS["images"](path=make_zip(tmp_path / "x.zip", files), resolution=8)
    assert data.shape == (3, 8, 8) and data.pixels(0).shape == data.pixels(1).shape == (3, 8, 8)
    assert np.array_equal(data.pixels(0).permute(1, 2, 0).numpy(), centre_crop(picture(1, 40, 20), 8))


# ---- refusals


def refused(name, *parts, **settings):
    with pytest.raises(ValueError) as caught:
        DATASETS[name](**settings)
    for part in parts:
        assert part in str(caught.value)


def test_images_path_refused(tmp_path):
    """A wrong path that ends in an empty data set or a message about something else."""
    (tmp_path / "note.txt").write_text("text")
    empty = make_folder(tmp_path / "empty", {"note.txt": b"", ".hidden.png": BAD})
    refused("images", "dataset.path=''", "must be a folder or zip file of images", "does not exist")
    refused("images", str(tmp_path / "missing"), "does not exist", path=str(tmp_path / "missing"))
    refused("images", "note.txt", "is a file of another kind", path=str(tmp_path / "note.txt"))
    refused("images", "empty", "there is no image in it", ".webp", path=empty)
    refused("images", "no.zip", "there is no image in it", path=make_zip(tmp_path / "no.zip", {"a/readme": b""}))


def test_images_settings_refused(tmp_path):
    """Settings that would be ignored or fail far from here."""
    path = make_zip(tmp_path / "x.zip", CLASSES)
    refused("images", "dataset.images.channels is 2", "3", path=path, channels=2)
    refused("images", "dataset.images.resolution is -1", path=path, resolution=-1)
    mixed = make_zip(tmp_path / "mixed.zip", {**CLASSES, "lost.png": png(picture(0))})
    refused("images", "lost.png lies in none", "a/img1.png does", "dataset.images.labels=False", path=mixed)


def test_several_sizes_refused(tmp_path):
    """Images of several sizes found only when a batch is stacked, hours into a run."""
    files = {f"{i}.png": png(picture(i, *size)) for i, size in enumerate([(8, 6), (8, 6), (6, 8), (9, 9)])}
    for path in (make_folder(tmp_path / "folder", files), make_zip(tmp_path / "x.zip", files)):
        refused("images", "2.png is 6 x 8", "0.png is 8 x 6", "set a resolution", path=path)


def test_damaged_images_are_named(tmp_path):
    """One bad file among a million, and an error that does not say which."""
    whole = png(picture(0, 64, 64))
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep, "png")
    jpeg = io.BytesIO()
    picture(0, 64, 64).save(jpeg, "jpeg")
    files = {
        "1.png": BAD,
        "2.png": whole[:-400],
        "3.png": b"",
        "4.jpg": jpeg.getvalue()[:-400],
        "5.png": deep.getvalue(),
    }
    for path in (make_folder(tmp_path / "folder", files), make_zip(tmp_path / "x.zip", files)):
        data = DATASETS["images"](path=path, resolution=8)
        for i, name in enumerate(files):
            with pytest.raises(
                ValueError, match=rf"(folder/|x\.zip:){name} (cannot be read as an image|has pixels of)"
            ):
                data.pixels(i)
        refused("images", "1.png cannot be read as an image", path=path)
    folder = DATASETS["images"](path=str(tmp_path / "folder"), resolution=8)
    (tmp_path / "folder" / "4.jpg").unlink()
    with pytest.raises(ValueError, match="4.jpg cannot be read: .*No such file"):
        folder.pixels(3)


def test_a_file_that_is_no_picture_is_not_run(tmp_path):
    """PostScript called cat.png, for which Pillow would start Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"
    path = make_zip(tmp_path / "x.zip", {"cat.png": script})
    refused("images", "cat.png cannot be read as an image: it is no PNG, JPEG", path=path)


def test_a_pipe_does_not_wait(tmp_path):
    """A named pipe among the images, or in place of the archive, which is read for ever."""
    folder = make_folder(tmp_path / "folder", {"1.png": png(picture(1))})
    os.mkfifo(tmp_path / "folder" / "2.png")
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("reading waits for the pipe"))
    signal.alarm(5)
    try:
        refused("images", "2.png cannot be read: it is a folder, a pipe or a device", path=folder)
        refused("images", "is a file of another kind", path=str(tmp_path / "folder" / "2.png"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_every_folder_is_read_once(tmp_path):
    """A link to a parent, which multiplies the images 41-fold and gives them other classes."""
    path = make_folder(tmp_path / "loop", {f"{name}.png": png(picture(1)) for name in ("cat/1", "cat/2", "dog/3")})
    elsewhere = make_folder(tmp_path / "elsewhere", {"4.png": png(picture(4)), "deep/5.png": png(picture(5))})
    os.symlink("..", tmp_path / "loop" / "cat" / "up")
    os.symlink(elsewhere, tmp_path / "loop" / "fox")
    os.symlink(tmp_path, tmp_path / "elsewhere" / "all")
    with pytest.warns(UserWarning, match="cat/up leads to a folder that is read already"):
        data = DATASETS["images"](path=path)
    names = ["cat/1.png", "cat/2.png", "dog/3.png", "fox/4.png", "fox/deep/5.png"]
    assert [name.decode() for name in data.names] == names
    assert data.class_names == ("cat", "dog", "fox") and data.labels.tolist() == [0, 0, 1, 2, 2]


def test_labels_of_dataset_json(tmp_path):
    """Folders that StyleGAN's and EDM2's tools only spread files over, taken for classes beside the real labels."""
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(6)]
    labels = [[name, 7 * (i % 2)] for i, name in enumerate(names)]
    pictures = {name: png(picture(i)) for i, name in enumerate(names)}

    def with_list(labels, name="x", folder=""):
        files = {"dataset.json": json.dumps({"labels": labels}).encode()} | pictures
        return make_zip(tmp_path / f"{name}.zip", {folder + name: data for name, data in files.items()})

    for folder in ("", "data/ffhq/"):
        data = DATASETS["images"](path=with_list(labels, folder=folder))
        assert data.labels.tolist() == [0, 7, 0, 7, 0, 7] and (data.n_classes, data.class_names) == (8, None)
    assert DATASETS["images"](path=with_list(None)).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert DATASETS["images"](path=with_list(labels), labels=False).n_classes == 0
    for wrong, word in (
        (labels[1:], "gives .*img00000000.png no label"),
        ([[name, [0.5, 1.0]] for name in names], "is no class number"),
        (3, "must hold"),
    ):
        with pytest.raises(ValueError, match=f"dataset.json .*{word}.*labels=False"):
            DATASETS["images"](path=with_list(wrong))


def test_orientation_is_said_and_offered(tmp_path):
    """Pictures of a telephone, stored turned, that are trained on lying on their side without a word."""
    exif = Image.Exif()
    exif[0x112] = 6  # a viewer turns it by 90 degrees to the right
    (tmp_path / "in").mkdir()
    picture(0, 20, 30).save(tmp_path / "in" / "x.jpg", exif=exif, quality=95)
    with pytest.warns(UserWarning, match=r"x\.jpg\)\. They are read as stored; dataset\.images\.orient=True"):
        stored = DATASETS["images"](path=str(tmp_path / "in"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upright = DATASETS["images"](path=str(tmp_path / "in"), orient=True)
    assert stored.shape == (3, 30, 20) and upright.shape == (3, 20, 30)
    assert torch.equal(upright.pixels(0), stored.pixels(0).rot90(-1, (1, 2)))


def test_check_images_lists_all(tmp_path, capsys):
    """A check that stops at the first damaged file, passes one, or changes something."""
    files = {"a/1.png": BAD, "a/2.png": png(picture(2)), "b/3.jpg": png(picture(3, 64, 64))[:-400], "b/4.png": b""}
    path = make_folder(tmp_path / "folder", files)
    assert check_images.main([path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" cannot be read")[0] for line in lines] == [
        f"{path}/{name}" for name in ("a/1.png", "b/3.jpg", "b/4.png")
    ]
    assert {name: (tmp_path / "folder" / name).read_bytes() for name in files} == files
    assert check_images.main([make_zip(tmp_path / "x.zip", CLASSES)]) == 0


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    """A class that vanishes from training because its folder may not be listed."""
    path, scandir = make_folder(tmp_path / "folder", CLASSES), os.scandir

    def locked(folder):
        if os.path.basename(folder) == "b2":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    refused("images", "folder/b2 cannot be listed", "Permission denied", path=path)


def test_damaged_zips_are_named(tmp_path):
    """Bytes that changed on disk and are trained on, or reported without the name of the file."""
    path = tmp_path / "x.zip"
    make_zip(path, CLASSES, zipfile.ZIP_STORED)
    data = path.read_bytes()
    at = data.index(CLASSES["b2/img2.png"]) + 60
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    images = DATASETS["images"](path=str(path), resolution=8)
    with pytest.raises(ValueError, match=r"x\.zip:b2/img2\.png cannot be read"):
        images.pixels(4)
    directory = data.index(b"PK\x01\x02")
    path.write_bytes(data[:directory] + b"XX" + data[directory + 2 :])
    refused("images", "x.zip", path=str(path))


def test_published_data_sets_refused(tmp_path):
    """torchvision's messages name neither the setting nor the files."""
    empty = str(tmp_path)
    refused("cifar10", f"dataset.path={empty!r}", "cifar-10-batches-py/", "dataset.cifar10.download=True", path=empty)
    refused("celeba", f"dataset.path={empty!r}", "img_align_celeba/", "dataset.celeba.download=True", path=empty)
    refused("celeba", "dataset.celeba.resolution is 0", path=empty, resolution=0)
    refused("imagenet", f"dataset.path={empty!r}", "train/", path=empty)
    path = make_folder(tmp_path / "imagenet", {"train/n01_1.png": png(picture(0)), "train/n02_1.webp": b""})
    refused("imagenet", "has 1 jpg", "expected 1281167", path=path, expected=1_281_167)
    refused("imagenet", "dataset.imagenet.resolution is 0", path=path, resolution=0)
    shutil.rmtree(tmp_path / "imagenet" / "train")
    (tmp_path / "imagenet" / "train").mkdir()
    refused("imagenet", "has 0 jpg", "at least one", path=path)


@pytest.mark.parametrize("setting", [{"resolution": 0}, {"channels": 4}, {"n_classes": -1}, {"n_images": 0}])
def test_synthetic_settings_refused(setting):
    """A quick run on no images, or on a shape no picture has."""
    refused("synthetic", f"dataset.synthetic.{next(iter(setting))} is {next(iter(setting.values()))}", **setting)


# ---- order


def numbered(n: int):
    """A data set whose label is the index."""
    return DATASETS["synthetic"](resolution=4, n_classes=n, n_images=n)


def read(data, steps: int, **settings):
    x, labels = zip(*islice(batches(data, **settings), steps), strict=True)
    return torch.cat(x), torch.cat(labels)


@pytest.mark.parametrize("n, batch_size", [(10, 8), (3, 8), (64, 8)])
def test_every_epoch_is_a_new_permutation(n, batch_size):
    """Images left out at the end of an epoch, the same order in every epoch, or a data set smaller than a batch."""
    _, labels = read(numbered(n), 5 * n // batch_size + 1, batch_size=batch_size, seed=3)
    epochs = labels[: 5 * n].reshape(5, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    _, other = read(numbered(n), 5 * n // batch_size + 1, batch_size=batch_size, seed=4)
    assert not torch.equal(labels, other)


@pytest.mark.parametrize("world", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(world):
    """Order or flips drawn per rank: adding a GPU would change the run."""
    data, settings = numbered(10), {"batch_size": 8, "seed": 1, "flip": True}
    one = batches(data, **settings)
    many = [batches(data, rank=rank, world=world, **settings) for rank in range(world)]
    for _ in range(7):
        x, labels = next(one)
        parts = [next(part) for part in many]
        assert torch.equal(x, torch.cat([x for x, _ in parts]))
        assert torch.equal(labels, torch.cat([labels for _, labels in parts]))


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_resumed_run_continues(start):
    """A resume that starts its epoch over, or whose flips depend on what was read before."""
    data, settings = numbered(10), {"batch_size": 8, "seed": 1, "flip": True, "world": 2, "rank": 1}
    x, labels = read(data, 20, **settings)
    x_resumed, labels_resumed = read(data, 20 - start, start_step=start, **settings)
    assert torch.equal(labels_resumed, labels[4 * start :]) and torch.equal(x_resumed, x[4 * start :])


def test_flips():
    """Flips that are off, always on, or tied to the image, so that half of the images are never seen one way."""
    data = numbered(100)
    x, labels = read(data, 40, batch_size=100, flip=True)
    plain, mirrored = (data.gather(labels, torch.full((4000,), flip))[0] for flip in (False, True))
    flipped = (x == mirrored).flatten(1).all(1) & ~(x == plain).flatten(1).all(1)
    kept = (x == plain).flatten(1).all(1)
    assert (flipped | kept).all()
    told = (plain != mirrored).flatten(1).any(1)  # a grating may be its own mirror image
    assert 0.45 < flipped[told].float().mean() < 0.55
    share = torch.zeros(100).index_add_(0, labels, flipped.float())[labels[told]] / 40
    assert 0.1 < share.min() and share.max() < 0.9
    assert torch.equal(read(data, 40, batch_size=100, flip=False)[0], plain)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    """Batches out of order, workers that share the position of one open archive, draws from the global generator."""
    data = DATASETS["images"](path=make_zip(tmp_path / "x.zip", {f"{i}.png": png(picture(i)) for i in range(40)}))
    settings = {"batch_size": 8, "start_step": 3, "seed": 1, "flip": True}
    x, labels = read(data, 12, **settings)
    before = torch.get_rng_state()
    x_ahead, labels_ahead = read(data, 12, workers=2, **settings)
    assert torch.equal(x, x_ahead) and torch.equal(labels, labels_ahead)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1])
def test_damaged_image_is_named_in_one_line(tmp_path, count):
    """A worker that dies with a message of its own, hangs the run, or wraps the message in its traceback."""
    data = DATASETS["images"](path=make_zip(tmp_path / "x.zip", {"1.png": BAD}), resolution=8)
    with pytest.raises(ValueError) as caught:
        next(batches(data, batch_size=2, workers=count))
    assert str(caught.value) == (
        f"{tmp_path}/x.zip:1.png cannot be read as an image: it is no PNG, JPEG, WEBP, GIF, BMP file. "
        f"`python -m scripts.check_images {tmp_path}/x.zip` lists all such files."
    )


def wait_or_die(row: int) -> int:
    """Stands for a read that waits for ever, or for a worker that the system kills."""
    time.sleep(2) if row else os._exit(1)


@pytest.mark.slow
def test_workers_that_stop_answering_end_the_run(monkeypatch):
    """A full /dev/shm, a lost file descriptor or a killed worker, for which training waited for ever."""
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 0.5)
    for row in (0, 1):
        with pytest.raises(ValueError, match=r"with 1 worker processes failed .*workers=0.*--shm-size.*ulimit -n"):
            list(workers.read_in_workers(wait_or_die, [row], 1))
    monkeypatch.setattr(workers, "free_bytes", lambda folder: 64 * 2**20)
    large = DATASETS["synthetic"](resolution=256)
    with pytest.raises(ValueError, match="4 worker processes would keep 805 MB .* has 67 MB free: set .*workers=0"):
        batches(large, batch_size=128, workers=4)


class Drawn(Dataset):
    """A data set that chooses at random: its item is (index, draw)."""

    name, shape, n_classes, draws, labels = "drawn", (1, 1, 1), 0, True, torch.full((10,), -1)

    def pixels(self, index):
        return torch.zeros(self.shape, dtype=torch.uint8)

    def gather(self, indices, flips, draws):
        return indices, draws


def test_draws_follow_the_position():
    """A caption drawn per rank or since the last resume, or the same caption of an image in every epoch."""
    indices, draws = read(Drawn(), 20, batch_size=8, seed=2)
    assert 0 <= draws.min() and draws.max() < 1 and len(draws.unique()) == 160
    resumed = read(Drawn(), 10, batch_size=8, seed=2, start_step=10)
    assert torch.equal(resumed[0], indices[80:]) and torch.equal(resumed[1], draws[80:])
    ranks = [read(Drawn(), 20, batch_size=8, seed=2, rank=rank, world=2)[1].reshape(20, 4) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, dim=1).flatten(), draws)
