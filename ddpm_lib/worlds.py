"""Analytic worlds: data laws for which the optimal denoiser, the score and the likelihood have closed forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Prediction
from .schedule import Schedule


class GaussianMixture:
    """A mixture of K Gaussians in d dimensions; everything is computed in float64.

    Args:
        weights: (K,), positive; they are scaled to sum to 1.
        means: (K, d).
        covariances: (K, d, d), or (K,) variances of round components; zero variance (a point) is allowed for data:
            it can be drawn, noised and denoised, but has no density and no score.
    """

    def __init__(self, weights, means, covariances):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if self.weights.ndim != 1 or self.means.ndim != 2 or len(self.weights) != len(self.means):
            raise ValueError(
                "a mixture needs weights (K,) and means (K, d); "
                f"got shapes {tuple(self.weights.shape)} and {tuple(self.means.shape)}."
            )
        if not (self.weights > 0).all():
            raise ValueError(f"weights must be above 0; got {self.weights.tolist()}.")
        K, d = self.means.shape
        if covariances.shape == (K,):
            covariances = covariances[:, None, None] * torch.eye(d, dtype=torch.float64)
        if covariances.shape != (K, d, d):
            raise ValueError(f"covariances must have shape ({K}, {d}, {d}) or ({K},); got {tuple(covariances.shape)}.")
        asymmetry, eigenvalues = float((covariances - covariances.mT).abs().max()), torch.linalg.eigvalsh(covariances)
        rounding = 1e-12 * eigenvalues.abs().max()
        if asymmetry > rounding or eigenvalues.min() < -rounding:
            raise ValueError(
                "covariances must be symmetric and have no negative eigenvalue; "
                f"got an asymmetry of {asymmetry:g} and a smallest eigenvalue of {float(eigenvalues.min())}."
            )
        self.weights = self.weights / self.weights.sum()
        self.covariances = (covariances + covariances.mT) / 2

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 1.4, deviation: float = 0.1) -> GaussianMixture:
        """Equal round Gaussians in the plane, evenly spaced on a circle around 0: easy to see, hard to cover."""
        angle = 2 * torch.pi * torch.arange(modes, dtype=torch.float64) / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return cls([1.0] * modes, means, [deviation**2] * modes)

    @property
    def mean(self) -> Tensor:
        """Mean (d,) of the mixture."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Covariance (d, d) of the mixture."""
        off = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + off[:, :, None] * off[:, None, :])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + torch.einsum("nij,nj->ni", roots[k], z)

    def _log_joint(self, x: Tensor) -> Tensor:
        """log of weight times density of each component at x (N, d): (N, K)."""
        normal = torch.distributions.MultivariateNormal(self.means, self.covariances)
        return normal.log_prob(x.double()[:, None]) + self.weights.log()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (N,) at points x (N, d), in nats."""
        return self._log_joint(self._points(x)).logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability (N, K) of each component given x (N, d)."""
        return self._log_joint(self._points(x)).softmax(1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient (N, d) of the log density at x (N, d)."""
        x = self._points(x)
        pull = torch.linalg.solve(self.covariances, (self.means - x.double()[:, None])[..., None])[..., 0]
        return torch.einsum("nk,nkd->nd", self.responsibilities(x), pull)

    def noised(self, alpha_bar: float) -> GaussianMixture:
        """The law of x_t when x_0 follows this one: again a mixture."""
        alpha_bar = float(alpha_bar)
        if not 0 <= alpha_bar <= 1:
            raise ValueError(f"alpha_bar must lie in [0, 1]; got {alpha_bar}.")
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        covariances = alpha_bar * self.covariances + (1 - alpha_bar) * eye
        return GaussianMixture(self.weights, alpha_bar**0.5 * self.means, covariances)

    def denoise(self, x_t: Tensor, alpha_bar: float) -> Tensor:
        """E[x_0 | x_t], (N, d), in the dtype of x_t: the best guess in mean square."""
        noised = self.noised(alpha_bar)
        x_t = self._points(x_t)
        off = (x_t.double()[:, None] - noised.means)[..., None]
        inner = self.means + alpha_bar**0.5 * (self.covariances @ torch.linalg.solve(noised.covariances, off))[..., 0]
        return torch.einsum("nk,nkd->nd", noised.responsibilities(x_t), inner).to(x_t.dtype)

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, int], Prediction]:
        """The optimal denoiser under a schedule: called with x_t (N, d) and one step t, it gives a Prediction."""

        def optimal(x_t: Tensor, t: int) -> Prediction:
            schedule.check(t)
            x0 = self.denoise(x_t, float(schedule.alpha_bar[t]))
            return Prediction.of("x0", x0, x_t, t, schedule)

        optimal.schedule = schedule
        return optimal

    def reverse(self, x_t: Tensor, t: int, s: int, schedule: Schedule) -> GaussianMixture:
        """The exact law of x_s given one x_t (d,), with s < t: a mixture of as many components.

        Each component is a Gaussian seen through ``x_t = a x_s + sqrt(b) z`` (Gaussian conditioning); its weight is
        its probability given x_t.
        """
        b, _ = schedule.between(t, s)
        a = (1 - b) ** 0.5
        x_t = self._points(x_t[None])
        before, after = self.noised(schedule.alpha_bar[s]), self.noised(schedule.alpha_bar[t])
        gain = a * torch.linalg.solve(after.covariances, before.covariances).mT
        means = before.means + (gain @ (x_t[0].double() - a * before.means)[..., None])[..., 0]
        covariances = before.covariances - a * gain @ before.covariances
        return GaussianMixture(
            after.responsibilities(x_t)[0].clamp(min=1e-300), means, (covariances + covariances.mT) / 2
        )

    def _points(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"points must have shape (N, {self.means.shape[1]}); got {tuple(x.shape)}.")
        return x


class Gaussian(GaussianMixture):
    """One Gaussian: mean (d,) and covariance (d, d)."""

    def __init__(self, mean, covariance):
        mean = torch.as_tensor(mean, dtype=torch.float64)
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                "a Gaussian needs a mean (d,) and a covariance (d, d); "
                f"got shapes {tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        super().__init__([1.0], mean[None], covariance[None])
