"""DiT (Peebles & Xie, ICCV 2023, arXiv 2212.09748) with adaLN-Zero, and SiT (Ma et al., ECCV 2024, arXiv 2401.08740).

Both are one network under the same released names; they differ in what time they read and what they answer. A layer is
a transformer block. It and the head are modulated by one vector per image, the sum of the time's and the label's
embedding, which travels in front of the patch tokens, so that whoever keeps or joins rows has it with them.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libs.build import check_at_least
from libs.models.backbone import Backbone, Carry, Macs, Tokens
from libs.models.uvit import (
    ATTENTION,
    Attention,
    Mlp,
    PatchEmbed,
    check_multiples,
    check_one_of,
    linear_weights,
    time_embedding,
    unpatchify,
)

# The published sizes (DiT, Table 1).
DIT_SIZES = {
    "S": dict(embed_dim=384, depth=12, num_heads=6),
    "B": dict(embed_dim=768, depth=12, num_heads=12),
    "L": dict(embed_dim=1024, depth=24, num_heads=16),
    "XL": dict(embed_dim=1152, depth=28, num_heads=16),
}
CONVENTIONS = ("dit", "sit")
SINUSOID = 256  # width of the time's sinusoid before its MLP


def position_table(dim: int, side: int) -> Tensor:
    """The fixed positions of side x side patches, row-major, (1, side^2, dim): the column's sinusoid and the row's."""
    freqs = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * freqs
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], dim=1)[None].float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b, N, D), shift and scale (b, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def modulation(dim: int, n: int) -> nn.Sequential:
    """c (b, D) -> n vectors of width D, all zero at the start: a new layer is the identity (adaLN-Zero)."""
    linear = nn.Linear(dim, n * dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class DiTBlock(nn.Module):
    """x + g1 attn(m1(x)), then x + g2 mlp(m2(x)); the modulations m and gates g come from c."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, backend: str):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True, backend=backend)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu="tanh")
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, h: Tensor) -> Tensor:
        c, x = h[:, 0], h[:, 1:]  # (b, D), (b, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))
        return torch.cat([h[:, :1], x], dim=1)  # (b, 1 + N, D)


class FinalLayer(nn.Module):
    """Patch tokens (b, N, D) and c (b, D) -> image (b, out_channels, H, W). It starts at zero."""

    def __init__(self, dim: int, patch: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.norm_final = norm(dim)
        self.linear = nn.Linear(dim, patch * patch * out_channels)
        self.adaLN_modulation = modulation(dim, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return unpatchify(self.linear(modulated(self.norm_final(x), shift, scale)), self.out_channels)


class DiT(Backbone):
    """The released DiT; K = `depth`.

    `learn_sigma`: the network has 2 C outputs, as the released ones. The second C are variances (DiT) or unused (SiT);
    they are kept in the file, and neither trained nor returned. `num_classes` counts the null class of guidance too.
    `convention` "sit": the sinusoid reads 1 - time / 1000, which is 0 in the noise and 1 in the data, and the output
    is turned round, because SiT's velocity points to the data and ours (sde.py) to the noise.
    """

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
        num_classes: int = -1,
        learn_sigma: bool = True,
        convention: str = "dit",
        use_checkpoint: bool = False,
        attention: str = "sdpa",
    ):
        super().__init__()
        check_one_of(attention=(attention, ATTENTION), convention=(convention, CONVENTIONS))
        check_multiples(img_size=(img_size, "patch_size", patch_size), embed_dim=(embed_dim, "num_heads", num_heads))
        if embed_dim % 4:
            raise ValueError(f"nnet.embed_dim is {embed_dim}; a DiT's positions need a multiple of 4")
        check_at_least("nnet.", 1, depth=depth, in_chans=in_chans)
        check_at_least("nnet.", 1 / embed_dim, mlp_ratio=mlp_ratio)
        self.depth, self.channels, self.img_size, self.patch_size = depth, in_chans, img_size, patch_size
        self.embed_dim, self.num_classes, self.use_checkpoint = embed_dim, max(num_classes, 0), use_checkpoint
        self.sit, self.num_heads, self.n_patches = convention == "sit", num_heads, (img_size // patch_size) ** 2

        self.x_embedder = PatchEmbed(patch_size, in_chans, embed_dim)
        mlp = nn.Sequential(nn.Linear(SINUSOID, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        if self.num_classes:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes, embed_dim)})
        positions = position_table(embed_dim, img_size // patch_size)
        self.pos_embed = nn.Parameter(positions.to(self.x_embedder.proj.weight.device), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(embed_dim, num_heads, mlp_ratio, attention) for _ in range(depth))
        self.final_layer = FinalLayer(embed_dim, patch_size, in_chans * (2 if learn_sigma else 1))
        self._initialise()

    def _initialise(self) -> None:
        """As released: Xavier for maps and patches, N(0, 0.02) for the embeddings of time and label."""
        for block in self.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for linear in self.t_embedder["mlp"][::2]:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.num_classes:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        patches = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        c = self.t_embedder["mlp"](time_embedding(1 - time / 1000 if self.sit else time, SINUSOID))  # (B, D)
        if self.num_classes:
            if cond is None:
                raise ValueError(f"this DiT has {self.num_classes} classes and needs labels")
            c = c + self.y_embedder["embedding_table"](cond)
        elif cond is not None:
            raise ValueError("this DiT is unconditional: it takes no labels")
        h = torch.cat([c[:, None].to(patches.dtype), patches], dim=1)  # (B, 1 + N, D)
        return Carry(h=h, time=time, rows=torch.arange(len(x), device=x.device))

    def layer(self, i: int, carry: Carry) -> Carry:
        if self.use_checkpoint and torch.is_grad_enabled():
            return replace(carry, h=checkpoint(self.blocks[i], carry.h, use_reentrant=False))
        return replace(carry, h=self.blocks[i](carry.h))

    def patches(self, carry: Carry) -> Tensor:
        return carry.h[:, 1:]

    def head(self, k: int, carry: Carry, own: nn.Module | None = None) -> Tensor:
        out = (self.final_layer if own is None else own)(self.patches(carry), carry.h[:, 0])[:, : self.channels]
        return -out if self.sit else out

    def new_head(self, k: int) -> FinalLayer:
        head = FinalLayer(self.embed_dim, self.patch_size, self.final_layer.out_channels)
        head.load_state_dict(self.final_layer.state_dict())
        return head

    def tokens(self, k: int) -> Tokens:
        return Tokens(self.n_patches, self.embed_dim, self.patch_size**2 * self.channels)

    def macs(self, own: bool = False) -> Macs:
        d, n, block = self.embed_dim, self.n_patches, self.blocks[0]
        per_patch = linear_weights(block.attn) + linear_weights(block.mlp)
        layer = n * per_patch + 2 * n * n * d + 6 * d * d  # linear maps; Q K^T and A V; modulation
        embed = n * self.x_embedder.proj.weight.numel() + SINUSOID * d + d * d
        head = n * self.final_layer.linear.weight.numel() + 2 * d * d
        return Macs(embed=embed, layers=(layer,) * self.depth, head=(head,) * (self.depth + 1))
