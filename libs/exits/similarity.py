"""Leave when another layer no longer changes the tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from libs.exits.policy import ExitPolicy, one_size


@dataclass(frozen=True, kw_only=True)
class Similarity(ExitPolicy):
    """Hidden-state saturation (CALM, Schuster et al. 2022): the baseline of the DeeDiff rebuttal.

    Each image leaves at the first exit where cos(h_k, h_before), averaged over its patch tokens, reaches `cosine`;
    h_before are the tokens at the exit asked before, so the first exit asked is never taken. Needs no estimator; the
    products of the cosine are counted as little as a norm's.

    >>> from libs.exits.policy import Look
    >>> decide = Similarity(cosine=0.95).start(n_rows=2, depth=7, t=torch.ones(2))
    >>> patches = torch.ones(2, 16, 32)
    >>> decide(Look(k=1, rows=torch.arange(2), patches=patches))  # nothing to compare with
    False
    >>> changed = torch.stack([patches[0], -patches[1]])
    >>> decide(Look(k=2, rows=torch.arange(2), patches=changed))
    tensor([ True, False])
    """

    cosine: float = 0.95
    reads: ClassVar = frozenset({"patches"})
    timeless: ClassVar = True

    def __post_init__(self):
        if not -1 < self.cosine <= 1:
            raise ValueError(f"exit.similarity.cosine is {self.cosine}; it must lie in (-1, 1]")

    def check(self, model):
        super().check(model)
        one_size("similarity", model)

    def start(self, n_rows, depth, t):
        before = None

        def decide(look):
            nonlocal before
            last, before = before, (look.rows, look.patches)
            if last is None:
                return False
            rows, patches = last
            if len(rows) != len(look.rows):
                patches = patches[torch.searchsorted(rows, look.rows)]
            return F.cosine_similarity(look.patches.float(), patches.float(), dim=-1).mean(1) >= self.cosine

        return decide
