"""Steering a denoiser while it samples."""

from __future__ import annotations

from torch import Tensor, nn

from .prediction import Denoiser, Prediction


class Guided(nn.Module):
    """Classifier-free guidance: a denoiser that leans further towards its condition, at two passes per step.

    ``eps = eps(condition) + weight (eps(condition) - eps(no condition))``; samplers take it like any denoiser.

    Args:
        denoiser: conditional, trained with the condition left out now and then.
        weight: 0 for no guidance; samples become clearer and less varied as it grows. A tensor that broadcasts to x_t
            gives each sample its own. diffusers' ``guidance_scale`` is ``1 + weight``.

    Source: Ho and Salimans (2021), equation 6.
    """

    def __init__(self, denoiser: Denoiser, weight: float | Tensor):
        super().__init__()
        self.denoiser, self.weight, self.schedule = denoiser, weight, denoiser.schedule
        self.train(denoiser.training)

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        if condition is None:
            raise ValueError("guidance leads towards a condition; got none.")
        given, without = self.denoiser(x_t, t, condition), self.denoiser(x_t, t)
        eps = given.eps + self.weight * (given.eps - without.eps)
        return Prediction.of("eps", eps, x_t, t, self.schedule)
