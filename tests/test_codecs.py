"""Codecs: pixels, the KL autoencoder and CLIP's text encoder, with the real classes and small random weights."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from libs.codecs import KL, ClipText, Identity
from libs.codecs.kl import compvis, read_autoencoder, to_diffusers
from libs.data.dataset import in_unit_range
from tests.golden.recipe import golden_input, golden_weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "golden"
SMALL = {"channels": (8, 16), "layers": 1, "groups": 4}


def small_file(path: Path, prefix: str = "", **changes) -> str:
    """A file of a small autoencoder under CompVis' names; `changes` replace tensors (None drops them)."""
    vae = KL(path="random", **SMALL).vae
    state = {prefix + compvis(key, 2): value.clone() for key, value in vae.state_dict().items()}
    state |= changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return str(path)


def images(n: int, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def test_every_byte_survives_the_pixel_codec():
    """Catches truncation instead of rounding: 127.5 x + 127.5 often falls just below the integer."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codec = Identity()
    assert torch.equal(codec.decode(codec.sample(in_unit_range(levels))), levels)


def test_values_outside_the_range_are_clamped_and_nan_is_refused():
    """Catches wrap-around of bytes (1.01 -> 0) and a NaN that silently becomes a black image."""
    x = torch.tensor([-5.0, -1.01, 1.01, 7.0]).view(1, 1, 2, 2)
    assert Identity().decode(x).flatten().tolist() == [0, 0, 255, 255]
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 images .* row 1"):
        Identity().decode(x)


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder


def close(a: torch.Tensor, b: np.ndarray, tolerance: float) -> bool:
    b = torch.from_numpy(b)
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def test_released_autoencoder(tmp_path):
    """Catches a wrong name in the key map (levels of the decoder run backwards), a wrong padding of the strided
    convolutions, swapped mean and variance, a missing clamp and a missing scale: numbers recorded with the original."""
    shapes, golden = json.loads((GOLDEN / "autoencoder_keys.json").read_text()), np.load(GOLDEN / "autoencoder.npz")
    assert len(shapes) == 248
    torch.save(golden_weights(shapes), tmp_path / "autoencoder_kl.pth")
    codec = KL(path=str(tmp_path / "autoencoder_kl.pth"))
    assert sum(p.numel() for p in codec.vae.parameters()) == 83_653_863
    moments = codec.moments(golden_input("autoencoder.x", (1, 3, 64, 64), 0.5))
    assert close(moments, golden["moments"], 1e-5)
    noise = golden_input("autoencoder.noise", (1, 4, 8, 8))
    recorded = torch.from_numpy(golden["moments"])
    assert close(codec.sample(recorded, noise), golden["sample"], 1e-6)
    assert close(codec.sample(30 * recorded, noise), golden["sample_of_30_moments"], 1e-6)
    assert close(codec.reconstruct(golden_input("autoencoder.z", (1, 4, 8, 8))), golden["decoded"], 1e-5)


def test_moments_are_clamped_and_scaled():
    """Catches exp(logvar) instead of exp(logvar / 2), a missing clamp to [-30, 20], a scale left out or used twice."""
    codec = KL(path="random", scale=0.2301, **SMALL)
    mean, noise = torch.full((1, 4, 2, 2), 3.0), torch.ones(1, 4, 2, 2)

    def z(logvar):
        return codec.sample(torch.cat([mean, torch.full_like(mean, logvar)], 1), noise).unique().item()

    assert z(0.0) == pytest.approx(0.2301 * 4)
    assert z(2.0) == pytest.approx(0.2301 * (3 + np.e))
    assert z(1000.0) == pytest.approx(0.2301 * (3 + np.exp(10)), rel=1e-6)
    assert z(-1000.0) == pytest.approx(0.2301 * (3 + np.exp(-15)), rel=1e-6)
    assert (
        codec.sample(torch.full((1, 8, 2, 2), 9.0).half(), noise).dtype == torch.float32
    )  # exp(9 / 2) in fp16 is coarse


def test_decoding_undoes_the_scale_of_encoding():
    """Catches a decoder that is fed scaled latents: the picture must not depend on the scale."""
    one, other = (KL(path="random", scale=scale, **SMALL) for scale in (0.18215, 0.5))
    noise = torch.zeros(2, 4, 4, 4)
    a, b = (codec.reconstruct(codec.sample(codec.moments(images(2)), noise)) for codec in (one, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert one.decode(one.sample(one.moments(images(2)), noise)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_files_of_stable_diffusion_load(tmp_path, prefix, wrapped):
    """Catches a reader that knows only one of the public forms: bare, prefixed beside other networks, wrapped."""
    path = small_file(tmp_path / "a.pth", prefix)
    if prefix or wrapped:
        state = torch.load(path, weights_only=True)
        state |= {"model.diffusion_model.x": torch.zeros(1)} if prefix else {}
        torch.save({"state_dict": state} if wrapped else state, path)
    expected = KL(path="random", **SMALL).moments(images(2))
    assert torch.equal(KL(path=path, **SMALL).moments(images(2)), expected)


@pytest.mark.parametrize("form", ["folder", "pipeline", "bin", "file", "old names", "compvis safetensors"])
def test_files_of_diffusers_load(tmp_path, form):
    """Catches a user who has the autoencoder as diffusers saves it, and is told that it lacks 248 tensors."""
    vae = KL(path="random", **SMALL).vae
    folder = tmp_path / "vae"
    vae.save_pretrained(folder, safe_serialization=form != "bin")
    path = folder
    if form == "pipeline":
        (tmp_path / "model_index.json").write_text("{}")
        path = tmp_path
    elif form == "file":
        path = folder / "diffusion_pytorch_model.safetensors"
    elif form == "old names":
        state, path = dict(vae.state_dict()), tmp_path / "old.pth"
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
        assert "decoder.mid_block.attentions.0.proj_attn.bias" in state
        torch.save(state, path)
    elif form == "compvis safetensors":
        path = tmp_path / "a.safetensors"
        save_file({compvis(key, 2): value.contiguous() for key, value in vae.state_dict().items()}, path)
    found = KL(path=str(path), **SMALL).moments(images(2))
    assert torch.equal(found, KL(path="random", **SMALL).moments(images(2)))


def test_a_folder_of_another_autoencoder_is_refused(tmp_path):
    """Catches weights that are read with another scale or depth than their folder says, without a word."""
    KL(path="random", **SMALL).vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="autoencoder.layers is 2 and layers_per_block 1"):
        KL(path=str(tmp_path), **(SMALL | {"layers": 2})).to("cpu")
    with pytest.warns(UserWarning, match="says scaling_factor 0.18215; autoencoder.scale is 0.2301"):
        KL(path=str(tmp_path), scale=0.2301, **SMALL).to("cpu")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has none of the files diffusion_pytorch_model.safetensors"):
        KL(path=str(tmp_path), **SMALL).to("cpu")


def test_training_files_of_the_autoencoder_load(tmp_path, monkeypatch):
    """Catches KL-f8's own training files: Lightning's callbacks as keys, the discriminator beside the weights."""
    kept = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    parts = kept.__module__.split(".")
    names = [".".join(parts[:n]) for n in (1, 2, 3)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].ModelCheckpoint = kept
    path = tmp_path / "model.ckpt"
    state = torch.load(small_file(path), weights_only=True) | {"loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"epoch": 1, "callbacks": {kept: {"best_model_score": torch.tensor(1.0)}}, "state_dict": state}, path)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    found = KL(path=str(path), **SMALL).moments(images(2))
    assert torch.equal(found, KL(path="random", **SMALL).moments(images(2)))


@pytest.mark.parametrize("odd", [torch.zeros(8, dtype=torch.complex64), torch.zeros(8, device="meta"), torch.arange(8)])
def test_tensors_without_real_numbers_are_refused(tmp_path, odd):
    """Catches weights that become zeros, lose a half of each number, or end in a traceback."""
    with pytest.raises(ValueError, match=r"a.pth (.|\n)*encoder.conv_in.bias has (no values|no real|torch.complex64)"):
        KL(path=small_file(tmp_path / "a.pth", **{"encoder.conv_in.bias": odd}), **SMALL).to("cpu")


def test_files_that_do_not_fit_are_refused_and_listed(tmp_path):
    """Catches a non-strict load, and messages in names that the file does not have."""
    changes = {
        "decoder.up.1.block.0.norm1.bias": None,
        "decoder.extra.weight": torch.zeros(1),
        "encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
    }
    with pytest.raises(ValueError) as error:
        KL(path=small_file(tmp_path / "a.pth", **changes), **SMALL).to("cpu")
    text = str(error.value)
    assert "lacks 1 tensors: decoder.up.1.block.0.norm1.bias" in text
    assert "should not, 1 tensors: decoder.extra.weight" in text
    assert "encoder.conv_in.weight is (4, 3, 3, 3) in the file and (8, 3, 3, 3)" in text


def test_a_missing_file_names_the_command():
    """Catches a bare "no such file" for the one file every newcomer lacks."""
    with pytest.raises(FileNotFoundError, match="python -m scripts.download autoencoder_kl"):
        KL(path="nowhere/autoencoder_kl.pth").to("cpu")


def test_stored_moments_need_no_weights():
    """Catches an autoencoder that is read, or missed, although only moments are drawn from."""
    codec = KL(path="nowhere/autoencoder_kl.pth")
    assert codec.sample(torch.zeros(1, 8, 2, 2), torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_not_run(tmp_path):
    """Catches torch.load without weights_only, and a file of something else that passes for weights."""
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="cannot be read as weights: it holds a reference"):
        read_autoencoder(str(tmp_path / "a.pth"))
    assert not (tmp_path / "sprung").exists()
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds a list, not a dict of tensors"):
        read_autoencoder(str(tmp_path / "b.pth"))


def test_attention_weights_fit_as_convolutions_and_as_matrices():
    """Catches a reshape that accepts any tensor with the right number of elements."""
    wanted = {"decoder.mid_block.attentions.0.to_q.weight": torch.zeros(2, 3)}
    name = "decoder.mid.attn_1.q.weight"
    values = torch.arange(6.0).view(2, 3)
    for given in (values, values.view(2, 3, 1, 1)):
        (converted,) = to_diffusers({name: given}, wanted, 2, "f").values()
        assert torch.equal(converted, values)
    with pytest.raises(ValueError, match=r"\(3, 2, 1, 1\) in the file and \(2, 3\)"):
        to_diffusers({name: values.view(3, 2, 1, 1)}, wanted, 2, "f")


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_chunks_do_not_show(chunk):
    """Catches a last chunk that is dropped and rows that come back in another order."""
    whole, parts = (KL(path="random", chunk=n, **SMALL) for n in (5, chunk))
    moments = whole.moments(images(5))
    torch.testing.assert_close(parts.moments(images(5)), moments, rtol=1e-5, atol=1e-6)
    z = whole.sample(moments, torch.zeros(5, 4, 4, 4))
    torch.testing.assert_close(parts.reconstruct(z), whole.reconstruct(z), rtol=1e-5, atol=1e-5)


def test_images_that_overflow_fp16_are_redone_in_fp32():
    """Catches an image that decodes to NaN under fp16, and a whole batch redone for the sake of one image."""
    half, full = (KL(path="random", precision=precision, **SMALL) for precision in ("fp16", "fp32"))
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    z[1] *= 1e6  # beyond 65504 in the first convolution
    with pytest.warns(UserWarning, match="redone in fp32"):
        decoded = half.reconstruct(z)
    expected = full.reconstruct(z)
    torch.testing.assert_close(decoded[1], expected[1], rtol=1e-5, atol=1e-5)
    for row in (0, 2):
        torch.testing.assert_close(decoded[row], expected[row], rtol=0.05, atol=0.02)
        assert not torch.equal(decoded[row], expected[row])  # these were computed in fp16


def test_fp32_stays_fp32_inside_the_callers_autocast():
    """Catches a decoder that runs in the sampler's bf16 although fp32 was configured."""
    codec = KL(path="random", **SMALL)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = codec.reconstruct(z)
    assert inside.dtype == torch.float32 and torch.equal(inside, codec.reconstruct(z))


def test_random_weights_leave_the_callers_randomness_alone():
    """Catches an initialisation that draws from the global generator, which would change the run's model."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = KL(path="random", **SMALL), KL(path="random", **SMALL)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.moments(images(1)), b.moments(images(1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of bf16, fp16, fp32"),
        ({"chunk": 0}, "chunk is 0"),
        ({"channels": (8, 10)}, "multiples of 4 groups"),
    ],
)
def test_impossible_settings(options, words):
    """Catches settings that fail late, in a library, without their name."""
    with pytest.raises(ValueError, match=words):
        KL(path="random", **(SMALL | options))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 9, 8)])
def test_images_of_the_wrong_shape(shape):
    """Catches sizes that the strided convolutions would round, so that a decoded image is smaller than its source."""
    with pytest.raises(ValueError, match="multiples of 2"):
        KL(path="random", **SMALL).moments(torch.zeros(shape))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP


def small_clip(folder: Path, *, tokenizer: bool = True) -> str:
    """A CLIP text model with random weights and a tokenizer of single letters, as files."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPTextModel(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # so that leaving out the final norm would show
                parameter.data += 0.5 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> ClipText:
    return ClipText(path=small_clip(tmp_path_factory.mktemp("clip")), chunk=2)


def test_recorded_contexts(tmp_path):
    """Catches another activation, mask, norm or tokenizer than those of the published CLIP."""
    golden, made = np.load(GOLDEN / "clip_text.npz"), json.loads((GOLDEN / "clip_text.json").read_text())
    tokens = [*made["vocab"], "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *made["merges"], ""]))
    width = made["shapes"]["text_model.final_layer_norm.weight"][0]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=made["layers"],
        num_attention_heads=made["heads"],
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    config.save_pretrained(tmp_path)
    save_file(golden_weights(made["shapes"]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    clip = ClipText(path=str(tmp_path))
    found = clip.tokenizer(made["prompts"], padding="max_length", max_length=77, truncation=True).input_ids
    assert found == golden["ids"].tolist()
    assert close(clip.encode(made["prompts"]), golden["contexts"], 1e-5)


def test_contexts_are_the_last_hidden_state_without_a_mask(clip):
    """Catches the state before the final norm, a padding mask (U-ViT's features have none), a wrong padding token."""
    start, end = len(clip.tokenizer) - 2, len(clip.tokenizer) - 1
    ids = torch.tensor([[start, ord("a") - 33 + 94, *[end] * 75], [start, *[end] * 76]])
    with torch.no_grad():
        expected = clip.model(input_ids=ids)
        masked = clip.model(input_ids=ids, attention_mask=torch.tensor([[1] * 3 + [0] * 74, [1] * 2 + [0] * 75]))
    contexts = clip.encode(["a", ""])
    assert contexts.shape == (2, 77, 16)
    torch.testing.assert_close(contexts, expected.last_hidden_state, rtol=0, atol=1e-6)
    assert not torch.allclose(contexts, masked.last_hidden_state, atol=1e-3)


def test_contexts_do_not_depend_on_the_batch(clip):
    """Catches padding to the longest prompt of a batch, and chunks that lose or reorder prompts."""
    prompts = ["a b c", "", "x" * 200, "hello", "a"]
    together = clip.encode(prompts)
    for prompt, context in zip(prompts, together, strict=True):
        torch.testing.assert_close(clip.encode([prompt])[0], context, rtol=1e-5, atol=1e-5)
    assert clip.encode([]).shape == (0, 77, 16)
    with pytest.raises(ValueError, match="list of prompts"):
        clip.encode("hello")


def test_random_contexts_need_no_files():
    """Catches prompts that cannot be tried offline, and contexts that are the same for every prompt."""
    clip = ClipText(path="random", length=5, width=6, chunk=2)
    contexts = clip.encode(["a cat", "", "A  cat on a very long mat", "dog"])
    assert contexts.shape == (4, 5, 6)
    assert torch.equal(contexts[0, :2], contexts[2, :2]) and not torch.equal(contexts[0], contexts[3])
    assert torch.equal(contexts[1], contexts[0, 2:3].expand(5, -1)), "the empty prompt is padding"
    assert torch.equal(ClipText(path="random", length=5, width=6).encode(["dog"])[0], contexts[3])
    assert ClipText(path="random").encode([""]).shape == (1, 77, 768)
    with pytest.raises(ValueError, match="clip.width is 0"):
        ClipText(path="random", width=0)


def test_a_width_that_is_not_the_models_is_refused(tmp_path):
    """Catches a setting that is silently ignored."""
    with pytest.raises(ValueError, match="clip.width is 32, and the contexts .* are 16 wide"):
        ClipText(path=small_clip(tmp_path), width=32)


def test_incomplete_clip_files_are_refused(tmp_path):
    """Catches what the library lets pass: a tokenizer without words, and tensors that it would draw at random."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="has 2 tokens and the model 190"):
        ClipText(path=small_clip(tmp_path / "a", tokenizer=False))
    small_clip(tmp_path / "b")
    state = load_file(tmp_path / "b" / "model.safetensors")
    lost = next(key for key in state if "position_embedding" in key)
    del state[lost]
    save_file(state, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors: .*position_embedding"):
        ClipText(path=str(tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="python -m scripts.download clip"):
        ClipText(path=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="length is 78; .* at most 77"):
        ClipText(path=small_clip(tmp_path / "c"), length=78)


def test_a_hub_name_is_looked_up_in_the_cache_only(tmp_path, monkeypatch):
    """Catches an evaluation that starts to download 1.7 GB, or waits for a network that is not there."""
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(FileNotFoundError, match="python -m scripts.download clip"):
        ClipText(path="nobody/no-such-model")
