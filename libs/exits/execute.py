"""Run a network so that every row leaves where its policy says: the only place that removes rows from a batch."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from libs.exits.policy import ExitPolicy, Look
from libs.models import EarlyExitModel
from libs.models.backbone import Carry


def run_with_exits(
    model: EarlyExitModel,
    policy: ExitPolicy,
    x: Tensor,
    t: Tensor,
    time: Tensor,
    cond: Tensor | None,
    watch: Callable[[int, Carry], None] | None = None,
) -> tuple[Tensor, np.ndarray]:
    """One network call in which rows leave on their own.

    x (B, C, H, W); t (B,) in [0, 1] on the CPU, for the policy; time (B,) on x's device, for the network. Returns the
    raw network outputs (B, C, H, W) in the caller's row order and the layers used (B,). A row that left costs nothing;
    every row passes one head, and where one head serves all exits, the rows wait to pass it together: a head on a few
    rows costs as much time as on many. Where the policy decides for the whole batch, the host never waits for the
    device. `watch(k, carry)` is shown the rows that have run k layers, before any of them leaves.

    >>> from libs.exits.threshold import Threshold
    >>> from libs.models import ESTIMATORS, UViT
    >>> network = UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=6, num_heads=4)
    >>> model = EarlyExitModel(network, ESTIMATORS["linear"])
    >>> x, t, time = torch.randn(5, 1, 8, 8), torch.full((5,), 0.5).double(), torch.full((5,), 500.0)
    >>> out, used = run_with_exits(model, Threshold(certainty=0.01), x, t, time, cond=None)
    >>> out.shape, used  # an untrained estimator says u = 1/2: everything above 0.5 runs full depth
    (torch.Size([5, 1, 8, 8]), array([1, 1, 1, 1, 1]))
    >>> run_with_exits(model, Threshold(certainty=0.99), x, t, time, cond=None)[1]
    array([7, 7, 7, 7, 7])
    """
    depth = model.depth
    asked, questions = frozenset(policy.asked(model.points)), policy.questions(model.points)
    decide = policy.start(len(x), depth, t)
    used = np.full(len(x), depth)
    left: list[tuple[np.ndarray, int, Carry]] = []  # rows that are done, their exit and their tokens
    alive = np.arange(len(x))  # carry.rows, on the host

    if model.gaussian is not None and 0 in asked and not policy.reads and watch is None:
        if decide(Look(k=0, rows=torch.arange(len(x)))) is True:  # the network is not called at all
            return model.gaussian(x, time, cond, t), np.zeros(len(x), int)

    carry = model.embed(x, time, cond)
    ahead = model.predict_ahead(carry) if questions else None  # (B, E)
    if ahead is not None:
        ahead = ahead.cpu()  # the call's one wait: all decisions are then made on the host
    for k in range(depth + 1):
        if k:
            carry = model.layer(k - 1, carry)  # (b, L, D)
        if watch is not None:
            watch(k, carry)
        if k not in asked:
            continue
        if ahead is not None or not policy.reads:  # nothing to see lies on the device
            rows = torch.from_numpy(alive)
            look = Look(k=k, rows=rows, u=None if ahead is None else ahead[rows, model.points.index(k)])
        else:
            u = model.uncertainty(k, carry) if k in questions else None
            patches = model.backbone.patches(carry) if "patches" in policy.reads else None
            look = Look(k=k, rows=carry.rows, u=u, patches=patches)
        stop = decide(look)
        if isinstance(stop, bool):
            stop = np.full(len(alive), stop)
        else:
            stop = stop.cpu().numpy()  # the one wait for the device at this exit
        if not stop.any():
            continue
        used[alive[stop]] = k
        if stop.all():
            left.append((alive, k, carry))
            break
        leave, stay = (torch.from_numpy(np.flatnonzero(mask)).to(x.device, non_blocking=True) for mask in (stop, ~stop))
        done = carry.keep(leave)
        left.append((alive[stop], k, done if model.backbone.decodes else replace(done, skips=())))
        carry, alive = carry.keep(stay), alive[~stop]
    else:
        left.append((alive, depth, carry))

    if len(left) == 1:
        return model.head(k, carry), used
    order = np.argsort(np.concatenate([rows for rows, _, _ in left]))
    if model.one_head:
        out = model.head(depth, replace(carry, h=torch.cat([carry.h for _, _, carry in left]), skips=()))
    else:
        out = torch.cat([model.head(k, carry) for _, k, carry in left])
    return out[torch.from_numpy(order).to(x.device, non_blocking=True)], used


def run_outer(model: EarlyExitModel, n: int, deep: Tensor, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
    """The first and last `n` layers of a U-shaped network: raw outputs (B, C, H, W).

    `deep` (B, L, D) are tokens that the layers in between gave at an earlier call; the skips are this call's own.
    """
    carry = model.embed(x, time, cond)
    for i in range(n):
        carry = model.layer(i, carry)
    carry = replace(carry, h=deep)
    for i in range(model.depth - n, model.depth):
        carry = model.layer(i, carry)
    return model.head(model.depth, carry)


def run_or_reuse(
    model: EarlyExitModel,
    first: int,
    unchanged: Callable[[Tensor, Tensor], Tensor],
    rest: Tensor | None,
    x: Tensor,
    time: Tensor,
    cond: Tensor | None,
) -> tuple[Tensor, np.ndarray, Tensor]:
    """One network call in which rows may skip all layers but the `first` ones.

    `unchanged(before, after)` is shown the tokens (B, L, D) around the first layers and names the rows (B,) that skip:
    their tokens get `rest` (B, L, D), what the other layers added when they last ran for the row. Returns the raw
    network outputs (B, C, H, W), the layers used (B,), and `rest` for the next call.
    """
    carry = model.embed(x, time, cond)
    before = carry.h
    for i in range(first):
        carry = model.layer(i, carry)
    h, skips = carry.h, unchanged(before, carry.h).cpu().numpy()  # the call's one wait for the device
    used = np.where(skips, first, model.depth)
    if skips.all():
        h = h + rest
    else:
        deep = carry
        if skips.any():
            rows = torch.from_numpy(np.flatnonzero(~skips)).to(x.device, non_blocking=True)
            deep = carry.keep(rows)
        start = deep.h
        for i in range(first, model.depth):
            deep = model.layer(i, deep)
        if skips.any():
            h = (h + rest).index_copy(0, rows, deep.h.to(h.dtype))
            rest = rest.index_copy(0, rows, deep.h - start)
        else:
            h, rest = deep.h, deep.h - start
    return model.head(model.depth, replace(carry, h=h, skips=())), used, rest


def run_with_sublayers(
    model: EarlyExitModel,
    skips: Callable[[int, int, Tensor], bool | Tensor] | None,
    last: dict[tuple[int, int], Tensor],
    x: Tensor,
    time: Tensor,
    cond: Tensor | None,
) -> tuple[Tensor, np.ndarray]:
    """One network call in which rows may skip attentions and MLPs, and take what these gave last.

    `skips(i, j, h)` is shown the input h (B, L, D) of layer i's sublayer j (0 attention, 1 MLP) and says whether it is
    skipped, by all rows or by which (B,); None: nothing is. `last[i, j]` (B, L, D) is what it gave last, and is kept up
    to date. Returns the raw network outputs (B, C, H, W) and what ran (B, K, 2), bool.
    """
    ran = np.ones((len(x), model.depth, 2), bool)
    carry = model.embed(x, time, cond)
    for i in range(model.depth):

        def residual(j: int, f: Callable[[Tensor], Tensor], h: Tensor, i: int = i) -> Tensor:
            skip = False if skips is None else skips(i, j, h)
            if not isinstance(skip, bool):
                ran[:, i, j] = ~skip.cpu().numpy()  # the one wait for the device at this sublayer
                skip = not ran[:, i, j].any()
                if not skip and not ran[:, i, j].all():
                    rows = torch.from_numpy(np.flatnonzero(ran[:, i, j])).to(h.device, non_blocking=True)
                    last[i, j] = last[i, j].index_copy(0, rows, f(h[rows]))
                    return last[i, j]
            ran[:, i, j] = not skip
            if not skip:
                last[i, j] = f(h)
            return last[i, j]

        carry = model.backbone.layer(i, carry, residual)
    return model.head(model.depth, carry), ran


def oracle(eps: Tensor, points: tuple[int, ...], tau: float) -> Tensor:
    """The layers (B,) of the least exit k with mean |eps_k - eps_K| <= tau, from every exit's eps (E, B, C, H, W).

    It looks at the full depth's answer, so it is no policy: what it saves is hypothetical, and only a bound for rules
    that look at one call at a time.

    >>> eps = torch.tensor([[0.5, 0.9], [0.8, 1.0], [1.0, 1.0]]).view(3, 2, 1, 1, 1)  # 3 exits of 2 images
    >>> oracle(eps, points=(2, 4, 7), tau=0.15)
    tensor([7, 2])
    """
    gap = (eps - eps[-1]).abs().flatten(2).mean(2)  # (E, B)
    return torch.tensor(points)[(gap <= tau).to(torch.uint8).argmax(0).cpu()]
