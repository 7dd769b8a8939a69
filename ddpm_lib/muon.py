"""Muon, an optimiser for matrices: its steps turn every direction of a weight by the same amount."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)  # of one iteration; it takes singular values in (0, 1] towards 1
ITERATIONS = 5


class Muon(Optimizer):
    """Momentum made orthogonal, for weights of two or more dimensions; Adam for all others, and for embeddings.

    The gradient's running mean M, a matrix with a row for each output, is replaced by about U V^T, where M = U S V^T,
    and the step is as long as one of Adam's usually is: ``0.2 lr sqrt(max(rows, columns))`` times that.

    Args:
        parameters: to be trained.
        lr: learning rate of both.
        betas: of Adam.
        momentum: weight of the old mean of the gradient.
        weight_decay: before a step, what moves by orthogonal steps is multiplied by ``1 - lr weight_decay``.
        embeddings: those parameters of two dimensions whose rows belong to words or classes. They are no maps, and
            most rows of a gradient are 0.

    Source: Jordan et al. (2024), Muon, who leave embeddings to Adam; the length of the step: Liu et al. (2025), Muon is
    scalable, equation 4.
    """

    EPS = 1e-8  # of Adam

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        embeddings: Iterable[Tensor] = (),
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay})
        self.embeddings = list(embeddings)

    def is_map(self, p: Tensor) -> bool:
        """Whether a parameter moves by orthogonal steps."""
        return p.ndim > 1 and not any(p is embedding for embedding in self.embeddings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._matrix_step if self.is_map(p) else self._adam_step)(p, group)

    def _matrix_step(self, p: Tensor, group: dict) -> None:
        mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(mean, group["momentum"]).flatten(1)  # Nesterov's look ahead
        length = 0.2 * max(ahead.shape) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(orthogonal(ahead).view(p.shape), alpha=group["lr"] * length)

    def _adam_step(self, p: Tensor, group: dict) -> None:
        if not self.state[p]:
            self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state, (beta_1, beta_2) = self.state[p], group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - beta_1)
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta_2)
        first = state["exp_avg"] / (1 - beta_1 ** state["step"].item())
        second = state["exp_avg_sq"] / (1 - beta_2 ** state["step"].item())
        p.sub_(first / (second.sqrt() + self.EPS), alpha=group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, (rows, columns): singular values between 0.7 and 1.2.

    Those that were far below the largest, by a factor of 1,000 or so, come out smaller.
    """
    a, b, c = QUINTIC
    wide = matrix if len(matrix) <= len(matrix.T) else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    square = wide @ wide.T  # the iteration runs on this small matrix: X <- Q X turns X X^T into Q X X^T Q
    one = torch.eye(len(square), dtype=square.dtype, device=square.device)
    product = one
    for _ in range(ITERATIONS):
        q = a * one + b * square + c * square @ square
        product = q @ product
        square = q @ square @ q
    wide = product @ wide
    return wide if wide.shape == matrix.shape else wide.T
