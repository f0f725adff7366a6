"""A backbone that can be left early: own or shared heads, and an uncertainty estimator at each exit point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from libs.models.backbone import Backbone, Carry, Macs
from libs.models.gaussian import Gaussian
from libs.models.uem import NoEstimator
from libs.models.uvit import check_one_of, unpatchify

HEADS = ("shared", "own")


@dataclass(frozen=True)
class AllExits:
    """Several exits of one network call: what training and dense evaluation look at."""

    points: tuple[int, ...]  # the E exits, in layers used, ascending
    out: Tensor  # (E, B, C, H, W) raw network outputs
    u: Tensor  # (E, B, C, H, W), or (E, B) from a scalar estimator
    full: bool = True  # whether the last exit is K, full depth
    gaussian: bool = False  # whether the first exit is one, where nothing is learned

    @property
    def learned(self) -> slice:
        return slice(int(self.gaussian), None)

    @property
    def mean_u(self) -> Tensor:
        """(E, B) image-level uncertainty: what an exit policy compares with its threshold."""
        return self.u.flatten(2).mean(2) if self.u.dim() > 2 else self.u


class EarlyExitModel(nn.Module):
    """backbone + heads + estimator. The network never decides: policies do (libs/exits).

    `points` are the layers after which it may be left; () means after every layer; 0 skips a whole call. `heads`
    "shared" uses the backbone's head at every exit (released AdaDiff); "own" gives every exit but the last a part of
    its own (`Backbone.new_head`): a head in a U-ViT, the bridge into the decoder in a U-Net. With a `gaussian`, exit 0
    is among the exits, and what the Gaussian of the data says is its prediction (libs/models/gaussian.py).

    >>> from libs.models import UViT
    >>> from libs.models.uem import Linear
    >>> network = UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=6, num_heads=4)
    >>> model = EarlyExitModel(network, Linear, points=(2, 4), heads="own")
    >>> exits = model(torch.randn(5, 1, 8, 8), torch.full((5,), 500.0))
    >>> exits.points, exits.out.shape, exits.mean_u.shape
    ((2, 4, 7), torch.Size([3, 5, 1, 8, 8]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        backbone: Backbone,
        estimator: type[nn.Module],
        *,
        points=(),
        heads="shared",
        gaussian: Gaussian | None = None,
        **estimator_options,
    ):
        super().__init__()
        depth = backbone.depth
        points = tuple(points) or tuple(range(1, depth + 1))
        check_one_of(heads=(heads, HEADS))
        if (
            any(type(k) is not int for k in points)
            or list(points) != sorted(set(points))
            or points[0] < 0
            or points[-1] > depth
        ):
            raise ValueError(f"nnet.points is {points}; exits must be ascending layer counts in 0..{depth}")
        if gaussian is not None and points[0]:
            points = (0, *points)
        self.points = points if points[-1] == depth else (*points, depth)
        self.depth, self.backbone = depth, backbone
        self.compiled: str | Callable = ""  # the backend of `compile_blocks`
        if heads == "shared" and backbone.needs_own:
            raise ValueError("nnet.heads is 'shared'; this network needs own, as its exits have parts of their own")
        own = self.points[:-1] if heads == "own" else ()
        self.heads = nn.ModuleDict({str(k): backbone.new_head(k) for k in own if k or gaussian is None})
        self.gaussian = gaussian
        self.uem = estimator([backbone.tokens(k) for k in range(depth + 1)], self.points, **estimator_options)
        if gaussian is not None and gaussian.macs >= (layers := sum(backbone.macs().layers[: self.points[1]])):
            raise ValueError(
                f"nnet.gaussian is {gaussian.basis.shape[2]}, whose {gaussian.macs:,} MACs are no less than the "
                f"{layers:,} of the layers up to exit {self.points[1]}: take fewer directions"
            )

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Carry:
        carry = self.backbone.embed(x, time, cond)
        return carry if self.gaussian is None else replace(carry, inputs=(x, cond))

    def layer(self, i: int, carry: Carry) -> Carry:
        return self.backbone.layer(i, carry if carry.inputs is None else replace(carry, inputs=None))

    def head(self, k: int, carry: Carry) -> Tensor:
        """(b, C, H, W): exit k's prediction, through its own head where it has one."""
        if k == 0 and self.gaussian is not None:
            x, cond = carry.inputs
            return self.gaussian(x, carry.time, cond)
        return self.backbone.head(k, carry, self.heads[str(k)] if str(k) in self.heads else None)

    @property
    def one_head(self) -> bool:
        """Whether rows that left at different exits can pass one head together, with nothing but their tokens."""
        return not (self.heads or self.backbone.decodes or self.gaussian is not None)

    def uncertainty(self, k: int, carry: Carry) -> Tensor:
        """(b,): the mean of exit k's uncertainty over the image."""
        u = self.estimate(k, carry)
        return u.flatten(1).mean(1) if u.dim() > 1 else u

    def uncertainty_map(self, k: int, carry: Carry) -> Tensor:
        """(b, C, H, W), or (b,) from a scalar estimator."""
        u = self.estimate(k, carry)
        return unpatchify(u, self.backbone.channels) if u.dim() > 1 else u

    def predict_ahead(self, carry: Carry) -> Tensor | None:
        """(b, E): every exit's uncertainty before the first layer, from an estimator that looks ahead; or None."""
        return self.uem(self.backbone.patches(carry), carry.time) if self.uem.ahead else None

    def questions(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Where the estimator works when a policy asks at the exits `asked`: one that looks ahead, at 0 only."""
        return (0,) if self.uem.ahead and asked else asked

    def estimate(self, k: int, carry: Carry) -> Tensor:
        """Exit k's uncertainty in the estimator's own layout: (b, N, p p C), or (b,)."""
        tokens = self.backbone.all_tokens(carry) if self.uem.all_tokens else self.backbone.patches(carry)
        return self.uem(k, tokens, carry.time)

    def forward(
        self, x: Tensor, time: Tensor, cond: Tensor | None = None, points: tuple[int, ...] | None = None
    ) -> AllExits:
        """Leave at every exit of `points` (default: all), ascending; layers beyond the last of them do not run.

        x (B, C, H, W), time (B,).
        """
        points = self.points if points is None else points
        carry = self.embed(x, time, cond)
        ahead = self.predict_ahead(carry)
        out, u = [], []
        for k in range(points[-1] + 1):
            if k:
                carry = self.layer(k - 1, carry)
            if k in points:
                out.append(self.head(k, carry))
                u.append(self.uncertainty_map(k, carry) if ahead is None else ahead[:, self.points.index(k)])
        flags = dict(full=points[-1] == self.depth, gaussian=self.gaussian is not None and points[0] == 0)
        return AllExits(points, torch.stack(out).float(), torch.stack(u), **flags)

    def copy_heads(self) -> None:
        """Start every own head as `new_head` does: called after a network without exits was loaded."""
        for k, head in self.heads.items():
            head.load_state_dict(self.backbone.new_head(int(k)).state_dict())

    def drop_exits(self, heads: bool, gaussian: bool = False) -> None:
        """What remains can be sampled by policies that ask nothing: a released network without exits.

        `heads`: own heads are dropped too, and all exits share the backbone's. `gaussian`: so is exit 0.
        """
        self.uem = NoEstimator()
        if gaussian and self.gaussian is not None:
            self.points, self.gaussian = self.points[1:], None
        if heads:
            self.heads = nn.ModuleDict()

    def freeze_backbone(self) -> None:
        """Train the estimator and the own heads only. With shared heads nothing but the estimator is left to train."""
        self.backbone.requires_grad_(False)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile the blocks of the backbone, for training and for sampling, at any exits and any number of rows.

        Blocks of one kind share their graphs, of which there are three: for the first number of rows, for any other,
        and for one row. So an early exit needs no graph of its own, and removes rows between two blocks.

        Args:
            backend: of torch.compile.

        Raises:
            ValueError: the network's blocks are all different, as a U-Net's.
        """
        if self.backbone.decodes:
            raise ValueError("compile is True, which is for networks of equal blocks (U-ViT, DiT, SiT), not for U-Nets")
        self.compiled = backend
        for block in self.backbone.blocks:
            block.compile(backend=backend, fullgraph=True)

    @contextmanager
    def weights_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, the weights of linear maps and convolutions are `dtype`; None changes nothing.

        Autocast would cast the same weights to the same numbers at every call. Norms, embeddings and the estimator
        stay as they are.
        """
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        parts = [m for part in (self.backbone, self.heads) for m in part.modules() if isinstance(m, kinds)]
        weights = [p for m in parts for p in m.parameters(recurse=False) if p.dtype == torch.float32]
        full = [p.data for p in weights]
        with torch.inference_mode(False):
            half = full if dtype is None else [p.to(dtype) for p in full]
        try:
            for parameter, cast in zip(weights, half, strict=True):
                parameter.data = cast
            yield
        finally:
            for parameter, was in zip(weights, full, strict=True):
                parameter.data = was

    def macs(self) -> Macs:
        """Per image and call: backbone, heads and questions to the estimator."""
        places = self.questions(self.points)
        ask = tuple(self.uem.macs(k) if k in places else 0 for k in range(self.depth + 1))
        macs = replace(self.backbone.macs(own=bool(self.heads)), ask=ask)
        return macs if self.gaussian is None else replace(macs, head=(self.gaussian.macs, *macs.head[1:]))
