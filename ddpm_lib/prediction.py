"""What a denoiser says about x_t: one value that can be read as x0, eps, v or the score."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .schedule import Schedule

KINDS = ("eps", "x0", "v", "score")


@dataclass(frozen=True)
class Prediction:
    """A split of x_t into data and noise: ``x_t = signal * x0 + noise * eps``.

    Any one of x0, eps, v and score fixes the other three. Tensors have the shape of x_t; ``signal`` and ``noise`` are
    ``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)``, shaped to multiply it.
    """

    x_t: Tensor
    x0: Tensor
    eps: Tensor
    signal: Tensor
    noise: Tensor

    @classmethod
    def of(cls, kind: str, value: Tensor, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Prediction:
        """The prediction whose ``kind`` ('eps', 'x0', 'v' or 'score') is ``value``, at steps t in 1..T.

        Source for v: Salimans and Ho (2022), section 4 and appendix D.
        """
        schedule.check(t)
        if value.shape != x_t.shape:
            raise ValueError(f"the {kind} of x_t must have its shape {tuple(x_t.shape)}; got {tuple(value.shape)}.")
        signal, noise = schedule.at("signal", t, x_t), schedule.at("noise", t, x_t)
        match kind:
            case "eps":
                x0, eps = (x_t - noise * value) / signal, value
            case "x0":
                x0, eps = value, (x_t - signal * value) / noise
            case "v":
                x0, eps = signal * x_t - noise * value, noise * x_t + signal * value
            case "score":
                eps = -noise * value
                x0 = (x_t - noise * eps) / signal
            case _:
                raise ValueError(f"a prediction is one of {', '.join(KINDS)}; got {kind!r}.")
        return cls(x_t, x0, eps, signal, noise)

    @property
    def v(self) -> Tensor:
        """``signal * eps - noise * x0``, the velocity."""
        return self.signal * self.eps - self.noise * self.x0

    @property
    def score(self) -> Tensor:
        """``-eps / noise``, the gradient of log q(x_t) if the prediction is optimal."""
        return -self.eps / self.noise

    def clip(self, low: float = -1.0, high: float = 1.0) -> Prediction:
        """x0 clipped to [low, high] and eps recomputed, so that both still add up to x_t."""
        if not low < high:
            raise ValueError(f"the clipping range must have low < high; got [{low}, {high}].")
        x0 = self.x0.clamp(low, high)
        return replace(self, x0=x0, eps=(self.x_t - self.signal * x0) / self.noise)


class Denoiser(nn.Module):
    """A network and the schedule it is trained for: ``denoiser(x_t, t)`` gives a Prediction.

    Args:
        network: called as ``network(x_t, t - 1)`` or ``network(x_t, t - 1, condition)``. Networks count steps from 0,
            as the paper's released weights do; this is the one place where the two countings meet.
        schedule: the noise schedule.
        predicts: what the network's output means: 'eps', 'x0', 'v' or 'score'.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, predicts: str = "eps"):
        super().__init__()
        if predicts not in KINDS:
            raise ValueError(f"predicts must be one of {', '.join(KINDS)}; got {predicts!r}.")
        self.network, self.schedule, self.predicts = network, schedule, predicts

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        """Prediction for x_t of shape (B, ...) at steps t in 1..T (an int, or integers of shape (B,))."""
        self.schedule.check(t)
        steps = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
        if isinstance(condition, Tensor):
            condition = condition.to(x_t.device)
        told = () if condition is None else (condition,)
        output = self.network(x_t, steps - 1, *told)
        return Prediction.of(self.predicts, output.to(x_t.dtype), x_t, steps, self.schedule)
