"""Exit 0: what can be said about an image before the first layer runs.

For data of a Gaussian per class, x0 ~ N(mu, S) with S = U diag(s^2) U^T + rest (I - U U^T), the best prediction from
x_t = alpha x0 + sigma eps has a closed form. With d = x_t - alpha mu and w(v) = alpha v / (alpha^2 v + sigma^2),

    E[x0 | x_t] = mu + w(rest) d + U (w(s^2) - w(rest)) U^T d

At high noise, trained networks say little else (Wang & Vastola 2024, arXiv 2412.09726, who skip the first steps of a
sampling with it). As an exit it is one more depth, 0, for every call and every image; policies choose it like others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sde import Process

MOST_NUMBERS = 10_000  # numbers of an image: their covariance is decomposed
PER_CLASS = 10**8  # numbers in the covariances of all classes; where they are more, the classes share one


class Gaussian(nn.Module):
    """The closed form above as raw network outputs of kind `pred`. Nothing in it is trained; `fit` sets it.

    `rank` directions of the largest variance are kept per class (setting nnet.gaussian); the others share their mean
    variance `rest`. The class that follows those of the data is guidance's null class: the Gaussian of all images.
    Where the covariances of all classes would be too many numbers, the classes share what varies within them.

    >>> from sde import VPLinear
    >>> gaussian, process = Gaussian((1, 4, 4), 2, 16, VPLinear(), "x0"), VPLinear()
    >>> means = torch.stack([torch.zeros(16), torch.ones(16)])
    >>> gaussian.fit(torch.tensor([50, 50]), means, 0.01 * torch.eye(16).expand(2, 16, 16))
    >>> x, time = torch.randn(3, 1, 4, 4), process.network_time(torch.full((3,), 0.9))
    >>> x0 = gaussian(x, time, torch.tensor([0, 1, 1]))
    >>> x0.shape, [round(float(image.mean()), 1) for image in x0]  # nothing but noise in x: the means
    (torch.Size([3, 1, 4, 4]), [0.0, 1.0, 1.0])
    """

    def __init__(self, shape: Sequence[int], n_labels: int, rank: int, process: Process, pred: str):
        super().__init__()
        numbers = torch.Size(shape).numel()
        if numbers > MOST_NUMBERS:
            raise ValueError(
                f"nnet.gaussian is {rank}; it must be 0 (none) for images of {numbers} > {MOST_NUMBERS} numbers"
            )
        if not 0 < rank <= numbers:
            raise ValueError(f"nnet.gaussian is {rank}; it must be 0 (none) or a number of directions up to {numbers}")
        process.check_prediction(pred)
        self.process, self.pred = process, pred
        self.shared = n_labels * numbers**2 > PER_CLASS
        bases = 2 if self.shared else n_labels  # shared: within the classes, and of everything
        self.register_buffer("mean", torch.zeros(n_labels, numbers))
        self.register_buffer("basis", torch.zeros(bases, numbers, rank))
        self.register_buffer("variance", torch.zeros(bases, rank))
        self.register_buffer("rest", torch.zeros(bases))
        self.register_buffer("basis_of", torch.zeros(n_labels, dtype=torch.long))

    @property
    def macs(self) -> int:
        """Per image: into the basis and back; of two bases into both."""
        return 2 * self.basis[0].numel() * (2 if len(self.basis) == 2 else 1)

    def fit(self, counts: Tensor, means: Tensor, covariances: Tensor) -> None:
        """Take the data's moments.

        Args:
            counts: (G,) images of each class.
            means: (G, D), float64.
            covariances: (G, D, D), or (1, D, D) within all classes together where they are `shared`.
        """
        share = (counts / counts.sum())[:, None].to(means)
        everything = (share * means).sum(0, keepdim=True)
        between = ((means - everything).T * share[:, 0]) @ (means - everything)
        within = covariances if self.shared else (share[..., None] * covariances).sum(0, keepdim=True)
        null = len(self.mean) > len(means)
        bases = list(covariances[:1] if self.shared else covariances)
        if null or self.shared:
            bases.append(within[0] + between)
        for i, covariance in enumerate(bases):
            values, vectors = torch.linalg.eigh(covariance.double())  # ascending
            rank, rest = self.variance.shape[1], values[: len(values) - self.variance.shape[1]]
            self.variance[i], self.basis[i] = values[-rank:].clamp_min(0), vectors[:, -rank:]
            self.rest[i] = rest.mean().clamp_min(0) if len(rest) else 0.0
        self.mean.copy_(torch.cat([means, everything]) if null else means)
        own = torch.zeros(len(means)) if self.shared else torch.arange(len(means))
        self.basis_of.copy_(torch.cat([own, torch.tensor([len(bases) - 1.0])]) if null else own)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None, t: Tensor | None = None) -> Tensor:
        """Raw outputs (B, C, H, W).

        x (B, C, H, W), time (B,) in the network's unit, cond: labels (B,), or anything else, which is not read.
        `t` (B,) on the CPU, where it is known, saves the device the time's own numbers.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if t is None:
                t = self.process.of_network_time(time)
            elif bool((t == t[0]).all()):
                t = t[:1]
            at = self.process.at(t, x)
            alpha, sigma = at.alpha.flatten(1), at.sigma.flatten(1)  # (B, 1), or (1, 1)
            mean, basis, variance, rest = self.mean, self.basis, self.variance, self.rest
            if len(mean) > 1:
                which = self.basis_of[cond]  # (B,)
                mean, variance, rest = mean[cond], variance[which], rest[which]
            d = x.flatten(1) - alpha * mean  # (B, D)
            w, w_rest = (alpha * v / (alpha**2 * v + sigma**2) for v in (variance, rest[:, None]))  # (B, r), (B, 1)
            if len(basis) <= 2:  # large ones, which no row copies
                parts = [(w - w_rest) * (d @ one) @ one.T for one in basis]  # (B, D) each
                signal = parts[0] if len(parts) == 1 else torch.where(which[:, None] == 0, *parts)
            else:
                signal = (by_class if x.device.type == "cpu" else gathered)(d, w - w_rest, basis, which)
            x0 = (mean + w_rest * d + signal).view_as(x)
            return at.target(self.pred, x0, at.eps("x0", x0, x))


def by_class(d: Tensor, w: Tensor, basis: Tensor, which: Tensor) -> Tensor:
    """(B, D): every row of d (B, D) into its basis (of G, D, r), times w (B, r), and back; a product per basis."""
    out = torch.empty_like(d)
    for i in which.unique().tolist():
        rows = which == i
        out[rows] = (w[rows] * (d[rows] @ basis[i])) @ basis[i].T
    return out


def gathered(d: Tensor, w: Tensor, basis: Tensor, which: Tensor) -> Tensor:
    """The same without waiting for the device; it copies a basis per row, which is five times as slow on a CPU."""
    own = basis[which]  # (B, D, r)
    return (own @ (w * (d[:, None] @ own)[:, 0])[..., None])[..., 0]
