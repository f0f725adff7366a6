"""U-ViT (Bao et al., CVPR 2023, arXiv 2209.12152), for class labels, text and neither, with the released names.

Token order as released: [label, time, patches], [time, patches] or [time, text, patches].
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libs.build import check_at_least
from libs.models.backbone import Backbone, Carry, Macs, Tokens

# The published sizes: width, layers in the two halves (the middle layer comes on top), attention heads. method: U-ViT
# Table 1; "S-deep" is the text model with four more layers.
SIZES = {
    "S": dict(embed_dim=512, depth=12, num_heads=8),
    "S-deep": dict(embed_dim=512, depth=16, num_heads=8),
    "M": dict(embed_dim=768, depth=16, num_heads=12),
    "L": dict(embed_dim=1024, depth=20, num_heads=16),
    "H": dict(embed_dim=1152, depth=28, num_heads=16),
}
ATTENTION = ("sdpa", "math", "xformers")
INITS = ("released", "xavier")

# run(j, f, h): the residual f(h) (b, L, D) of a layer's sublayer j, 0 attention and 1 MLP, or what stands for it
RunSublayer = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def time_embedding(time: Tensor, dim: int) -> Tensor:
    """Sinusoid of `time` (B,), any float: (B, dim), cosines first, wavelengths 2 pi .. 2 pi 10^4."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time[:, None].float() * freqs  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def unpatchify(tokens: Tensor, channels: int) -> Tensor:
    """(b, N, p p C), channels fastest, N a square grid -> (b, C, H, W)."""
    side = math.isqrt(tokens.shape[1])
    patch = math.isqrt(tokens.shape[2] // channels)
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch, q=patch, c=channels)


def check_one_of(**settings: tuple[str, tuple[str, ...]]) -> None:
    """Refuse a setting of nnet that is none of its allowed values: name=(value, allowed)."""
    for name, (value, allowed) in settings.items():
        if value not in allowed:
            raise ValueError(f"nnet.{name} is {value!r}; it must be one of {', '.join(allowed)}")


def check_multiples(**settings: tuple[int, str, int]) -> None:
    """Refuse a setting of nnet that is no multiple of another: name=(value, the other's name, the other's value)."""
    for name, (value, other, unit) in settings.items():
        if unit < 1 or value < 1 or value % unit:
            raise ValueError(f"nnet.{name} {value} is not a multiple of nnet.{other} {unit}")


def linear_weights(module: nn.Module) -> int:
    """Numbers in the weights of all linear maps inside: their MACs for one token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if backend == "xformers":
            try:
                import xformers.ops
            except ImportError as error:
                raise ValueError("nnet.attention='xformers' needs the xformers package; use 'sdpa'") from error
            self.memory_efficient_attention = xformers.ops.memory_efficient_attention

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        if self.backend == "xformers":  # its layout is (b, n, heads, d)
            if not x.is_cuda:
                raise ValueError("nnet.attention='xformers' runs on CUDA only; use 'sdpa' on a CPU")
            y = self.memory_efficient_attention(*qkv.unbind(2))
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (b, heads, n, d / heads), in the activations' own dtype
            if self.backend == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
            y = y.transpose(1, 2)
        return self.proj(y.reshape(b, n, d))


class Mlp(nn.Module):
    """`gelu`: "none" is exact, "tanh" its approximation (DiT)."""

    def __init__(self, dim: int, hidden: int, gelu: str = "none"):
        super().__init__()
        self.fc1, self.fc2, self.gelu = nn.Linear(dim, hidden), nn.Linear(hidden, dim), gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class Block(nn.Module):
    """Pre-norm transformer block; with `skip`, first mixes a long skip in: x <- W [x, skip]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, backend: str, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, backend)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None, run: RunSublayer | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        run = run or (lambda j, f, x: f(x))
        x = x + run(0, self.attention, x)
        return x + run(1, self.feed_forward, x)

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (b, N, D), row-major patches


class Head(nn.Module):
    """Patch tokens -> image: LayerNorm, linear, unpatchify, 3x3 convolution (paper Eq. 9: g)."""

    def __init__(self, dim: int, patch: int, channels: int, conv: bool):
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch * patch * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.final_layer(unpatchify(self.decoder_pred(self.norm(tokens)), self.channels))


class UViT(Backbone):
    """The released U-ViT. `depth` counts the layers of the two halves; with the middle one, K = depth + 1.

    `num_classes` > 0 adds a label token (the last class may be the null class of guidance); `clip_dim` > 0 adds
    `num_clip_token` text tokens. `init` is "released" (normal, std 0.02) or "xavier" (which trains small models in far
    fewer steps). `time_scale` multiplies the network time before its sinusoid: the replication's 1/1000. Without `skip`
    the second half of the layers reads nothing of the first.

    >>> network = UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=6, num_heads=4, num_classes=10)
    >>> network.depth, network.macs().at(3), network.macs().at(7)  # K; MACs of a call that leaves after 3 and 7 layers
    (7, 730432, 1808704)
    >>> network(torch.randn(5, 1, 8, 8), torch.full((5,), 500.0), torch.arange(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    sublayers = True

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        time_scale: float = 1.0,
        num_classes: int = -1,
        clip_dim: int = 0,
        num_clip_token: int = 77,
        conv: bool = True,
        skip: bool = True,
        use_checkpoint: bool = False,
        attention: str = "sdpa",
        init: str = "released",
    ):
        super().__init__()
        check_one_of(attention=(attention, ATTENTION), init=(init, INITS))
        check_at_least("nnet.", 0, clip_dim=clip_dim)
        check_at_least("nnet.", 1, in_chans=in_chans, num_clip_token=num_clip_token)
        if depth < 2 or depth % 2:
            raise ValueError(f"nnet.depth is {depth}; it must be even and at least 2 (the middle layer comes on top)")
        check_multiples(img_size=(img_size, "patch_size", patch_size), embed_dim=(embed_dim, "num_heads", num_heads))
        check_at_least("nnet.", 1 / embed_dim, mlp_ratio=mlp_ratio)
        if num_classes > 0 and clip_dim > 0:
            raise ValueError("a U-ViT takes labels (nnet.num_classes) or text (nnet.clip_dim), not both")
        self.depth = depth + 1
        self.channels, self.embed_dim, self.patch_size = in_chans, embed_dim, patch_size
        self.img_size, self.num_classes, self.use_checkpoint = img_size, max(num_classes, 0), use_checkpoint
        self.time_scale, self.skip = time_scale, skip
        self.n_patches = (img_size // patch_size) ** 2
        self.extras = 1 + (num_classes > 0) + (num_clip_token if clip_dim else 0)
        self.context_shape = (num_clip_token, clip_dim) if clip_dim else None

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed = (
            nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim))
            if mlp_time_embed
            else nn.Identity()
        )
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        if clip_dim:
            self.context_embed = nn.Linear(clip_dim, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.n_patches, embed_dim))

        def block(skip=False):
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, attention, skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]  # a plain list: registered above
        # The head's parts are top-level names in the released files, so they are registered here, not as one module.
        head = Head(embed_dim, patch_size, in_chans, conv)
        self.norm, self.decoder_pred, self.final_layer = head.norm, head.decoder_pred, head.final_layer
        self._initialise(init)

    def _initialise(self, init: str) -> None:
        """Released: N(0, 0.02) linear weights, zero biases; the convolutions and the label table keep torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if init == "released":
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embed, std=0.02 if init == "released" else 0.5)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        sinusoid = time_embedding(time * self.time_scale, self.embed_dim)  # (B, D)
        tokens = [self.time_embed(sinusoid)[:, None], self.patch_embed(x)]
        if self.num_classes:
            if cond is None:
                raise ValueError(f"this U-ViT has {self.num_classes} classes and needs labels")
            tokens.insert(0, self.label_emb(cond)[:, None])
        elif self.context_shape:
            if cond is None:
                raise ValueError(f"this U-ViT needs a text context of shape {self.context_shape} per row")
            tokens.insert(1, self.context_embed(cond))
        elif cond is not None:
            raise ValueError("this U-ViT is unconditional: it takes no labels and no text")
        h = torch.cat([token.to(tokens[-1].dtype) for token in tokens], dim=1) + self.pos_embed  # (B, L, D)
        return Carry(h=h, time=time, rows=torch.arange(len(x), device=x.device))

    def layer(self, i: int, carry: Carry, run: RunSublayer | None = None) -> Carry:
        half = self.depth // 2
        skip = None
        if self.skip and i > half:
            skip, carry = carry.pop()
        block = self.blocks[i]
        if self.use_checkpoint and torch.is_grad_enabled() and run is None:
            h = checkpoint(block, carry.h, skip, use_reentrant=False)
        else:
            h = block(carry.h, skip, run)
        carry = replace(carry, h=h)
        return carry.push() if self.skip and i < half else carry

    def patches(self, carry: Carry) -> Tensor:
        return carry.h[:, self.extras :]

    def all_tokens(self, carry: Carry) -> Tensor:
        return carry.h

    def head(self, k: int, carry: Carry, own: nn.Module | None = None) -> Tensor:
        patches = self.patches(carry)
        return Head.forward(self, patches) if own is None else own(patches)

    def new_head(self, k: int) -> Head:
        head = Head(self.embed_dim, self.patch_size, self.channels, isinstance(self.final_layer, nn.Conv2d))
        for name, part in head.named_children():
            part.load_state_dict(getattr(self, name).state_dict())
        return head

    def tokens(self, k: int) -> Tokens:
        return Tokens(self.n_patches, self.embed_dim, self.patch_size**2 * self.channels, self.extras)

    def macs(self, own: bool = False) -> Macs:
        d, n = self.embed_dim, self.n_patches
        length = n + self.extras
        attn, mlp = (length * linear_weights(part) for part in (self.mid_block.attn, self.mid_block.mlp))
        attn += 2 * length * length * d  # Q K^T and A V
        block = attn + mlp
        embed = n * self.patch_embed.proj.weight.numel() + linear_weights(self.time_embed)
        if self.context_shape:
            embed += self.context_shape[0] * self.context_embed.weight.numel()
        head = n * self.decoder_pred.weight.numel()
        if isinstance(self.final_layer, nn.Conv2d):
            head += self.img_size**2 * self.final_layer.weight.numel()
        half = self.depth // 2
        layers = [block] * (half + 1) + [block + self.skip * length * 2 * d * d] * half
        return Macs(embed=embed, layers=tuple(layers), head=(head,) * (self.depth + 1), sublayers=(attn, mlp))
