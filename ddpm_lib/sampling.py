"""Walking from noise to data: one transition serves ancestral sampling, DDIM and every respacing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .prediction import Prediction
from .schedule import Schedule, _positive_int

VARIANCES = ("beta", "beta_tilde")


@dataclass(frozen=True)
class SampleStep:
    """One step of the walk: from x_t at t, by the prediction made there, to x_s at s < t."""

    t: int
    s: int
    x_t: Tensor
    prediction: Prediction
    x_s: Tensor


def timesteps(T: int, steps: int) -> list[int]:
    """steps + 1 evenly spaced whole numbers from T down to 0, both included."""
    T, steps = _positive_int("T", T), _positive_int("steps", steps)
    if steps > T:
        raise ValueError(f"a schedule of T = {T} can be walked in at most {T} steps; got {steps}.")
    return [(i * T + steps // 2) // steps for i in range(steps, -1, -1)]


def transition(
    prediction: Prediction, t: int, s: int, schedule: Schedule, *, eta: float = 1.0, variance: str = "beta"
) -> tuple[Tensor, float]:
    """Mean and standard deviation of the step from x_t to x_s.

    Args:
        prediction: what the denoiser says about x_t.
        t, s: steps with 0 <= s < t <= T.
        schedule: the noise schedule.
        eta: 1 for ancestral sampling (the mean is that of the posterior), 0 for deterministic DDIM, or between.
        variance: of the noise at eta = 1: 'beta' or 'beta_tilde', the paper's two choices.

    Returns:
        mean (shape of x_t) and sigma, which is 0 when s = 0: the last step adds no noise.

    Source: Ho, Jain, Abbeel (2020), section 3.2; Song, Meng, Ermon (2021), equations 12 and 16 and appendix D.3.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], from DDIM to ancestral sampling; got {eta}.")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be 'beta' or 'beta_tilde'; got {variance!r}.")
    beta, beta_tilde = schedule.between(t, s)
    alpha_bar_s = float(schedule.alpha_bar[s])
    along_eps = math.sqrt(1 - alpha_bar_s - eta**2 * beta_tilde)
    mean = math.sqrt(alpha_bar_s) * prediction.x0 + along_eps * prediction.eps
    if s == 0:
        return mean, 0.0
    return mean, eta * math.sqrt(beta if variance == "beta" else beta_tilde)


def step(
    prediction: Prediction,
    t: int,
    s: int,
    schedule: Schedule,
    *,
    eta: float = 1.0,
    variance: str = "beta",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw of x_s: the mean of ``transition`` plus sigma times fresh noise."""
    mean, sigma = transition(prediction, t, s, schedule, eta=eta, variance=variance)
    return mean + sigma * _normal(mean.shape, mean, generator) if sigma else mean


def sample_steps(
    denoiser: Callable[..., Prediction],
    shape: Sequence[int] | None = None,
    *,
    steps: int | Sequence[int] | None = None,
    eta: float = 1.0,
    variance: str = "beta",
    clip: bool = True,
    condition: Tensor | None = None,
    x_T: Tensor | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
) -> Iterator[SampleStep]:
    """Walk from x_T to x_0 and yield every step on the way.

    Args:
        denoiser: called as ``denoiser(x_t, t)``, or with the condition as third argument if one is given.
        shape: of the samples, (B, ...); not needed when x_T is given, which must have it.
        steps: how many steps to take (all T if None), or the steps themselves, falling from T to 0.
        eta, variance: see ``transition``.
        clip: clip the predicted x0 to [-1, 1] before the mean is formed.
        condition: what to draw, as the denoiser takes it: classes (B,), tokens of captions, or images.
        x_T: the noise to start from; drawn if None.
        generator: source of all noise, for repeatable samples.
        schedule: the denoiser's own if None.

    Source: Ho, Jain, Abbeel (2020), algorithm 2.
    """
    schedule = denoiser.schedule if schedule is None else schedule
    path = _path(schedule.T, steps)
    x_T = _start(denoiser, shape, x_T, generator)
    return _walk(denoiser, x_T, path, schedule, eta, variance, clip, condition, generator)


def sample(denoiser: Callable[..., Prediction], shape: Sequence[int] | None = None, **options) -> Tensor:
    """Samples x_0 of the given shape; the options are those of ``sample_steps``."""
    return deque(sample_steps(denoiser, shape, **options), maxlen=1).pop().x_s


def _walk(denoiser, x, path, schedule, eta, variance, clip, condition, generator) -> Iterator[SampleStep]:
    for t, s in pairwise(path):
        with torch.no_grad(), _evaluating(denoiser):
            prediction = denoiser(x, t) if condition is None else denoiser(x, t, condition)
            if clip:
                prediction = prediction.clip()
            x_s = step(prediction, t, s, schedule, eta=eta, variance=variance, generator=generator)
        yield SampleStep(t, s, x, prediction, x_s)
        x = x_s


def _path(T: int, steps: int | Sequence[int] | None) -> list[int]:
    if not hasattr(steps, "__iter__"):
        return timesteps(T, T if steps is None else steps)
    path = list(steps)
    if len(path) < 2 or path[0] != T or path[-1] != 0 or any(s >= t for t, s in pairwise(path)):
        raise ValueError(f"steps must fall strictly from T = {T} to 0; got {path}.")
    return path


def _start(
    denoiser: Callable, shape: Sequence[int] | None, x_T: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The noise to start from: x_T, or noise of this shape where the denoiser's weights are."""
    if x_T is not None:
        if shape is not None and tuple(shape) != tuple(x_T.shape):
            raise ValueError(f"shape is {tuple(shape)}, but x_T has the shape {tuple(x_T.shape)}: leave one out.")
        return x_T
    if shape is None:
        raise ValueError("give the shape of the samples, or the noise x_T to start from.")
    like = next(denoiser.parameters(), torch.empty(())) if isinstance(denoiser, nn.Module) else torch.empty(())
    return _normal(tuple(shape), like, generator)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


@contextmanager
def _evaluating(denoiser):
    """Dropout off, in every part of the denoiser, while it is asked."""
    parts = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    training = [part for part in parts if getattr(part, "training", False)]  # frozen TorchScript has no mode
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
