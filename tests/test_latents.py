"""Latents and text-to-image from images on the disk to the report, with small random networks of the real classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_configs import load

from libs import checkpoints as weights
from libs import regimes, report, rng, trainer
from libs.codecs import KL, ClipText
from libs.data.coco import CocoImages
from libs.data.features import CaptionShards
from libs.data.images import ImageFolder
from libs.data.shards import Sharded
from libs.evaluation import evaluate as evaluator
from libs.evaluation import samples
from libs.evaluation.prompts import compare_prompts
from libs.metrics import extractors
from libs.metrics.clip_score import ClipModel
from libs.models import build_model
from libs.run import Run
from libs.sampling.images import save_png
from libs.sampling.sampler import Sampler
from scripts import extract_features, sample
from tests.test_codecs import SMALL, small_clip, small_file
from tests.test_features import coco_folder, extract, picture_folder

transformers = pytest.importorskip("transformers")
SIDE = 8  # of the images; latents are half of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An autoencoder file with CompVis' names, a CLIP folder, and the features of 12 images in both kinds."""
    folder = tmp_path_factory.mktemp("assets")
    small_file(folder / "autoencoder.pth")
    full_clip(folder / "clip")
    images, captions = coco_folder(folder / "coco", 12)
    text = ClipText(path=str(folder / "clip"))
    extract(ImageFolder(path=images, resolution=SIDE), folder / "latents", Sharded())
    for split in ("train", "val"):
        data = CocoImages(path=images, captions=captions, resolution=SIDE)
        extract(data, folder / "captions" / split, Sharded(), text=text)
    command = ["empty", "--out", str(folder / "captions"), "--clip", str(folder / "clip"), "--cpu"]
    extract_features.main(command)
    return folder


def full_clip(folder: Path) -> None:
    """Both halves of a CLIP model, and the tokenizer of `small_clip`."""
    folder.mkdir()
    small_clip(folder)
    text = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)


def experiment(name: str, folder: Path, **train):
    """The quick twin of a published experiment, on the features in `folder`."""
    config = load(name, "quick")
    kind = "captions" if config.regime == "text" else "latents"
    config.dataset.update(name=kind, path=str(folder / kind))
    config.autoencoder.update(path=str(folder / "autoencoder.pth"), **SMALL)
    config.nnet.img_size = SIDE // 2
    if kind == "latents":
        config.nnet.num_classes = 4
    else:
        config.nnet.update(num_clip_token=77, clip_dim=16)
        config.clip.update(path=str(folder / "clip"), length=77, width=16)
    config.lr_scheduler.warmup_steps = 2
    config.train.update(n_steps=8, save_interval=2, log_interval=2, sample_interval=8)
    config.train.update(**train)
    return config


def train(config, directory: Path) -> dict:
    run = Run.single(directory)
    trainer.fit(config, regimes.of(config), run)
    return weights.read_weights(directory / "last.ckpt" / "nnet.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet256_uvit_large", "imagenet256_uvit_huge", "mscoco_uvit_small"])
def test_train_resume_evaluate_report(name, folder, tmp_path, monkeypatch):
    """Catches a regime that cannot be trained, resumed exactly, guided with either pair, measured or reported."""
    config = experiment(name, folder)
    config.train.n_steps = 4
    train(config, tmp_path / "run")
    config.train.n_steps = 8
    resumed = train(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "8.png").is_file()
    whole = experiment(name, folder, sample_interval=0)
    whole.autoencoder.path = "nowhere.pth"  # moments are drawn from without the network
    uninterrupted = train(whole, tmp_path / "whole")
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in resumed)

    text = config.regime == "text"
    monkeypatch.setattr(extractors, "CLIP_336", str(folder / "clip"))
    config.nnet_path = str(tmp_path / "run" / "last.ckpt")
    config.eval.update(thresholds=(0.55, 0.45), real=str(folder / "coco" / "all"), clip=str(folder / "clip"))
    config.eval.metrics = ("cmmd", "clip_score") if text else ("kid", "precision_recall")
    run = Run.single(tmp_path / "eval")
    records = evaluator.evaluate(config, regimes.of(config), run)
    pairs = [(record["exit"]["name"], record["guidance"]["pair"]) for record in records]
    assert pairs[0] == ("full", "free") and {pair for _, pair in pairs[1:]} == {"free", "tied"} and len(pairs) == 5
    assert all(record["guidance"]["scale"] == config.sample.scale > 0 for record in records)
    found = {key.rstrip("0123456789abcdef") for key in records[1]["metrics"]}
    wanted = {"clip_score_clip", "mmd_clip_"} if text else {"kid_pixels", "precision_pixels", "recall_pixels"}
    assert wanted <= found
    if name != "imagenet256_uvit_huge":  # which differs from the large one in time, not in what a report shows
        page = report.load_report([run.dir]).write(run.dir / "report.html").read_text()
        assert "tied" in page and "free" in page
    used = np.load(run.dir / "points" / records[-1]["slug"] / "trace.npz")["used"]
    assert used.shape[1] == 2 and (used[:, 0] == used[:, 1]).all()  # tied branches leave together


def test_a_missing_autoencoder_is_found_before_training(folder, tmp_path):
    """Catches hours of training that end at the first sample grid."""
    config = experiment("imagenet256_uvit_large", folder)
    config.autoencoder.path = "nowhere.pth"
    with pytest.raises(FileNotFoundError, match="scripts.download autoencoder_kl"):
        train(config, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()


def test_latents_are_drawn_anew_at_every_step(folder):
    """Catches moments whose noise is the training noise, or the same at every step or for every process."""
    shape = (4, 8, 8)
    whole = rng.latent_noise(1, 5, 8, shape, slice(None))
    assert torch.equal(whole[4:], rng.latent_noise(1, 5, 8, shape, slice(4, 8)))
    others = [rng.global_batch(1, 5, 8, shape, slice(None))[1], rng.latent_noise(1, 6, 8, shape, slice(None))]
    others.append(rng.latent_noise(2, 5, 8, shape, slice(None)))
    assert all((whole - other).abs().mean() > 0.5 for other in others)


def test_captions_are_the_validation_splits_and_keyed_by_image(folder, tmp_path):
    """Catches captions that change with the batch, and texts that are not those of the contexts."""
    regime = regimes.of(experiment("mscoco_uvit_small", folder))
    ids = np.array([3, 5, 11, 4])
    contexts, texts = regime.conditions.for_ids(7, ids), regime.conditions.texts(7, ids)
    assert torch.equal(regime.conditions.for_ids(7, ids[2:]), contexts[2:])
    assert not torch.equal(regime.conditions.for_ids(8, ids), contexts)
    clip = ClipText(path=str(folder / "clip"))
    torch.testing.assert_close(contexts, clip.encode(texts), rtol=2e-3, atol=2e-3)  # stored as float16
    torch.testing.assert_close(regime.conditions.null(2)[1], clip.encode([""])[0])
    val = CaptionShards(path=str(folder / "captions"), split="val")
    assert regime.conditions.source().data.path == val.path


def test_contexts_are_dropped_by_share(folder):
    """Catches a null context for the wrong rows, and contexts that stay float16."""
    conditions = regimes.of(experiment("mscoco_uvit_small", folder)).conditions
    stored = torch.ones(3, 77, 16, dtype=torch.float16)
    cond = conditions.for_training(stored, torch.tensor([0.05, 0.1, 0.9]), 0.1)
    assert cond.dtype == torch.float32
    assert torch.equal(cond[0], conditions.null(1)[0]) and torch.equal(cond[1:], stored[1:].float())


def test_prompts_from_a_file(folder, tmp_path):
    """Catches prompts that are skipped or not taken in turn; a byte order mark in the first one, a form feed or another
    line separator that tears one in two, and an encoding that is found out in a traceback."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n two dogs \n")
    config = experiment("mscoco_uvit_small", folder)
    config.sample.prompts = str(tmp_path / "prompts.txt")
    conditions = regimes.of(config).conditions
    assert conditions.texts(0, np.array([0, 1, 2, 7])) == ["a cat", "two dogs", "a cat", "two dogs"]
    clip = ClipText(path=str(folder / "clip"))
    torch.testing.assert_close(conditions.for_ids(0, np.array([1])), clip.encode(["two dogs"]))
    (tmp_path / "prompts.txt").write_text("un café\x0csecond half\nlast\u2028tail", encoding="utf-8")
    assert regimes.of(config).conditions.texts(0, np.arange(2)) == ["un café\x0csecond half", "last\u2028tail"]
    (tmp_path / "prompts.txt").write_text("un café", encoding="latin-1")
    with pytest.raises(ValueError, match=r"sample.prompts is .*prompts.txt', which is not UTF-8 text \(byte 6 is 0xe9"):
        regimes.of(config).conditions.null(1)
    config.sample.prompts = str(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="sample.prompts is .*none.txt': there is no such file"):
        regimes.of(config).conditions.null(1)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("regime", "pixels", "items of shape"),
        ("regime", "latent", "regime is 'latent'"),
        ("nnet.in_chans", 3, "autoencoder.latent_channels"),
        ("nnet.img_size", 8, "items of shape"),
        ("nnet.num_classes", 11, "stands for 10: set --config.nnet.num_classes="),
        ("sample.labels", (1, 3), "they must lie in 0..2"),
        ("dataset.name", "captions", "captions"),
    ],
)
def test_wrong_settings_are_named(folder, setting, value, message):
    """Each message names the setting; nothing is silently replaced."""
    config = experiment("imagenet256_uvit_large", folder)
    *path, last = setting.split(".")
    node = config
    for key in path:
        node = node[key]
    node[last] = value
    with pytest.raises(ValueError, match=message):
        regimes.of(config).dataset()


def test_each_script_takes_its_own_experiments():
    """Catches a latent experiment that is trained as if its channels were colours."""
    with pytest.raises(ValueError, match="train_ldm.py and eval_ldm.py"):
        regimes.pixels(load("imagenet256_uvit_large", "quick"))
    with pytest.raises(ValueError, match="train_t2i_discrete.py"):
        regimes.latents(load("mscoco_uvit_small", "quick"))
    with pytest.raises(ValueError, match="train.py and eval.py"):
        regimes.text_to_image(load("cifar10_uvit_small", "quick"))


def test_cmmd_reads_images_as_clip_does(folder, monkeypatch):
    """Catches a wrong size, order of channels or normalisation: compared with transformers' own preprocessing."""
    monkeypatch.setattr(extractors, "CLIP_336", str(folder / "clip"))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = extractors.build_extractor("clip_vit_l14_336", (3, 16, 16))
    assert extractor.name.startswith("clip_") and extractor.name != "clip_vit_l14_336"
    net = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    images = [Image.fromarray(array).resize((8, 8), Image.Resampling.BICUBIC) for array in arrays]
    x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (extractors.CLIP_MEAN, extractors.CLIP_STD))
    with torch.no_grad():
        out = net(pixel_values=(x - mean) / std, input_ids=torch.tensor([[188, 189]] * 3))
    ours = torch.nn.functional.normalize(extractor(pixels), dim=1)
    torch.testing.assert_close(ours, out.image_embeds, rtol=0.05, atol=0.01)  # Pillow rounds to bytes
    monkeypatch.setattr(extractors, "CLIP_336", "nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match="scripts.download clip_336"):
        extractors.build_extractor("clip_vit_l14_336", (3, 16, 16))


# ----------------------------------------------------------------------------------------------------------------------
# Writing images


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """A trained latent model's config."""
    directory = tmp_path_factory.mktemp("model")
    config = experiment("imagenet256_uvit_large", folder, sample_interval=0)
    config.train.n_steps = 2
    train(config, directory)
    config.nnet_path = str(directory / "last.ckpt")
    config.eval.thresholds = (0.5,)
    config.sample.mini_batch_size = 3
    return config


def write(config, out: Path, ids=range(32)) -> dict:
    return samples.sample_to_folder(config, regimes.of(config), Run.single(out), np.array(ids))


def test_samples_are_the_evaluations_and_fit_adm(model, tmp_path):
    """Catches another noise or class than the evaluation's, and an archive in another order, type or layout."""
    config = model.copy_and_resolve_references()
    config.sample.labels = (2, 0)
    write(config, tmp_path, [0, 1, 5])
    path = samples.write_npz(tmp_path, [5, 0, 1])
    with np.load(path) as data:
        images, labels = data["arr_0"], data["arr_1"]
    assert images.shape == (3, SIDE, SIDE, 3) and images.dtype == np.uint8
    point = samples.configured(config, Sampler.open(config, regimes.of(config), Run.single(tmp_path)))
    made = point.sampler.batch(np.array([0, 1, 5]), seed=config.eval.seeds[0], plan=point.plan, policy=point.policy)
    assert made.labels.tolist() == [2, 0, 0]
    assert np.array_equal(images[[1, 2, 0]], made.pixels.permute(0, 2, 3, 1).numpy())
    assert labels.dtype == np.int64 and labels[[1, 2, 0]].tolist() == [2, 0, 0]
    noted = json.loads((tmp_path / "sample.json").read_text())["images"]
    assert [noted[i]["label"] for i in ("0", "1", "5")] == [2, 0, 0]
    assert [noted[i]["depth"] for i in ("0", "1", "5")] == pytest.approx(made.depth.mean(0), abs=1e-4)


def test_forecasts_are_no_calls_of_depth_0(model, tmp_path):
    """Catches images of full depth that are said to have used half of the layers."""
    config = model.copy_and_resolve_references()
    config.exit.name = "full"
    config.sample.forecast.update(every=2, tail=1)
    write(config, tmp_path, [0, 1])
    depth = build_model(config).depth
    noted = json.loads((tmp_path / "sample.json").read_text())["images"]
    assert [image["depth"] for image in noted.values()] == [depth, depth]


def test_another_grid_in_the_same_file_is_refused(model, tmp_path):
    """Catches a folder whose images are of two grids, as the file's name stayed."""
    config, grid = model.copy_and_resolve_references(), tmp_path / "grid.txt"
    config.sample.update(grid=str(grid), sample_steps=3)
    (tmp_path / "images").mkdir()
    grid.write_text("1,0.6,0.2,0.001")
    write(config, tmp_path / "images", [0, 1])
    grid.write_text("1,0.3,0.01,0.001")
    with pytest.raises(ValueError, match=r"other settings \(sample\)"):
        write(config, tmp_path / "images", [0, 1, 2])


def test_only_what_is_missing_of_a_batch_is_written(model, tmp_path):
    """Catches complete files that a job, killed within a batch, writes again."""
    write(model, tmp_path, [0, 1, 2])
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / "1.png").unlink()
    kept = {i: (tmp_path / f"{i}.png").stat().st_mtime_ns for i in (0, 2)}
    assert write(model, tmp_path, [0, 1, 2])["sampled"] == 3
    assert {i: (tmp_path / f"{i}.png").stat().st_mtime_ns for i in (0, 2)} == kept
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == whole


def test_other_settings_are_refused(model, tmp_path):
    """Catches a folder that mixes images of two models, thresholds or guidance scales."""
    write(model, tmp_path, [0, 1])
    config = model.copy_and_resolve_references()
    config.sample.scale = 3.0
    with pytest.raises(ValueError, match=r"other settings \(sample\)"):
        write(config, tmp_path, [0, 1])
    calibration = tmp_path / "plan.json"
    config = model.copy_and_resolve_references()
    config.exit.name, config.eval.thresholds = "schedule", ()
    config.exit.schedule.path, folder = str(calibration), tmp_path / "planned"
    times = np.linspace(1, 0, config.sample.sample_steps, endpoint=False).tolist()
    for layers in ([1], [3]):
        part = {"t": times, "layers": layers * len(times)}
        calibration.write_text(json.dumps({"points": [1, 2, 3, 4, 5], "schedule": part}))
        if layers == [1]:
            write(config, folder, [0, 1])
    with pytest.raises(ValueError, match=r"other settings \(exit\)"):  # the same file, calibrated again
        write(config, folder, [0, 1, 2])
    config = model.copy_and_resolve_references()
    config.eval.thresholds = (0.5, 0.6)
    with pytest.raises(ValueError, match="2 values"):
        write(config, tmp_path, [0, 1])
    save_png(tmp_path / "other.png", torch.zeros(3, 2, 2, dtype=torch.uint8))
    (tmp_path / "sample.json").unlink()
    with pytest.raises(ValueError, match="do not come from this command"):
        write(model, tmp_path, [0, 1])


def test_settings_without_images_bind_nobody(model, tmp_path):
    """Catches a failed run (no CLIP, for example) whose sample.json refuses the corrected command."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "sample.json").write_text('{"exit": "of another command"}')
    assert write(model, out, [0, 1])["sampled"] == 2
    broken = model.copy_and_resolve_references()
    regime = regimes.of(broken)

    def missing(*_):
        raise FileNotFoundError("clip.path: no such folder")

    object.__setattr__(regime.conditions, "for_ids", missing)
    with pytest.raises(FileNotFoundError, match="clip.path"):
        samples.sample_to_folder(broken, regime, Run.single(tmp_path / "new"), np.array([0]))
    assert not (tmp_path / "new" / "sample.json").exists()


def test_ranges():
    """Catches an end that is left out."""
    assert sample.whole_numbers("0-2,7, 9-9", "--seeds") == (0, 1, 2, 7, 9)
    for text in ("", "3-1", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ValueError, match="--seeds="):
            sample.whole_numbers(text, "--seeds")


def test_picture_folders_have_classes(tmp_path):
    """Catches a fixture whose latents all have one label."""
    assert ImageFolder(path=picture_folder(tmp_path, 6), resolution=8).n_classes == 3
    assert KL(path="random", **SMALL).factor == 2


def test_prompts_at_every_certainty(folder, tmp_path):
    """Catches pairs of different noise, a score of another prompt's image, and depths of the wrong column."""
    config = experiment("mscoco_uvit_small", folder)
    config.sample.update(sample_steps=3, prompts=str(tmp_path / "prompts.txt"))
    config.eval.update(thresholds=(1.0, 0.45), clip=str(folder / "clip"))
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\na red car\n")
    run, regime = Run.single(tmp_path / "run"), regimes.of(config)
    sampler = Sampler.of(config, build_model(config).eval().requires_grad_(False), regime, run)
    clip, texts = ClipModel(config.eval.clip), list(regime.conditions.source().prompts)
    found = compare_prompts(sampler, texts, clip, run)
    assert texts == ["a cat", "two dogs", "a red car"] and [c["certainty"] for c in found["columns"]] == [1.0, 0.45]
    full, early = found["columns"]
    assert full["depth"] == sampler.model.depth > early["depth"] and full["lost"] == 0
    alone = sampler(3, seed=config.eval.seeds[0], prompts=texts, exit_threshold=0.45)
    assert early["scores"] == clip.scores(alone.pixels, texts).tolist() and early["depth"] == alone.depth.mean()
    assert early["lost"] == pytest.approx(full["clip_score"] - early["clip_score"])
    width, height = Image.open(tmp_path / "run" / "pairs.png").size
    assert width / height == pytest.approx(2 / 3, abs=0.05) and (tmp_path / "run" / "prompts.json").is_file()
