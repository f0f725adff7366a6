"""The 1,797 handwritten digits that come with scikit-learn (E. Alpaydin and C. Kaynak, UCI): 8 x 8, no download."""

import torch

from libs.data.dataset import InMemory


class Digits(InMemory):
    """8 x 8 grey digits with 17 levels: x / 8 - 1 in [-1, 1], ten classes. A mirrored digit is none: no random_flip.

    >>> data = Digits()
    >>> len(data), data.shape, data.class_names[int(data.labels[4])]
    (1797, (1, 8, 8), '4')
    """

    name, class_names = "digits", tuple("0123456789")

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("dataset.name='digits' needs scikit-learn: pip install scikit-learn.") from error
        data = load_digits()
        levels = torch.from_numpy(data.images).to(torch.uint8)[:, None]  # (1797, 1, 8, 8), levels 0..16
        super().__init__(levels, torch.from_numpy(data.target).long(), n_classes=10, white=16)
