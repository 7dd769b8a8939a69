"""From a damaged image back to images that fit it: ways to sample x given y = A x + sigma n.

Every method wraps a denoiser that was trained without any thought of y, and samplers take the result like any
denoiser; it can itself be wrapped again. `Windows` is of the same kind: it makes images larger than the network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .degradation import Degradation
from .guidance import Weight, weight_at
from .prediction import Prediction
from .sampling import _evaluating, _normal, _start, step, timesteps
from .schedule import _positive_int


class _Wrapper(nn.Module):
    """A denoiser inside a denoiser: it keeps the schedule and hands the condition on."""

    def __init__(self, denoiser: Callable[..., Prediction]):
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def ask(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None) -> Prediction:
        """What the denoiser inside says."""
        return self.denoiser(x_t, t) if condition is None else self.denoiser(x_t, t, condition)


class _Observed(_Wrapper):
    """A denoiser that has seen y."""

    def __init__(self, denoiser: Callable[..., Prediction], degradation: Degradation, y: Tensor):
        super().__init__(denoiser)
        self.degradation, self.y = degradation, y

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y for each of the images x, and A x."""
        like = self.degradation.forward(x)
        if self.y.shape[1:] != like.shape[1:] or len(self.y) not in (1, len(like)):
            raise ValueError(
                f"y must be one observation (1, ...) for all images or one for each, of shape {tuple(like.shape)}; "
                f"got {tuple(self.y.shape)}."
            )
        return self.y.to(like).expand_as(like), like

    def project(self, x: Tensor) -> Tensor:
        """The nearest image to x that agrees with y: ``A^+ y + (x - A^+ A x)``."""
        y, like = self.seen(x)
        return self.degradation.pseudo_inverse(y) + (x - self.degradation.pseudo_inverse(like))


class NullSpace(_Observed):
    """The predicted image is made to agree with y; what y does not determine stays as predicted.

    ``x0 <- A^+ y + (I - A^+ A) x0``: A x0 = y holds at every step and for the sample, of a mask bit for bit (a
    sampler's clipping can spoil it for other degradations). What is filled in hears of y only through x_t. Without
    noise in y.

    Source: Wang, Yu, Zhang (2023), section 3 (DDNM).
    """

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        x0 = self.project(self.ask(x_t, t, condition).x0)
        return Prediction.of("x0", x0, x_t, t, self.schedule)


class Replacement(NullSpace):
    """The known part of x_t is replaced by y with fresh noise of step t, before the denoiser is asked.

    ``x_t <- A^+ (signal y + noise A z) + (I - A^+ A) x_t``, then as ``NullSpace``, so that the known part ends as y.

    Args:
        denoiser: any.
        degradation, y: what is known; without noise.
        generator: source of the fresh noise.

    Source: Song et al. (2021), Score-based generative modeling, appendix I.2; Lugmayr et al. (2022), equation 8.
    """

    def __init__(
        self,
        denoiser: Callable[..., Prediction],
        degradation: Degradation,
        y: Tensor,
        generator: torch.Generator | None = None,
    ):
        super().__init__(denoiser, degradation, y)
        self.generator = generator

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        A, z = self.degradation, _normal(x_t.shape, x_t, self.generator)
        y, like = self.seen(x_t)
        noised = self.schedule.at("signal", t, x_t) * y + self.schedule.at("noise", t, x_t) * A.forward(z)
        x_t = A.pseudo_inverse(noised) + (x_t - A.pseudo_inverse(like))
        return super().forward(x_t, t, condition)


class _Likelihood(_Observed):
    """``score + gradient of log N(y; A x0(x_t), M)`` with respect to x_t, through the network; M is what differs."""

    def pull(self, residual: Tensor, prediction: Prediction, back: Callable[[Tensor], Tensor], t, x_t) -> Tensor:
        """``A^T M^-1 residual``; ``back(v)`` is the product of v and the Jacobian of x0(x_t)."""
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            x0 = self.ask(x, t, condition).x0

        def back(v: Tensor) -> Tensor:
            return torch.autograd.grad(x0, x, v, retain_graph=True)[0]

        y, like = self.seen(x0.detach())
        prediction = Prediction.of("x0", x0.detach(), x_t, t, self.schedule)
        gradient = back(self.pull(y - like, prediction, back, t, x_t))
        guided = prediction.x0 + prediction.noise**2 / prediction.signal * gradient
        return Prediction.of("x0", guided, x_t, t, self.schedule)


class DPS(_Likelihood):
    """Diffusion posterior sampling: the predicted image stands for the image, ``p(y | x_t) ~ p(y | x0(x_t))``.

    ``x0 <- x0 - weight * signal / 2 * gradient of |y - A x0(x_t)|^2`` with respect to x_t, that is
    M = noise^2 / (weight signal^2). Costs one pass backward per step.

    Args:
        denoiser: any that can be differentiated.
        degradation, y: what is known.
        weight: a number, a tensor or a function of x_t and t, as for ``Guided``. ``(noise / signal)^2 / sigma^2`` is
            the likelihood of equation 16 of the paper with noise sigma in y; ``2 zeta / (signal c0)``, with c0 of
            ``schedule.posterior_coefficients(t)``, its algorithm 1 with step size zeta.

    Source: Chung et al. (2023), equation 16 and algorithm 1; a constant weight is that of Ho et al. (2022), Video
    diffusion models, equation 7.
    """

    def __init__(self, denoiser: Callable[..., Prediction], degradation: Degradation, y: Tensor, weight: Weight = 1.0):
        super().__init__(denoiser, degradation, y)
        self.weight = weight

    def pull(self, residual, prediction, back, t, x_t):
        weight = weight_at(self.weight, x_t, t)
        return weight * (prediction.signal / prediction.noise) ** 2 * self.degradation.transpose(residual)


class PiGDM(_Likelihood):
    """Pseudo-inverse guidance: the image given x_t is taken as normal around x0(x_t) with variance r^2 in each pixel.

    M = r^2 A A^T + sigma^2, with r^2 = v noise^2 / (v signal^2 + noise^2): right if the data are normal with variance v
    in each pixel, and independent. Costs one pass backward per step.

    Args:
        denoiser: any that can be differentiated.
        degradation, y: what is known.
        sigma: deviation of the noise in y, 0 or more.
        data_variance: v. The paper has v = 1, so that r^2 = noise^2.

    Source: Song, Vahdat, Mardani, Kautz (2023), section 3.
    """

    def __init__(
        self,
        denoiser: Callable[..., Prediction],
        degradation: Degradation,
        y: Tensor,
        sigma: float = 0.0,
        data_variance: float = 1.0,
    ):
        super().__init__(denoiser, degradation, y)
        self.sigma = _deviation(sigma)
        if not 0 < data_variance < math.inf:
            raise ValueError(f"data_variance must be above 0; got {data_variance}.")
        self.data_variance = data_variance

    def pull(self, residual, prediction, back, t, x_t):
        v, signal, noise = self.data_variance, prediction.signal, prediction.noise
        r_squared = v * noise**2 / (v * signal**2 + noise**2)
        return self.degradation.pseudo_inverse(residual, self.sigma**2 / r_squared) / r_squared


class MMPS(_Likelihood):
    """Moment matching posterior sampling: as ``PiGDM``, with the covariance that the denoiser itself implies.

    M = A C A^T + sigma^2, where C = noise^2 / signal * Jacobian of x0(x_t) is the covariance of the image given x_t
    (Tweedie's second formula). M^-1 is applied by conjugate gradients; each iteration costs one more pass backward.
    Exact for normal data, whatever their covariance.

    Args:
        denoiser: any that can be differentiated.
        degradation, y: what is known.
        sigma: deviation of the noise in y, 0 or more.
        iterations: of conjugate gradients, from 1; as many as y has numbers solve the equation exactly.

    Source: Rozet, Andry, Lanusse, Louppe (2024), section 4.2.
    """

    def __init__(
        self,
        denoiser: Callable[..., Prediction],
        degradation: Degradation,
        y: Tensor,
        sigma: float = 0.0,
        iterations: int = 3,
    ):
        super().__init__(denoiser, degradation, y)
        self.sigma, self.iterations = _deviation(sigma), _positive_int("iterations", iterations)

    def pull(self, residual, prediction, back, t, x_t):
        A = self.degradation

        def M(u: Tensor) -> Tensor:
            covariance = prediction.noise**2 / prediction.signal * back(A.transpose(u))
            return A.forward(covariance) + self.sigma**2 * u

        return A.transpose(_conjugate_gradients(M, residual, self.iterations))


def _conjugate_gradients(M: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """About M^-1 b for each image of its own; M is symmetric and positive."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (u.ndim - 1))

    u, residual, direction = torch.zeros_like(b), b, b
    enough = torch.finfo(b.dtype).eps ** 2 * dot(b, b)
    for _ in range(iterations):
        image = M(direction)
        old, along = dot(residual, residual), dot(direction, image)
        going = (old > enough) & (along > 0)  # an image that has arrived, or found M not positive, stays
        size = torch.where(going, old / along.where(going, 1), 0)
        u, residual = u + size * direction, residual - size * image
        direction = residual + torch.where(going, dot(residual, residual) / old.where(going, 1), 0) * direction
    return u


def _deviation(sigma: float) -> float:
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma, the deviation of the noise in y, must be 0 or more; got {sigma}.")
    return float(sigma)


def repaint_path(T: int, steps: int, jump: int = 10, resamplings: int = 10) -> list[int]:
    """The steps of a walk that goes back up: after every ``jump`` of its steps it climbs them again.

    Each stretch of ``jump`` steps on the way from T to 0 is walked ``resamplings`` times (the first stretch is what is
    left over when ``jump`` does not divide ``steps``). With resamplings = 1 it is ``timesteps(T, steps)``.

    Source: Lugmayr et al. (2022), section 4.2 and appendix B.
    """
    jump, resamplings = _positive_int("jump", jump), _positive_int("resamplings", resamplings)
    grid = timesteps(T, steps)
    if jump > steps:
        raise ValueError(f"a jump is at most the whole walk of {steps} steps; got {jump}.")
    ends = range(steps, -1, -jump)
    path = grid[: ends[-1] + 1]
    for start in reversed(ends[1:]):
        down = grid[start + 1 : start + jump + 1]
        path += down + (grid[start : start + jump][::-1] + down) * (resamplings - 1)
    return path


def repaint(
    denoiser: Callable[..., Prediction],
    shape: Sequence[int] | None = None,
    *,
    steps: int = 50,
    jump: int = 10,
    resamplings: int = 10,
    eta: float = 1.0,
    variance: str = "beta",
    clip: bool = True,
    condition: Tensor | None = None,
    x_T: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples by a walk that goes back up and down again, so that filled and known parts can settle together.

    Args:
        denoiser: one that has seen y: ``Replacement`` as in the paper, or any other of this module.
        shape: of the samples; not needed when x_T is given, which must have it.
        steps, jump, resamplings: of ``repaint_path``; the denoiser is asked about steps * resamplings times.
        eta, variance, clip, condition, generator: as in ``sample_steps``.
        x_T: the noise to start from; drawn if None.

    Source: Lugmayr et al. (2022), algorithm 1 (RePaint).
    """
    x, schedule = _start(denoiser, shape, x_T, generator), denoiser.schedule
    for t, s in pairwise(repaint_path(schedule.T, steps, jump, resamplings)):
        if s > t:
            beta, _ = schedule.between(s, t)
            x = math.sqrt(1 - beta) * x + math.sqrt(beta) * _normal(x.shape, x, generator)
            continue
        with torch.no_grad(), _evaluating(denoiser):
            prediction = denoiser(x, t) if condition is None else denoiser(x, t, condition)
        prediction = prediction.clip() if clip else prediction
        x = step(prediction, t, s, schedule, eta=eta, variance=variance, generator=generator)
    return x


class Windows(_Wrapper):
    """Images larger than the network's: the mean of its predictions in overlapping windows.

    Args:
        denoiser: for images (B, C, *size).
        size: height and width of a window, those of the images that the denoiser was trained with.
        stride: by how many pixels one window lies beside the next, 1 to size, down and across; the last one ends at
            the border. The condition, if any, holds in every window.

    Source: Bar-Tal, Yariv, Lipman, Dekel (2023), section 4, with equal weights (MultiDiffusion).
    """

    def __init__(self, denoiser: Callable[..., Prediction], size: tuple[int, int], stride: tuple[int, int]):
        super().__init__(denoiser)
        if not all(1 <= step <= side for step, side in zip(stride, size, strict=True)):
            raise ValueError(f"the stride must lie in 1..size, {tuple(size)}; got {tuple(stride)}.")
        self.size, self.stride = tuple(size), tuple(stride)

    def _corners(self, height: int, width: int) -> list[tuple[int, int]]:
        if height < self.size[0] or width < self.size[1]:
            raise ValueError(f"images must be at least one window, {self.size}, large; got {(height, width)}.")
        rows, columns = (
            sorted({*range(0, whole - side, stride), whole - side})
            for whole, side, stride in zip((height, width), self.size, self.stride, strict=True)
        )
        return [(row, column) for row in rows for column in columns]

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        if x_t.ndim != 4:
            raise ValueError(f"images must have shape (B, C, H, W); got {tuple(x_t.shape)}.")
        total, count = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        for row, column in self._corners(*x_t.shape[2:]):
            window = (..., slice(row, row + self.size[0]), slice(column, column + self.size[1]))
            total[window] += self.ask(x_t[window], t, condition).x0
            count[window] += 1
        return Prediction.of("x0", total / count, x_t, t, self.schedule)
