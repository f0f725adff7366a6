"""Train the small classifier whose features measure digits (`libs/metrics/digits_cnn.safetensors`).

    python -m scripts.digits_classifier                      # one CPU core, about 10 seconds
    python -m scripts.digits_classifier --output=x.safetensors

The data are scikit-learn's 1797 digits (UCI Optical Recognition of Handwritten Digits; E. Alpaydin, C. Kaynak). A fifth
of each class is held out; the accuracy printed is on those. The same library versions and processor give the same
file. Replacing the shipped file changes every number measured with `digits_cnn`: references made before are refused.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

import scripts
from libs.data.digits import Digits
from libs.files import sha256, write_file
from libs.metrics.extractors import DIGITS_WEIGHTS, DigitsClassifier


def digits() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images (n, 1, 8, 8) uint8, labels (n,), and a mask (n,) of the held-out fifth of every class."""
    data = Digits()
    images = data.stack(range(len(data)))
    held_out = np.zeros(len(images), dtype=bool)
    for label in range(10):
        members = np.random.default_rng(label).permutation(np.flatnonzero(data.labels.numpy() == label))
        held_out[members[: len(members) // 5]] = True
    return images, data.labels, held_out


def train(x: torch.Tensor, y: torch.Tensor, *, epochs: int, seed: int = 0) -> DigitsClassifier:
    """Adam with a one-cycle rate; x (n, 1, 8, 8) in [0, 1], y (n,). Shifts by up to one pixel augment the data."""
    torch.manual_seed(seed)
    net, batch = DigitsClassifier(), 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(x) // batch * epochs
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            dy, dx = torch.randint(3, (2,)).tolist()
            shifted = F.pad(x[rows], (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]  # (batch, 1, 8, 8)
            loss = F.cross_entropy(net(shifted), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return net


def main() -> None:
    parser = scripts.parser("digits_classifier", __doc__)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS, help="safetensors file (default: the shipped)")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the training images (default: 60)")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; it is {args.epochs}.")

    torch.set_num_threads(1)  # the order of sums, and with it the file, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    images, labels, held_out = digits()
    x = images / 255.0  # (n, 1, 8, 8)
    net = train(x[~held_out], labels[~held_out], epochs=args.epochs).eval()
    with torch.inference_mode():
        right = (net(x).argmax(1) == labels).numpy()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.output, save({name: value.contiguous() for name, value in net.state_dict().items()}))
    result = {
        "output": str(args.output),
        "test_accuracy": round(float(right[held_out].mean()), 4),
        "train_accuracy": round(float(right[~held_out].mean()), 4),
        "n_test": int(held_out.sum()),
        "bytes": args.output.stat().st_size,
        "sha256": sha256(args.output),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
