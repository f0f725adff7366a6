"""Train a small classifier whose features measure images, and print its accuracy.

    python -m scripts.classifier digits_cnn                  # one CPU core, about 10 seconds
    python -m scripts.classifier fashion_cnn --output=x.safetensors

`digits_cnn`: scikit-learn's 1797 digits (UCI Optical Recognition of Handwritten Digits; E. Alpaydin, C. Kaynak), a
fifth of each class held out. `fashion_cnn`: Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), trained on its training
images, tested on its test images. The same library versions and processor give the same file. Replacing a shipped file
changes every number measured with it: references made before are refused.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

import scripts
from libs.data.digits import Digits
from libs.data.fashion_mnist import FashionMNIST
from libs.files import sha256, write_file
from libs.metrics.classifier import SHIPPED, Classifier

EPOCHS = {"digits_cnn": 60, "fashion_cnn": 8}


def digits() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images (n, 1, 8, 8) uint8, labels (n,), and a mask (n,) of the held-out fifth of every class."""
    data = Digits()
    images = data.stack(range(len(data)))
    held_out = np.zeros(len(images), dtype=bool)
    for label in range(10):
        members = np.random.default_rng(label).permutation(np.flatnonzero(data.labels.numpy() == label))
        held_out[members[: len(members) // 5]] = True
    return images, data.labels, held_out


def fashion(**where) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """The same of Fashion-MNIST, (n, 1, 32, 32), whose test images are held out."""
    parts = [FashionMNIST(split=split, **where) for split in ("train", "test")]
    images = torch.cat([data.stack(range(len(data))) for data in parts])
    held_out = np.arange(len(images)) >= len(parts[0])
    return images, torch.cat([data.labels for data in parts]), held_out


def train(net: Classifier, x: torch.Tensor, y: torch.Tensor, *, epochs: int) -> Classifier:
    """AdamW with a one-cycle rate; x (n, 1, H, W) uint8, y (n,). Shifts by up to one pixel augment the data."""
    batch, size = 64, x.shape[-1]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(x) // batch * epochs
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            dy, dx = torch.randint(3, (2,)).tolist()
            shifted = F.pad(x[rows] / 255.0, (1, 1, 1, 1))[:, :, dy : dy + size, dx : dx + size]  # (batch, 1, H, W)
            loss = F.cross_entropy(net(shifted), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return net


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("classifier", __doc__)
    parser.add_argument("name", choices=tuple(SHIPPED), help="which one")
    parser.add_argument("--output", type=Path, help="safetensors file (default: the shipped)")
    parser.add_argument("--epochs", type=int, help=f"passes over the training images (default: {EPOCHS})")
    parser.add_argument("--path", help="folder with Fashion-MNIST's files (default: as dataset.path of the experiment)")
    parser.add_argument("--download", action="store_true", help="fetch Fashion-MNIST through torchvision")
    args = parser.parse_args(argv)
    epochs, output = EPOCHS[args.name] if args.epochs is None else args.epochs, args.output or SHIPPED[args.name].file
    if epochs < 1:
        parser.error(f"--epochs must be at least 1; it is {epochs}.")
    if args.name == "digits_cnn" and (args.path or args.download):
        parser.error("--path and --download are for fashion_cnn; the digits come with scikit-learn")

    torch.set_num_threads(1)  # the order of sums, and with it the file, depends on the number of threads
    exact = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        where = {"path": args.path} if args.path else {}
        images, labels, held_out = digits() if args.name == "digits_cnn" else fashion(download=args.download, **where)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    net = train(SHIPPED[args.name].network(), images[~held_out], labels[~held_out], epochs=epochs).eval()
    torch.use_deterministic_algorithms(exact)
    with torch.inference_mode():
        guesses = torch.cat([net(part / 255.0).argmax(1) for part in images.split(1000)])
    right = (guesses == labels).numpy()

    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, save({name: value.contiguous() for name, value in net.state_dict().items()}))
    result = {
        "output": str(output),
        "test_accuracy": round(float(right[held_out].mean()), 4),
        "train_accuracy": round(float(right[~held_out].mean()), 4),
        "n_test": int(held_out.sum()),
        "bytes": output.stat().st_size,
        "sha256": sha256(output),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
