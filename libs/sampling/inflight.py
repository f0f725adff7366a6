"""In-flight batching: images at different steps and depths share network calls, so that layers see full batches.

In lockstep the images of a batch wait for one another at every network call, and the layers that few of them reach run
thin batches. Here every row goes its own way: rows queue in front of their next layer or head until enough of them are
there, and meanwhile the others go on, those that left early with their next steps. The images stay the same.

The price is memory: several batches are on their way at once, each row with the long skips that it may still need.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from libs import rng
from libs.exits import ExitPolicy, Look, Trace
from libs.exits.threshold import Calibrated, Threshold
from libs.models import EarlyExitModel
from libs.models.backbone import Carry
from libs.sampling.denoiser import Guidance
from libs.sampling.images import Images, labels_of
from libs.sampling.plans import State, advance

IN_FLIGHT = 4  # on their way at once: with fewer, rows find no company; more cost memory
START = -1  # the queue of rows whose next network call has not begun; queue k >= 0: rows that have run k layers


def suits(model: EarlyExitModel, policy: ExitPolicy, guidance: Guidance) -> bool:
    """Whether rows that decide by `policy` can go their own ways, and gain by it.

    Where the depth is known beforehand, rows leave together and lockstep runs full batches. Policies with a memory,
    those that decide for a batch, and guidance pairs that leave together need both rows of a call. A U-Net's heads
    would need every row's features kept at all sizes.
    """
    together = guidance.scale > 0 and guidance.pair != "free"
    return isinstance(policy, Threshold | Calibrated) and not together and not model.backbone.decodes


@dataclass(frozen=True, kw_only=True)
class Pooled(Carry):
    """A carry whose `rows` are slots of a pool, in any order. Skips lie in the pool, so rows join and part freely.

    `skips` holds the levels of the pool that are in use, as ints; `host` is `rows` on the CPU, where queues are kept
    without asking the device.
    """

    host: Tensor
    slots: int = 0
    pool: list[Tensor] = field(default_factory=list)  # level -> (slots, L, D)

    def keep(self, index: Tensor | slice) -> Pooled:
        """The carry of the rows at positions `index`, which are on the CPU."""
        there = index if isinstance(index, slice) else index.to(self.h.device, non_blocking=True)
        return replace(super().keep(there), host=self.host[index])

    __getitem__ = keep

    def __len__(self) -> int:
        return len(self.rows)

    def push(self) -> Pooled:
        level = len(self.skips)
        if level == len(self.pool):
            self.pool.append(self.h.new_empty(self.slots, *self.h.shape[1:]))
        self.pool[level].index_copy_(0, self.rows, self.h)
        return replace(self, skips=(*self.skips, level))

    def pop(self) -> tuple[Tensor, Pooled]:
        return self.pool[self.skips[-1]][self.rows], replace(self, skips=self.skips[:-1])


class InFlight:
    """The images `ids` (n,) on their way: at most IN_FLIGHT x `batch_size` at once, `batch_size` in a network call.

    An image has a place from its first step to its last, then another image gets the place. Under guidance it has two
    rows there: row `place` is conditional and row `places + place` is not.
    """

    def __init__(self, sampler, *, plan, policy, seed, ids, batch_size):
        model, regime, run, guidance = sampler.model, sampler.regime, sampler.run, sampler.guidance
        policy = policy.on(model)
        self.model, self.regime, self.plan, self.policy, self.guidance = model, regime, plan, policy, guidance
        self.seed, self.ids, self.run, self.precision = seed, ids, run, sampler.precision
        cond = regime.conditions.for_ids(seed, ids[:1])
        self.denoiser = sampler.denoiser(cond, policy)
        self.asked = frozenset(policy.asked(model.points))
        self.branches = 2 if self.denoiser.guided else 1
        self.batch_rows = self.branches * batch_size
        self.places = places = min(IN_FLIGHT * batch_size, len(ids))
        slots = self.branches * places

        # `keep` copies: x and anchor, and the outputs of different calls, are written apart from one another
        self.state = State.start(torch.zeros(places, *regime.shape, device=run.device), plan).keep(torch.arange(places))
        self.noise = rng.SeededNoise(seed, range(places), regime.shape)
        self.position = np.zeros(places, int)  # in `ids`, of the image at each place
        self.t = torch.zeros(slots, dtype=torch.float64)  # of each row's call
        self.cond = None if cond is None else cond.new_zeros(slots, *cond.shape[1:], device=run.device)
        self.pool: list[Tensor] = []
        self.ahead_u = torch.zeros(slots, len(model.points))  # on the CPU: decisions are made there
        self.left = torch.zeros(slots, dtype=torch.long)  # the layers of each row's last call
        self.eps = torch.zeros(slots if self.branches == 2 else 0, *regime.shape, device=run.device)  # of pairs
        self.missing = np.full(places, self.branches)  # rows that this step still waits for

        self.used = np.zeros((plan.rows, self.branches, len(ids)), np.uint8)
        self.finished: dict[int, Tensor] = {}  # position -> (C, H, W)
        self.queues: dict[int, deque[Pooled | Tensor]] = defaultdict(deque)
        self.waiting: dict[int, int] = defaultdict(int)  # rows in each queue
        self.loaded = 0
        self.begin(self.load(torch.arange(places)))

    @torch.inference_mode()
    def images(self, start: int, stop: int) -> Images:
        """The images ids[start:stop], once they are finished."""
        wanted, ids = range(start, stop), self.ids[start:stop]
        with self.precision():
            while not all(i in self.finished for i in wanted):
                self.go_on()
            x = torch.stack([self.finished.pop(i) for i in wanted])
            pixels = self.regime.codec.to(self.run.device).decode(x).cpu()
        labels = labels_of(self.regime.conditions.for_ids(self.seed, ids))
        t, computed = self.plan.t.tolist(), self.plan.computed.tolist()
        calls = [(t[row], self.used[row, :, start:stop]) for row in np.flatnonzero(computed)]
        trace = Trace(self.model.depth, self.denoiser.trace.asked, calls).with_forecasts(t, computed)
        return Images(pixels, ids, labels, trace)

    def go_on(self) -> None:
        """Serve the fullest queue, the deepest of those that are equally full."""
        queue = max(self.waiting, key=lambda k: (min(self.waiting[k], self.batch_rows), k))
        if queue == START:
            self.start_call(torch.cat(self.take(START)))
            return
        parts = self.take(queue)
        carry = parts[0]
        if len(parts) > 1:
            names = ("h", "time", "rows", "host")
            carry = replace(carry, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
        depth = self.model.depth
        if queue >= depth:
            self.leave(queue - depth, carry)
            return
        k = queue
        while k == queue or (k < depth and k not in self.asked):
            carry = self.model.layer(k, carry)
            k += 1
        self.ask(k, carry)

    # ---- queues ------------------------------------------------------------------------------------------------------

    def put(self, queue: int, part: Pooled | Tensor) -> None:
        self.queues[queue].append(part)
        self.waiting[queue] += len(part)

    def take(self, queue: int) -> list[Pooled] | list[Tensor]:
        """The first rows of a queue, as many as a network call takes."""
        parts, room, waiting = [], self.batch_rows, self.queues[queue]
        while waiting and room:
            part = waiting.popleft()
            if len(part) > room:
                waiting.appendleft(part[room:])
                part = part[:room]
            parts.append(part)
            room -= len(part)
        self.waiting[queue] -= self.batch_rows - room
        return parts

    # ---- the stages of a step ----------------------------------------------------------------------------------------

    def load(self, free: Tensor) -> Tensor:
        """Put the next images at places that are `free` (m,); the places that got one."""
        positions = np.arange(self.loaded, min(self.loaded + len(free), len(self.ids)))
        free, ids = free[: len(positions)], self.ids[positions]
        if not len(positions):
            return free
        self.loaded += len(positions)
        self.position[free.numpy()] = positions
        noise = rng.SeededNoise(self.seed, ids, self.regime.shape)
        self.write(free, State.start(self.run.put(noise.draw()), self.plan))
        for place, generator in zip(free.tolist(), noise.generators, strict=True):
            self.noise.generators[place] = generator
        cond = self.regime.conditions.for_ids(self.seed, ids)
        if cond is not None:
            if self.branches == 2:
                cond = torch.cat([cond, self.regime.conditions.null(len(ids))])
            self.cond[self.run.put(self.rows_at(free))] = self.run.put(cond)
        return free

    def begin(self, places: Tensor) -> None:
        if len(places):
            self.put(START, self.rows_at(places))

    def rows_at(self, places: Tensor) -> Tensor:
        return torch.cat([branch * self.places + places for branch in range(self.branches)])

    def start_call(self, rows: Tensor) -> None:
        host, places = rows, rows % self.places
        t = self.t[host] = self.plan.t[self.state.row[places]]
        time = self.run.put(self.regime.process.network_time(t).float())
        rows, places = self.run.put(rows), self.run.put(places)
        carry = self.model.embed(self.state.x[places], time, None if self.cond is None else self.cond[rows])
        slots = self.branches * self.places
        carry = Pooled(h=carry.h, time=carry.time, rows=rows, host=host, slots=slots, pool=self.pool)
        if self.model.uem.ahead:
            self.ahead_u[host] = self.model.predict_ahead(carry).cpu()  # the one wait for the device in this call
        self.ask(0, carry)

    def ask(self, k: int, carry: Pooled) -> None:
        """Rows that have run k layers: let those leave that want to."""
        depth = self.model.depth
        if k == depth:
            self.done(k, carry)
            return
        if k in self.asked:
            if self.model.uem.ahead:
                look = Look(k=k, rows=carry.host, u=self.ahead_u[carry.host, self.model.points.index(k)])
            else:
                look = Look(k=k, rows=carry.rows, u=self.model.uncertainty(k, carry))
            stop = self.policy.start(len(self.t), depth, self.t)(look).cpu()  # without `ahead`, this exit's one wait
            if stop.all():
                self.done(k, carry)
                return
            if stop.any():
                leave, stay = (mask.nonzero().flatten() for mask in (stop, ~stop))
                self.done(k, carry.keep(leave))
                carry = carry.keep(stay)
        self.put(k, carry)

    def done(self, k: int, carry: Pooled) -> None:
        """Rows that leave at k wait for their head: the shared one, or exit k's own."""
        self.left[carry.host] = k
        self.put(self.model.depth + (self.model.depth if self.model.one_head else k), replace(carry, skips=()))

    def leave(self, k: int, carry: Pooled) -> None:
        """Head k, the end of a network call; images with all their rows take their step."""
        rows, left = carry.host, self.left[carry.host]
        places = rows % self.places
        x = self.state.x[self.run.put(places)]
        if k == 0:
            carry = replace(carry, inputs=(x, None if self.cond is None else self.cond[carry.rows]))
        eps = self.denoiser.to_eps(self.model.head(k, carry), x, self.t[rows])
        steps, branch = self.state.row[places].numpy(), (rows // self.places).numpy()
        self.used[steps, branch, self.position[places.numpy()]] = left.numpy()
        if self.branches == 2:
            self.eps[carry.rows] = eps
            np.subtract.at(self.missing, places.numpy(), 1)
            complete = np.flatnonzero(self.missing == 0)
            self.missing[complete] = 2
            places = torch.from_numpy(complete)
            eps = self.guidance.apply(self.eps[self.run.put(self.rows_at(places))])
        if len(places):
            self.step(places, eps)

    def step(self, places: Tensor, eps: Tensor) -> None:
        noise = self.noise.keep(places).draw() if self.plan.stochastic else None
        state = advance(self.plan, self.state.keep(places), eps, noise)
        self.write(places, state)
        done = state.done(self.plan)
        if done.any():
            finished = state.x[self.run.put(done.nonzero().flatten())]
            for position, x in zip(self.position[places[done].numpy()].tolist(), finished, strict=True):
                self.finished[position] = x
            self.begin(self.load(places[done]))
        places, row = places[~done], state.row[~done]
        self.begin(places[self.plan.computed[row]])
        forecast = places[~self.plan.computed[row]]
        if len(forecast):  # their next step needs no network call
            self.step(forecast, torch.zeros_like(self.state.x[: len(forecast)]))

    def write(self, places: Tensor, state: State) -> None:
        index = self.run.put(places)
        mine, new = ((s.x, s.anchor, *s.history, *s.outputs) for s in (self.state, state))
        for pooled, tensor in zip(mine, new, strict=True):
            pooled[index] = tensor
        self.state.row[places] = state.row
