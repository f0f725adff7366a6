"""Prompts -> contexts: the text half of CLIP, as Stable Diffusion and U-ViT read it."""

import os
import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from libs.build import check_at_least
from libs.files import first_line


class ClipText:
    """Contexts (n, length, width): the last hidden state after the final layer norm, without a padding mask.

    U-ViT's text features include the padded positions, so a mask, which would change them, is not passed. Nothing is
    ever downloaded from here.

    Args:
        path: folder with the model and its tokenizer, or the name of a model that is in huggingface_hub's cache;
            "random" gives every word a random vector, for runs without the files.
        length: tokens per prompt, in tokens; shorter prompts are padded, longer ones cut.
        width: of the contexts that "random" makes (768 if None); a model has its own.
        chunk: prompts per pass of the network; bounds the memory.
        device: where the network lives.

    Raises:
        FileNotFoundError: model or tokenizer is missing.
        ValueError: an impossible setting, or files that lack some of the model's tensors.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        *,
        path: str = "openai/clip-vit-large-patch14",
        length: int = 77,
        width: int | None = None,
        chunk: int = 64,
        device: torch.device | str = "cpu",
    ):
        check_at_least("clip.", length=length, chunk=chunk, width=1 if width is None else width)
        if path == "random":
            model, self.tokenizer, self.width = RandomWords(width or 768), number_words, width or 768
        else:
            model, self.tokenizer = text_model(path, length)
            self.width = model.config.hidden_size
            if width not in (None, self.width):
                raise ValueError(
                    f"clip.width is {width}, and the contexts of {path!r} are {self.width} wide; leave it out."
                )
        self.model = model.eval().requires_grad_(False).to(device)
        self.length, self.chunk, self.device = length, chunk, torch.device(device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """n prompts ("" is the null prompt of guidance) -> contexts (n, length, width) float32, where the model is."""
        if isinstance(prompts, str):
            raise ValueError(f"ClipText.encode takes a list of prompts, not the text {prompts!r}.")
        if not prompts:
            return torch.empty(0, self.length, self.width, device=self.device)
        return torch.cat([self._pass(prompts[i : i + self.chunk]) for i in range(0, len(prompts), self.chunk)])

    def _pass(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        with torch.autocast(self.device.type, enabled=False):
            return self.model(input_ids=tokens["input_ids"].to(self.device)).last_hidden_state  # (b, length, width)


def load_clip(kind: str, path: str, asset: str = "clip"):
    """transformers' class `kind` with the files of a folder, or of a model in huggingface_hub's cache.

    Raises:
        FileNotFoundError: they are not there; `asset` is what scripts.download calls them.
        ValueError: they are damaged, or lack tensors, which the library would draw at random.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("CLIP needs transformers: pip install transformers") from error
    told = {} if kind == "CLIPTokenizer" else {"output_loading_info": True}
    try:
        loaded = getattr(transformers, kind).from_pretrained(path, local_files_only=True, **told)
    except OSError as error:
        where = "in that folder" if os.path.isdir(path) else "a folder, nor in the cache of huggingface_hub"
        raise FileNotFoundError(
            f"CLIP ({kind}) at {path!r} is not {where}: {first_line(error)} `python -m scripts.download {asset}` "
            "fetches it; a folder needs config.json, model.safetensors, vocab.json and merges.txt."
        ) from error
    except Exception as error:  # damaged files make the libraries fail in any way
        kind_of = type(error).__name__
        raise ValueError(f"CLIP ({kind}) at {path!r} cannot be read ({kind_of}: {first_line(error)}).") from error
    if not told:
        return loaded
    net, info = loaded
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ValueError(f"CLIP ({kind}) at {path!r} lacks {len(missing)} tensors: {', '.join(missing[:5])}.")
    return net.float().eval().requires_grad_(False)


def text_model(path: str, length: int):
    """The text half of CLIP and its tokenizer, which `ClipText` describes; also what is raised."""
    model, tokenizer = load_clip("CLIPTextModel", path), load_clip("CLIPTokenizer", path)
    if len(tokenizer) != model.config.vocab_size:
        raise FileNotFoundError(
            f"The tokenizer of {path!r} has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            "vocab.json and merges.txt (or tokenizer.json) are missing or belong to another model. "
            "`python -m scripts.download clip` fetches them."
        )
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"clip.length is {length}; {path!r} reads at most {model.config.max_position_embeddings} tokens."
        )
    return model, tokenizer


class RandomWords(torch.nn.Module):
    """In place of CLIP: the context of a token is a random vector that depends on its word alone."""

    def __init__(self, width: int, words: int = 4096):
        super().__init__()
        vectors = torch.randn(words, width, generator=torch.Generator().manual_seed(0))
        self.vectors = torch.nn.Embedding.from_pretrained(vectors)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.vectors(input_ids))  # (b, length, width)


def number_words(prompts: Sequence[str], *, max_length: int, words: int = 4096, **_) -> dict[str, Tensor]:
    """In place of a tokenizer: 0 is padding, a word is 1 plus a hash of it; (b, max_length) int64."""
    rows = [[1 + zlib.crc32(word.encode()) % (words - 1) for word in prompt.lower().split()] for prompt in prompts]
    return {"input_ids": torch.tensor([(row + [0] * max_length)[:max_length] for row in rows])}
