"""What is seen of an image: linear maps A that keep, average, grey or blur it, with what undoes them best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import _positive_int


class Degradation(Protocol):
    """A linear map A of images; each tensor's first dimension counts images."""

    def forward(self, x: Tensor) -> Tensor:
        """``A x``: what is seen of x."""

    def transpose(self, y: Tensor) -> Tensor:
        """``A^T y``, of the shape of images."""

    def pseudo_inverse(self, y: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
        """``A^T (A A^T + ridge)^-1 y``; for ridge 0 the pseudo-inverse ``A^+ y``, for which A A^+ A = A.

        The ridge is one number, or a tensor of shape () or (B, 1, ..., 1).
        """


class _EqualRows:
    """Degradations with A A^T = gain * identity on all y that can occur."""

    gain = 1.0

    def pseudo_inverse(self, y: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
        return self.transpose(y) / (self.gain + ridge)


class Mask(_EqualRows):
    """Keeps the numbers where ``keep`` is True and sets all others to 0; y has the shape of x.

    ``keep`` broadcasts to x: (H, W) for one mask of all images, (B, 1, H, W) for one of each, (d,) for points.
    """

    def __init__(self, keep: Tensor):
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must hold True and False (torch.bool); got {keep.dtype}.")
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        keep = self.keep.to(x.device)
        if keep.ndim > x.ndim or any(k not in (1, n) for k, n in zip(keep.shape[::-1], x.shape[::-1])):
            raise ValueError(f"a mask of shape {tuple(keep.shape)} does not fit images of shape {tuple(x.shape)}.")
        return keep * x

    transpose = forward


class Downsample(_EqualRows):
    """Averages each square of factor by factor pixels: images (B, C, H, W) to (B, C, H / factor, W / factor)."""

    def __init__(self, factor: int):
        self.factor = _positive_int("factor", factor)
        self.gain = 1 / self.factor**2

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"images must have shape (B, C, H, W) with sides that are multiples of {self.factor}; "
                f"got {tuple(x.shape)}."
            )
        return F.avg_pool2d(x, self.factor)

    def transpose(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3) * self.gain


class Grey(_EqualRows):
    """The weighted sum of the colours: images (B, C, H, W) to (B, 1, H, W), with one weight per channel.

    The default is the luma of red, green and blue in Recommendation ITU-R BT.601.
    """

    def __init__(self, weights: Sequence[float] = (0.299, 0.587, 0.114)):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.weights.ndim != 1 or not self.weights.square().sum() > 0:
            raise ValueError(f"weights must be one number per channel, not all 0; got {weights}.")
        self.gain = float(self.weights.square().sum())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != len(self.weights):
            raise ValueError(f"images must have shape (B, {len(self.weights)}, H, W); got {tuple(x.shape)}.")
        return (self.weights.to(x)[:, None, None] * x).sum(1, keepdim=True)

    def transpose(self, y: Tensor) -> Tensor:
        return self.weights.to(y)[:, None, None] * y


class Blur:
    """Gaussian blur of images (B, C, H, W) with deviation ``sigma`` in pixels; light that reaches an edge is reflected.

    It is the heat equation in a box with insulating walls, run for the time sigma^2 / 2: the cosine of wave number k
    on n pixels is multiplied by ``exp(-(sigma pi k / n)^2 / 2)``, and A = A^T. Waves damped below ``SMALLEST`` count as
    lost, in A and in A^+.
    """

    SMALLEST = 1e-6

    def __init__(self, sigma: float):
        if not 0 < sigma < math.inf:
            raise ValueError(f"the blur needs a deviation above 0, in pixels; got {sigma}.")
        self.sigma = float(sigma)

    def _filter(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"images must have shape (B, C, H, W); got {tuple(x.shape)}.")
        rows, columns = _cosines(x.shape[2]).to(x.device), _cosines(x.shape[3]).to(x.device)
        damping = (self._damping(len(rows))[:, None] * self._damping(len(columns))).to(x.device)
        factor = torch.where(damping < self.SMALLEST, 0, change(damping))
        return (rows.T @ (factor * (rows @ x.double() @ columns.T)) @ columns).to(x.dtype)

    def _damping(self, n: int) -> Tensor:
        k = torch.arange(n, dtype=torch.float64)
        return torch.exp(-((self.sigma * math.pi * k / n) ** 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self._filter(x, lambda damping: damping)

    transpose = forward

    def pseudo_inverse(self, y: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
        return self._filter(y, lambda damping: damping / (damping**2 + ridge))


@lru_cache
def _cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of n numbers, (n, n): row k has wave number k."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    table = math.sqrt(2 / n) * torch.cos(math.pi * k * (i + 0.5) / n)
    table[0] /= math.sqrt(2)
    return table


def coarse(images: Tensor) -> Tensor:
    """Squares of 4 x 4 pixels averaged, and enlarged again to the size of the images by bicubic interpolation."""
    return enlarge(Downsample(4).forward(images), 4)


def blurred(images: Tensor) -> Tensor:
    """The images after a Gaussian blur of 2 pixels."""
    return Blur(2.0).forward(images)


def grey(images: Tensor) -> Tensor:
    """The luma of images (B, 3, H, W), (B, 1, H, W)."""
    return Grey().forward(images)


GIVEN = {"coarse": coarse, "blurred": blurred, "grey": grey}  # what a network may be shown of an image


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Bicubic interpolation of images (B, C, H, W) to (B, C, factor H, factor W), a coarse pixel where it averages."""
    return F.interpolate(images, scale_factor=float(factor), mode="bicubic", align_corners=False)
