"""DDPM's U-Net (Ho et al., NeurIPS 2020, arXiv 2006.11239) with resolution levels as layers.

Layer i is level i of the contracting path, the last one with the middle block; head k is the expansive path from level
k - 1 outwards. Leaving after k levels bypasses the deeper ones, as the level skipping of Giladi, Meir, Kawar and Elad
does. What the expansive path reads where it would read what they give is the setting `missing`:

    zero         zeros
    duplicate    the features that the contracting path has kept for the same level, a second time
    interpolate  these features, resized to the middle block's resolution (bicubic), through it, and back
    bridge       what the exit's own part, a `Bridge`, makes of the features that level k would be given; or zeros

The first three are theirs; "zero" and "duplicate" skip the middle block. Their report does not say what is done where
numbers of channels differ: a 1x1 convolution of the exit's own is used there, and nothing where they agree. A level
here ends with its halving convolution, which theirs leave out at the last level that runs. The blocks are diffusers'.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from libs.build import check_at_least
from libs.models.backbone import Backbone, Carry, Macs, Tokens
from libs.models.uvit import check_one_of

# What makes diffusers' UNet2DModel DDPM's and does not show in its tensors, as in google/ddpm-cifar10-32's config.json.
DDPM = dict(
    act_fn="silu",
    attention_head_dim=None,
    center_input_sample=False,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    mid_block_scale_factor=1,
    norm_eps=1e-6,
    time_embedding_type="positional",
)


class Bridge(nn.Module):
    """Features that level k would be given (b, w_{k-1}, h, w) -> what it would give back (b, w_k, 2h, 2w).

    It starts at zero, as the level skipping without it.
    """

    def __init__(self, width: int, width_below: int):
        super().__init__()
        self.proj = nn.Conv2d(width, width_below, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        return F.interpolate(self.proj(h), scale_factor=2.0, mode="nearest")


def same_width(width: int, wanted: int) -> nn.Module:
    return nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1)


class Detour(nn.Module):
    """The 1x1 convolutions, where channels differ, around the middle block: (b, w_{k-1}, s, s) -> (b, w_k, s, s)."""

    def __init__(self, width: int, width_middle: int, width_below: int):
        super().__init__()
        self.enter, self.leave = same_width(width, width_middle), same_width(width_middle, width_below)

    def forward(self, h: Tensor, side: int, middle: Callable[[Tensor], Tensor]) -> Tensor:
        """`side`: of the middle block's features."""
        small = F.interpolate(h, size=side, mode="bicubic")
        return F.interpolate(self.leave(middle(self.enter(small))), size=h.shape[-1], mode="bicubic")


MISSING = ("zero", "duplicate", "interpolate", "bridge")


class UNet(Backbone):
    """K = `len(widths)` levels of `n_blocks` residual blocks; level i has `widths[i]` channels at img_size / 2^i.

    Levels in `attention` attend after each residual block, the middle block always does. Widths are multiples of
    `groups`, the groups of the norms. `num_classes` > 0 adds a label's embedding to the time's (the last class may be
    the null class of guidance). `dropout`, in the residual blocks while training: DDPM has 0.1 for CIFAR-10, the source
    of the other defaults. `missing`: see above.
    """

    decodes = True

    def __init__(
        self,
        *,
        img_size: int,
        in_chans: int,
        widths: tuple[int, ...] = (128, 256, 256, 256),
        n_blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        groups: int = 32,
        num_classes: int = -1,
        dropout: float = 0.0,
        missing: str = "bridge",
    ):
        super().__init__()
        self.settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.counted: dict[bool, Macs] = {}
        self.depth, self.channels, self.img_size, self.widths = len(widths), in_chans, img_size, tuple(widths)
        self.n_blocks, self.num_classes, self.missing = n_blocks, max(num_classes, 0), missing
        self.needs_own = missing in ("duplicate", "interpolate")
        check_at_least("nnet.", 1, img_size=img_size, in_chans=in_chans, n_blocks=n_blocks)
        if self.depth < 2 or img_size % 2 ** (self.depth - 1):
            raise ValueError(
                f"nnet.widths is {widths}: at least 2 levels are needed, and nnet.img_size {img_size} must be a "
                f"multiple of 2^(levels - 1)"
            )
        if groups < 1 or any(width < 1 or width % groups for width in widths):
            raise ValueError(f"nnet.widths is {widths}; each must be a multiple of nnet.groups, {groups}")
        if any(level not in range(self.depth) for level in attention):
            raise ValueError(f"nnet.attention is {attention}; it must name levels in 0..{self.depth - 1}")
        if not 0 <= dropout < 1:
            raise ValueError(f"nnet.dropout is {dropout}; it is a probability and must lie in [0, 1)")
        check_one_of(missing=(missing, MISSING))
        from diffusers import UNet2DModel  # seconds: paid by those who use it

        def kinds(direction: str, levels) -> tuple[str, ...]:
            return tuple(f"{'Attn' * (level in attention)}{direction}Block2D" for level in levels)

        levels = range(self.depth)
        self.net = UNet2DModel(
            sample_size=img_size,
            in_channels=in_chans,
            out_channels=in_chans,
            down_block_types=kinds("Down", levels),
            up_block_types=kinds("Up", reversed(levels)),
            block_out_channels=self.widths,
            layers_per_block=n_blocks,
            norm_num_groups=groups,
            num_class_embeds=self.num_classes or None,
            dropout=dropout,
            **DDPM,
        )
        self.blocks = [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]  # registered in `net`

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        condition = self.net.time_embedding(self.net.time_proj(time))  # (B, E)
        if self.num_classes:
            if cond is None:
                raise ValueError(f"this U-Net has {self.num_classes} classes and needs labels")
            condition = condition + self.net.class_embedding(cond)
        elif cond is not None:
            raise ValueError("this U-Net is unconditional: it takes no labels")
        carry = Carry(h=condition, time=time, rows=torch.arange(len(x), device=x.device)).push()  # read by all blocks
        return replace(carry, h=self.net.conv_in(x))  # (B, w_0, H, W)

    def layer(self, i: int, carry: Carry) -> Carry:
        """Keeps for the expansive path what it was given and what each residual block gave."""
        condition, block = carry.stored(0), self.net.down_blocks[i]
        carry = carry.push()
        h, features = block(carry.h, temb=condition)
        for skip in features[: self.n_blocks]:
            carry = replace(carry, h=skip).push()
        if i == self.depth - 1:
            h = self.net.mid_block(h, temb=condition)
        return replace(carry, h=h)  # (b, w_i, H / 2^(i+1), W / 2^(i+1)); the last level does not halve

    def head(self, k: int, carry: Carry, own: nn.Module | None = None) -> Tensor:
        condition, h = carry.stored(0), carry.h
        if 0 < k < self.depth:
            h = self.below(k, carry, own)
        for block in self.net.up_blocks[self.depth - k :]:
            skips = []
            for _ in range(self.n_blocks + 1):
                skip, carry = carry.pop()
                skips.insert(0, skip)
            h = block(h, tuple(skips), condition)
        return self.net.conv_out(self.net.conv_act(self.net.conv_norm_out(h)))

    def below(self, k: int, carry: Carry, own: nn.Module | None) -> Tensor:
        """What stands in for the features that level k would give back, (b, w_k, H / 2^(k-1), W / 2^(k-1))."""
        kept, condition = carry.stored(-1), carry.stored(0)  # (b, w_{k-1}, ...) level k - 1 on the way down; the time
        if own is None and self.needs_own:
            raise ValueError(f"nnet.missing is {self.missing!r}: exit {k} needs a part of its own, nnet.heads=own")
        if self.missing == "duplicate":
            return own(kept)
        if self.missing == "interpolate":
            side = self.img_size // 2 ** (self.depth - 1)
            return own(kept, side, lambda h: self.net.mid_block(h, temb=condition))
        if own is None or self.missing == "zero":
            return kept.new_zeros(len(kept), self.widths[k], *kept.shape[2:])
        return own(carry.h)

    def new_head(self, k: int) -> nn.Module:
        """What exit k has of its own to stand in for the deeper levels; before the first level there is nothing."""
        if k == 0 or self.missing == "zero":
            return nn.Identity()
        above, below = self.widths[k - 1], self.widths[k]
        if self.missing == "bridge":
            return Bridge(above, below)
        return same_width(above, below) if self.missing == "duplicate" else Detour(above, self.widths[-1], below)

    def patches(self, carry: Carry) -> Tensor:
        return carry.h.flatten(2).transpose(1, 2)

    def tokens(self, k: int) -> Tokens:
        side = self.img_size // 2 ** min(k, self.depth - 1)
        return Tokens(side**2, self.widths[max(k - 1, 0)], self.channels * (self.img_size // side) ** 2)

    def macs(self, own: bool = False) -> Macs:
        """Counted by torch on a twin without memory, once."""
        if own not in self.counted:
            with torch.device("meta"):
                twin = UNet(**self.settings)
                x, time = torch.empty(1, self.channels, self.img_size, self.img_size), torch.zeros(1)
                cond = torch.zeros(1, dtype=torch.long) if self.num_classes else None
                bridges = [self.new_head(k) if own and k < self.depth else None for k in range(self.depth + 1)]
            carry, embed = count(twin.embed, x, time, cond)
            head, layers = [count(twin.head, 0, carry, bridges[0])[1]], []
            for i in range(self.depth):
                carry, macs = count(twin.layer, i, carry)
                layers.append(macs)
                head.append(count(twin.head, i + 1, carry, bridges[i + 1])[1])
            self.counted[own] = Macs(embed=embed, layers=tuple(layers), head=tuple(head))
        return self.counted[own]


@torch.no_grad()
def count(call: Callable, *args) -> tuple[Any, int]:
    """What `call` returns, and its MACs; attention as plain products, as torch counts no fused kernel of a CPU."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call(*args)
    return result, counter.get_total_flops() // 2
