"""Real images that come with the package, and points in the plane."""

from importlib import resources

import numpy as np
import torch
from torch import Tensor

SPIRAL_MEAN = torch.tensor([-0.4244, 1.9099])
SPIRAL_STD = torch.tensor([4.7820, 4.2307])
TRAIN = 1347  # of the 1,797 digits; the file stores them in a fixed shuffled order


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits of 43 people: images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,) in 0..9.

    ``split`` is 'train' (1,347 images), 'test' (450) or 'all'. Grey levels are whole numbers 0..16 in the source, so
    neighbouring levels lie 1/8 apart.

    Source: Alpaydin and Kaynak (1998), the test part of the UCI set, as in scikit-learn; the file is made by
    ``scripts.digits_data``.
    """
    parts = {"train": slice(None, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}
    if split not in parts:
        raise ValueError(f"split must be 'train', 'test' or 'all'; got {split!r}.")
    with (resources.files(__package__) / "datasets" / "digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        images, labels = stored["images"][parts[split]], stored["labels"][parts[split]]
    return torch.from_numpy(images).float()[:, None] / 8 - 1, torch.from_numpy(labels).long()


def spiral(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points (n, 2) on a spiral of one and a half turns, with zero mean and unit variances (for n to infinity)."""
    angle = 3 * torch.pi * torch.rand(n, generator=generator).sqrt()
    points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    points = points + 0.3 * torch.randn(n, 2, generator=generator)
    return (points - SPIRAL_MEAN) / SPIRAL_STD
