"""Uncertainty estimators (UEM): how far a layer's prediction is from the truth, read off its tokens.

All estimators have one shape: called with (k, patches (b, N, D), time (b,)) they return the
uncertainty in [0, 1], float32, larger = worse: a map (b, N, p p C) in token layout, or one number per row (b,).
Those with `all_tokens` are given every token (b, L, D) instead of the patches; one that looks `ahead` is called once,
with (patches, time) before the first layer, and returns (b, E), a number for every exit. They are made from what the
tokens look like after 0 .. K layers and from the exits `points`.
They read detached tokens, so fitting them never moves the backbone (paper section 3.2; released code does the same).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.build import check_at_least
from libs.models.backbone import Tokens
from libs.models.uvit import time_embedding

UEM_OUTPUTS = ("map", "scalar")


class Estimator(nn.Module):
    """Base of the estimators, which are called as described above.

    >>> tokens = [Tokens(n=16, width=32, patch_dim=4)] * 8  # after 0 .. 7 layers
    >>> h, time = torch.randn(5, 16, 32), torch.full((5,), 500.0)
    >>> estimator = ESTIMATORS["linear"](tokens, points=(1, 4, 7))
    >>> estimator(4, h, time).shape, estimator.macs(4)  # a map
    (torch.Size([5, 16, 4]), 2048)
    >>> estimator = ESTIMATORS["time_bank"](tokens, points=(1, 4, 7))
    >>> estimator(4, h, time).shape, estimator.macs(4)  # a number per image
    (torch.Size([5]), 32)
    >>> estimator = ESTIMATORS["ahead"](tokens, points=(1, 4, 7))
    >>> estimator(h, time).shape, estimator.macs(0)  # all exits at once
    (torch.Size([5, 3]), 35008)
    """

    all_tokens = False
    ahead = False
    scalar = True

    def macs(self, k: int) -> int:
        """MACs of one question about one row at exit k."""
        raise NotImplementedError


class Linear(Estimator):
    """u_k = sigmoid(W_k h_k + b_k), one linear map per exit: the released AdaDiff form.

    `norm` puts a LayerNorm in front: token norms grow by orders of magnitude with depth, and without it the sigmoid
    saturates at 0 and stops learning. `output` "map" estimates every pixel and channel; "scalar" estimates the image's
    mean from the mean patch token, which costs one matrix-vector product.
    """

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...], *, norm: bool = True, output: str = "map"):
        super().__init__()
        if output not in UEM_OUTPUTS:
            name = f"uem.{type(self).__name__.lower()}.output"
            raise ValueError(f"{name} is {output!r}; it must be one of {', '.join(UEM_OUTPUTS)}")
        self.scalar = output == "scalar"
        self.grids = [1 if self.scalar else of.n for of in tokens]  # estimates per row are this many times `out`
        self.norms = nn.ModuleDict({str(k): nn.LayerNorm(tokens[k].width) for k in points} if norm else {})
        self.maps = nn.ModuleDict({str(k): nn.Linear(tokens[k].width, self.out(tokens[k])) for k in points})
        for linear in self.maps.values():  # start undecided: u = 1/2 up to the small weights
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def out(self, of: Tokens) -> int:
        return 1 if self.scalar else of.patch_dim

    def logits(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        h = patches.detach().float()  # (b, N, D)
        if self.scalar:
            h = h.mean(dim=1)  # (b, D)
        if str(k) in self.norms:
            h = self.norms[str(k)](h)
        return self.maps[str(k)](h)

    def forward(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D), time (b,) -> (b, N, p p C), or (b,) for a scalar estimator."""
        with torch.autocast(patches.device.type, enabled=False):
            u = self.logits(k, patches, time).sigmoid()
        return u[:, 0] if self.scalar else u

    def macs(self, k: int) -> int:
        return self.grids[k] * self.maps[str(k)].weight.numel()


class Time(Linear):
    """u_k = sigmoid(W_k [h_k, e(t)] + b_k) with e the sinusoidal time embedding of each row (paper Eq. 8)."""

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...], *, norm: bool = True, output: str = "map"):
        super().__init__(tokens, points, norm=norm, output=output)
        self.time_maps = nn.ModuleDict(
            {str(k): nn.Linear(tokens[k].width, self.out(tokens[k]), bias=False) for k in points}
        )
        for linear in self.time_maps.values():
            nn.init.normal_(linear.weight, std=0.02)

    def logits(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        time_map = self.time_maps[str(k)]
        shift = time_map(time_embedding(time, time_map.in_features))  # (b, out): every row has its own time
        return super().logits(k, patches, time) + (shift if self.scalar else shift[:, None])

    def macs(self, k: int) -> int:
        return super().macs(k) + self.time_maps[str(k)].weight.numel()


class Probe(Estimator):
    """u_k = mean over all tokens of sigmoid(w_k h_k + b_k): the MLP probe of the replication (Matisan et al. 2024).

    Nobody asks at the last exit, so it has no probe there: u = 0.
    """

    all_tokens = True

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...]):
        super().__init__()
        self.lengths = [of.n + of.extras for of in tokens]
        self.first = min(1, tokens[0].extras)
        self.maps = nn.ModuleDict({str(k): self.probe(tokens[k].width) for k in points[:-1]})

    def probe(self, width: int) -> nn.Module:
        return nn.Linear(width, 1)

    def score(self, k: int, tokens: Tensor) -> Tensor:
        """tokens (b, L, D) -> (b,): the probe's own value."""
        return self.maps[str(k)](tokens).sigmoid().mean((1, 2))

    def forward(self, k: int, tokens: Tensor, time: Tensor) -> Tensor:
        """tokens (b, L, D) -> (b,)."""
        if str(k) not in self.maps:
            return tokens.new_zeros(len(tokens), dtype=torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.score(k, tokens.detach().float())

    def macs(self, k: int) -> int:
        return self.lengths[k] * self.maps[str(k)].weight.numel() if str(k) in self.maps else 0


class AttentionProbe(Probe):
    """The attention probe of the replication (Matisan et al. 2024), its weights one to one.

    A learned query q attends with one head to all tokens but the first, if that is no patch:
    a = softmax(q W_key h_n / sqrt(D)), and u_k = w silu(W (sum_n a_n W_value h_n + b_value) + b) + c. No sigmoid bounds
    it, though it is fitted to [0, 1): what leaves that range is cut to it here and the gradient passes, so that
    comparisons with a threshold stay theirs.
    """

    def probe(self, width):
        return OneQuery(width)

    def score(self, k, tokens):
        return self.maps[str(k)](tokens[:, self.first :])

    def forward(self, k, tokens, time):
        u = super().forward(k, tokens, time)
        return u + (u.clamp(0, 1) - u).detach()

    def macs(self, k):
        if str(k) not in self.maps:
            return 0
        width = self.maps[str(k)].q.shape[-1]
        # scores and sum, value and hidden map, last map
        return 2 * (self.lengths[k] - self.first) * width + 2 * width**2 + width


class OneQuery(nn.Module):
    """One attention probe. One query needs no key and value of each token, only of the pooled one."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.weight_kv = nn.Linear(width, 2 * width)
        self.classification = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, h: Tensor) -> Tensor:
        """h (b, n, D) -> (b,)."""
        key, value = self.weight_kv.weight.chunk(2)  # (D, D) each; the bias of the keys cancels in the softmax
        query = (key.T @ self.q.flatten())[:, None]  # (D, 1), once for all rows
        weights = (h @ query * h.shape[-1] ** -0.5).softmax(dim=1)  # (b, n, 1)
        pooled = F.linear((weights.transpose(1, 2) @ h)[:, 0], value, self.weight_kv.bias.chunk(2)[1])  # (b, D)
        return self.classification(pooled)[:, 0]


class Shared(Estimator):
    """u_k = mean_n sigmoid(w norm(h_kn) + v e(t) + b): one classifier for all exits, told the time of each row.

    The replication's first draft. All exits need tokens of one width, so U-Nets cannot have it.
    """

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...]):
        super().__init__()
        widths = {of.width for of in tokens}
        if len(widths) > 1:
            raise ValueError(
                f"uem.name is shared, one classifier for all exits; this network's tokens have widths {sorted(widths)}"
            )
        (width,) = widths
        self.grids = [of.n for of in tokens]
        self.norm, self.map = nn.LayerNorm(width), nn.Linear(width, 1)
        self.time_map = nn.Linear(width, 1, bias=False)

    def forward(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D), time (b,) -> (b,)."""
        with torch.autocast(patches.device.type, enabled=False):
            shift = self.time_map(time_embedding(time, self.time_map.in_features))  # (b, 1)
            logits = self.map(self.norm(patches.detach().float()))[..., 0] + shift  # (b, N)
            return logits.sigmoid().mean(1)

    def macs(self, k: int) -> int:
        return (self.grids[k] + 1) * self.map.in_features


class TimeBank(Estimator):
    """u_k = sigmoid(w_{k,j} h_k + b_{k,j}): weights of their own for each of `bins` equal bins j of time (paper Eq. 8).

    h_k is the mean patch token. Every row gathers the weights of its own time: a public attempt took the first row's
    for the whole batch, and its banks never learned.
    """

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...], *, bins: int = 50, norm: bool = True):
        super().__init__()
        check_at_least("uem.time_bank.", bins=bins)
        self.bins = bins
        self.norms = nn.ModuleDict({str(k): nn.LayerNorm(tokens[k].width) for k in points} if norm else {})
        self.maps = nn.ModuleDict({str(k): nn.Embedding(bins, tokens[k].width) for k in points})
        self.shifts = nn.ModuleDict({str(k): nn.Embedding(bins, 1) for k in points})
        for bank, shift in zip(self.maps.values(), self.shifts.values(), strict=True):
            nn.init.normal_(bank.weight, std=0.02)
            nn.init.zeros_(shift.weight)

    def bin(self, time: Tensor) -> Tensor:
        """(b,): network times run from 0 to 999 or 1000."""
        return (time * self.bins / 1000).long().clamp(0, self.bins - 1)

    def forward(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D), time (b,) -> (b,)."""
        key, bins = str(k), self.bin(time)
        with torch.autocast(patches.device.type, enabled=False):
            h = patches.detach().float().mean(dim=1)  # (b, D)
            h = self.norms[key](h) if key in self.norms else h
            u = (self.maps[key](bins)[:, None] @ h[:, :, None])[:, 0] + self.shifts[key](bins)  # (b, 1)
        return u[:, 0].sigmoid()

    def macs(self, k: int) -> int:
        return self.maps[str(k)].embedding_dim


class AttentionPool(Estimator):
    """u_k = sigmoid(MLP(sum_n a_n h_kn)), a = softmax(q_k h_kn / sqrt(D)): a learned query pools the patch tokens.

    The query starts at zero, which is the mean.
    """

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...], *, hidden: int = 64):
        super().__init__()
        check_at_least("uem.attention.", hidden=hidden)
        self.grids = [of.n for of in tokens]
        widths = {str(k): tokens[k].width for k in points}
        self.norms = nn.ModuleDict({k: nn.LayerNorm(width) for k, width in widths.items()})
        self.queries = nn.ModuleDict({k: nn.Linear(width, 1, bias=False) for k, width in widths.items()})
        self.hidden = nn.ModuleDict({k: nn.Linear(width, hidden) for k, width in widths.items()})
        self.maps = nn.ModuleDict({str(k): nn.Linear(hidden, 1) for k in points})
        for query, last in zip(self.queries.values(), self.maps.values(), strict=True):
            nn.init.zeros_(query.weight)
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)

    def forward(self, k: int, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D) -> (b,)."""
        key = str(k)
        with torch.autocast(patches.device.type, enabled=False):
            h = self.norms[key](patches.detach().float())
            weights = (self.queries[key](h) * h.shape[-1] ** -0.5).softmax(dim=1)  # (b, N, 1)
            pooled = (weights.transpose(1, 2) @ h)[:, 0]  # (b, D)
            return self.maps[key](F.silu(self.hidden[key](pooled)))[:, 0].sigmoid()

    def macs(self, k: int) -> int:
        query, hidden, last = (part[str(k)] for part in (self.queries, self.hidden, self.maps))
        return 2 * self.grids[k] * query.in_features + hidden.weight.numel() + last.weight.numel()


class Ahead(Estimator):
    """All exits' uncertainty from one look at the embedded patches and the time: one decision per network call.

    u = sigmoid(W mean_n silu(A h_0n + B e(t)) + b), h_0 the patch tokens before the first layer.
    """

    ahead = True

    def __init__(self, tokens: Sequence[Tokens], points: tuple[int, ...], *, hidden: int = 64):
        super().__init__()
        check_at_least("uem.ahead.", hidden=hidden)
        self.grid, self.width = tokens[0].n, (width := tokens[0].width)
        self.norm = nn.LayerNorm(width)
        self.hidden, self.time_map = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.exits = nn.Linear(hidden, len(points))
        nn.init.normal_(self.exits.weight, std=0.02)
        nn.init.zeros_(self.exits.bias)

    def forward(self, patches: Tensor, time: Tensor) -> Tensor:
        """patches (b, N, D) after 0 layers, time (b,) -> (b, E)."""
        with torch.autocast(patches.device.type, enabled=False):
            h = self.hidden(self.norm(patches.detach().float()))  # (b, N, hidden)
            h = F.silu(h + self.time_map(time_embedding(time, self.width))[:, None])
            return self.exits(h.mean(dim=1)).sigmoid()

    def macs(self, k: int) -> int:
        return self.grid * self.hidden.weight.numel() + self.time_map.weight.numel() + self.exits.weight.numel()


class NoEstimator(Estimator):
    """Stands where weights brought no estimator: asking it is an error."""

    def forward(self, *args) -> Tensor:
        raise ValueError("these weights have no uncertainty estimator: use exit.name=full, fixed or schedule")

    def macs(self, k: int) -> int:
        return 0


ESTIMATORS = {
    "linear": Linear,
    "time": Time,
    "time_bank": TimeBank,
    "attention": AttentionPool,
    "ahead": Ahead,
    "probe": Probe,
    "attention_probe": AttentionProbe,
    "shared": Shared,
}
