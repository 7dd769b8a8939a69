"""Steering a denoiser while it samples: classifier-free guidance, negative conditions, guidance by a classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import fit_state, read_checkpoint, shipped
from .prediction import Denoiser, Prediction
from .unet import TimeEmbedding

Weight = float | Tensor | Callable[[Tensor, int | Tensor], float | Tensor]


class Guided(nn.Module):
    """Classifier-free guidance: a denoiser that leans further towards its condition, at two passes per step.

    ``eps = eps(condition) + weight (eps(condition) - eps(no condition))``; samplers take it like any denoiser.

    Args:
        denoiser: conditional, trained with the condition left out now and then.
        weight: 0 for no guidance; samples become clearer and less varied as it grows. A tensor with as many dimensions
            as x_t, of images (B, 1, 1, 1), gives each sample its own. A function of x_t and t gives each step its own;
            where it returns the number 0 the second pass is saved. diffusers' ``guidance_scale`` is ``1 + weight``.
        negative: a condition to lean away from, which takes the place of no condition: as the denoiser takes it, one
            for each sample, or one for all of them (first dimension 1).

    Source: Ho and Salimans (2021), equation 6; for a weight by step Kynkäänniemi et al. (2024), equation 5.
    """

    def __init__(self, denoiser: Denoiser, weight: Weight, negative: Tensor | None = None):
        super().__init__()
        self.denoiser, self.weight, self.schedule = denoiser, weight, denoiser.schedule
        self.negative = negative

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        """The guided prediction for x_t (B, ...) at t; the condition is as the denoiser takes it."""
        if condition is None:
            raise ValueError("guidance leads towards a condition; got none.")
        given = self.denoiser(x_t, t, condition)
        weight = weight_at(self.weight, x_t, t)
        if not isinstance(weight, Tensor) and weight == 0:
            return given
        eps = given.eps + weight * (given.eps - self._without(x_t, t).eps)
        return Prediction.of("eps", eps, x_t, t, self.schedule)

    def _without(self, x_t: Tensor, t: int | Tensor) -> Prediction:
        if self.negative is None:
            return self.denoiser(x_t, t)
        negative = self.negative
        if negative.ndim == 0 or len(negative) not in (1, len(x_t)):
            raise ValueError(
                f"negative must hold one condition for all samples or one for each of {len(x_t)}; "
                f"got shape {tuple(negative.shape)}."
            )
        return self.denoiser(x_t, t, negative.to(x_t.device).expand(len(x_t), *negative.shape[1:]))


def weight_at(weight: Weight, x_t: Tensor, t: int | Tensor) -> float | Tensor:
    """A weight at x_t and t: a number, or a tensor with no dimension or with as many as x_t, so that it cannot
    multiply along another one than it was meant for; of x_t's dtype and on its device.
    """
    weight = weight(x_t, t) if callable(weight) else weight
    if not isinstance(weight, Tensor):
        return weight
    if weight.ndim not in (0, x_t.ndim):
        raise ValueError(
            f"a weight for each sample must have as many dimensions as x_t, shape {(len(x_t), *[1] * (x_t.ndim - 1))}; "
            f"got {tuple(weight.shape)}."
        )
    return weight.to(x_t)


class ClassifierGuided(nn.Module):
    """Guidance by the gradient of a classifier: a denoiser with no condition is led to a class.

    ``score = score(x_t) + weight * gradient of log p(class | x_t, t)``; samplers take it like any denoiser, and the
    condition they hand on is the class, (B,).

    Args:
        denoiser: asked with no condition.
        classifier: called as ``classifier(x_t, t)``; gives logits (B, classes) for *noisy* images. It must have been
            trained under the schedule of the denoiser.
        weight: 1 for the law of the class by Bayes' rule, 0 for no guidance. With an exact classifier, ``weight`` here
            is ``1 + weight`` of ``Guided``. A tensor or a function, as there.

    Source: Dhariwal and Nichol (2021), algorithm 2; with ancestral sampling it stands in for their algorithm 1.
    """

    def __init__(self, denoiser: Denoiser, classifier: Callable[..., Tensor], weight: Weight = 1.0):
        super().__init__()
        self.denoiser, self.classifier, self.weight = denoiser, classifier, weight
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Prediction:
        """The guided prediction for x_t (B, ...) at t; the condition is the class, (B,)."""
        if condition is None:
            raise ValueError("guidance leads towards a class; got none.")
        noise = self.schedule.at("noise", t, x_t)
        gradient = label_gradient(self.classifier, x_t, t, condition)
        eps = self.denoiser(x_t, t).eps - weight_at(self.weight, x_t, t) * noise * gradient
        return Prediction.of("eps", eps, x_t, t, self.schedule)


def label_gradient(classifier: Callable[..., Tensor], x_t: Tensor, t: int | Tensor, label: Tensor) -> Tensor:
    """Gradient of log p(label | x_t, t) with respect to x_t, of its shape; labels are whole numbers (B,).

    It is computed inside ``torch.no_grad()``, too.
    """
    if label.shape != x_t.shape[:1] or label.is_floating_point():
        raise ValueError(
            f"labels must be one whole number per image, shape ({len(x_t)},); "
            f"got {label.dtype} of shape {tuple(label.shape)}."
        )
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        logits = classifier(x, t)
        log_p = logits.log_softmax(1)
        if label.device.type == "cpu" and len(label) and not 0 <= int(label.min()) <= int(label.max()) < log_p.shape[1]:
            raise ValueError(f"labels must lie in 0..{log_p.shape[1] - 1}; got {label.tolist()}.")
        return torch.autograd.grad(log_p.gather(1, label.to(x_t.device)[:, None]).sum(), x)[0]


class NoisyClassifier(nn.Module):
    """Names the class of a *noisy* image, for ``ClassifierGuided``; smooth, so that its gradient is one, too.

    Three convolutions and two linear layers on square grey images of even side, for 10 classes; it is told the step.
    """

    def __init__(self, image_size: int = 8, width: int = 32, features: int = 32):
        super().__init__()
        self.config = {"image_size": image_size, "width": width, "features": features}
        self.time = TimeEmbedding(width, 2 * width)
        self.conv_1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.shift = nn.Linear(2 * width, 2 * width)
        self.linear = nn.Linear(2 * width * (image_size // 2) ** 2, features)
        self.head = nn.Linear(features, 10)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, image_size, image_size) at steps t in 1..T, a number or (B,)."""
        size = self.config["image_size"]
        if x_t.shape[1:] != (1, size, size):
            raise ValueError(f"this classifier reads images of shape (B, 1, {size}, {size}); got {tuple(x_t.shape)}.")
        steps = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        embedding = F.silu(self.time(steps - 1))
        h = F.silu(self.conv_2(F.silu(self.conv_1(x_t))) + self.shift(embedding)[:, :, None, None])
        h = F.silu(self.conv_3(h))
        return self.head(F.silu(self.linear(h.flatten(1))))


def pretrained_noisy_classifier(name: str = "digits") -> NoisyClassifier:
    """A trained classifier of noisy images that the package ships, in evaluation mode, with frozen weights.

    ``name`` is 'digits'; its steps are those of the schedule of ``pretrained("digits")``.
    """
    path = shipped(f"{name}-noisy-classifier")
    config, tensors = read_checkpoint(path, "noisy classifier")
    model = NoisyClassifier(**config)
    fit_state(model, tensors, str(path))
    return model.eval().requires_grad_(False)
