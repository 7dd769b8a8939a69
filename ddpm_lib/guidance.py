"""Steering a denoiser while it samples."""

from __future__ import annotations

from torch import Tensor, nn

from .prediction import Denoiser, Prediction


class Guided(nn.Module):
    """Classifier-free guidance: a denoiser that leans further towards its label, at two passes per step.

    ``eps = eps(label) + weight (eps(label) - eps(no label))``; samplers take it like any denoiser.

    Args:
        denoiser: class-conditional, trained with labels left out now and then.
        weight: 0 for no guidance; samples become clearer and less varied as it grows. A tensor that broadcasts to x_t
            gives each sample its own. diffusers' ``guidance_scale`` is ``1 + weight``.

    Source: Ho and Salimans (2021), equation 6.
    """

    def __init__(self, denoiser: Denoiser, weight: float | Tensor):
        super().__init__()
        self.denoiser, self.weight, self.schedule = denoiser, weight, denoiser.schedule
        self.train(denoiser.training)

    def forward(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> Prediction:
        if label is None:
            raise ValueError("guidance leads towards a label; got none.")
        with_label, without = self.denoiser(x_t, t, label), self.denoiser(x_t, t)
        eps = with_label.eps + self.weight * (with_label.eps - without.eps)
        return Prediction.of("eps", eps, x_t, t, self.schedule)
