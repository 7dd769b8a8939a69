"""Four families of generative models behind one interface, small enough to train side by side: GAN, VAE, flow, DDPM.

They model points (N, D) on a scale of about 1, with the same kind of network, a multilayer perceptron with residual
blocks. ``fit`` trains, ``sample`` draws, ``log_likelihood`` gives what the family can give.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bound import bound_terms
from .loss import simple_loss
from .prediction import Denoiser
from .sampling import sample
from .schedule import Schedule, _positive_int
from .training import keyed_randomness
from .unet import TimeEmbedding

LOG_2PI = math.log(2 * math.pi)
LEVELS = 17  # grey levels of the digits


def dequantise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Points (N, D) with a density, from images of LEVELS grey levels in [-1, 1], as ``digits`` gives them.

    Each level becomes an interval of width ``2 / LEVELS`` in [-1, 1), and each pixel a random point of its interval: so
    a density p of points bounds the probability of an image, ``log P(image) >= E[log p] + D log(2 / LEVELS)``.

    Source: Theis, van den Oord, Bethge (2016).
    """
    levels = ((images + 1) * (LEVELS - 1) / 2).round().flatten(1)
    return (levels + torch.rand(levels.shape, generator=generator)) * 2 / LEVELS - 1


def quantise(points: Tensor) -> Tensor:
    """Undo ``dequantise``: square images (N, 1, size, size) in [-1, 1] from points (N, size^2)."""
    size = math.isqrt(points.shape[1])
    levels = ((points + 1) * LEVELS / 2).floor().clamp(0, LEVELS - 1).view(-1, 1, size, size)
    return levels * 2 / (LEVELS - 1) - 1


class Perceptron(nn.Module):
    """Maps (B, inputs) to (B, outputs) through residual blocks; with ``timed``, also given whole steps (B,)."""

    def __init__(self, inputs: int, outputs: int, width: int = 128, blocks: int = 2, timed: bool = False):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.time = TimeEmbedding(width, width) if timed else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor, steps: Tensor | None = None) -> Tensor:
        h = self.first(x)
        when = 0 if self.time is None else self.time(steps)
        for block in self.blocks:
            h = h + block(h + when)
        return self.last(F.silu(h))


class Family(nn.Module):
    """A generative model of points (N, size).

    Attributes:
        likelihood: what ``log_likelihood`` gives: 'none', 'bound' or 'exact'.
        passes: of a network, per sample.
    """

    likelihood = "none"
    passes = 1

    def __init__(self, size: int, learning_rate: float):
        super().__init__()
        self.size, self.learning_rate = _positive_int("size", size), learning_rate

    def fit(self, data: Tensor, steps: int, *, batch_size: int = 256, seed: int = 0) -> Iterator[float]:
        """Train on data (N, size) on the CPU for this many steps, and yield the loss after each: loop to the end.

        The learning rate falls to 0 along a half cosine. At the end the weights are their moving average. The batches
        and the noise in training depend on ``seed`` only.
        """
        if data.ndim != 2 or data.shape[1] != self.size:
            raise ValueError(f"data must have shape (N, {self.size}); got {tuple(data.shape)}.")
        average = copy.deepcopy(self)
        optimisers = self._optimisers()
        for step in range(_positive_int("steps", steps)):
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = self.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            with keyed_randomness(seed, step, data.device):
                loss = self._update(data[torch.randint(len(data), (batch_size,))], *optimisers)
            decay = min(0.995, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(self.parameters()), 1 - decay)
            yield loss
        self.load_state_dict(average.state_dict())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, size)."""
        raise NotImplementedError

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Log density at points x (N, size) in nats, (N,): exact, or a random number that is below it on average."""
        raise ValueError(f"a {type(self).__name__} has no likelihood: it can be drawn from, and nothing else.")

    def loss(self, x: Tensor) -> Tensor:
        """What training makes small, on a batch x (B, size)."""
        raise NotImplementedError

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.parameters(), fused=True)]

    def _update(self, x: Tensor, optimiser: torch.optim.Optimizer) -> float:
        loss = self.loss(x)
        _descend(loss, optimiser)
        return float(loss.detach())


class GAN(Family):
    """A generator against a discriminator: Goodfellow et al. (2014), with the non-saturating generator loss.

    The gradient penalty on real points is R1 of Mescheder, Geiger, Nowozin (2018).
    """

    def __init__(self, size: int, latent: int = 16, width: int = 92, penalty: float = 0.1, learning_rate: float = 2e-3):
        super().__init__(size, learning_rate)
        self.latent, self.penalty = latent, penalty
        self.generator = Perceptron(latent, size, width)
        self.discriminator = Perceptron(size, 1, width)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.generator(torch.randn(n, self.latent, generator=generator))

    def discriminator_loss(self, x: Tensor, generated: Tensor) -> Tensor:
        """Cross-entropy of telling x from generated points: minus the value of the game, before the penalty."""
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(generated)).mean()

    def generator_loss(self, n: int) -> Tensor:
        """The non-saturating loss, -log D(G(z)), of n draws."""
        return F.softplus(-self.discriminator(self.generator(torch.randn(n, self.latent)))).mean()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), betas=(0.5, 0.99), fused=True)
            for part in (self.discriminator, self.generator)
        ]

    def _update(self, x: Tensor, discriminator: torch.optim.Optimizer, generator: torch.optim.Optimizer) -> float:
        x = x.detach().requires_grad_()
        steepness = torch.autograd.grad(self.discriminator(x).sum(), x, create_graph=True)[0].square().sum(1).mean()
        loss = self.discriminator_loss(x, self.sample(len(x)))
        _descend(loss + self.penalty / 2 * steepness, discriminator)
        _descend(self.generator_loss(len(x)), generator)
        return float(loss.detach())


class VAE(Family):
    """An encoder and a decoder, both Gaussian: Kingma and Welling (2014).

    The decoder's deviation is learned, one for each entry.
    """

    likelihood = "bound"

    def __init__(self, size: int, latent: int = 8, width: int = 92, learning_rate: float = 5e-3):
        super().__init__(size, learning_rate)
        self.latent = latent
        self.encoder = Perceptron(size, 2 * latent, width)
        self.decoder = Perceptron(latent, size, width)
        self.log_sigma = nn.Parameter(torch.full((size,), -1.5))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation (B, latent) of q(z | x)."""
        mean, log_sigma = self.encoder(x).chunk(2, dim=1)
        return mean, log_sigma.clamp(-7, 7)

    def loss(self, x: Tensor) -> Tensor:
        return -self.bound(x, torch.randn(len(x), self.latent)).mean()

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """log p(x | z) - KL(q(z | x) || N(0, I)) with z drawn by the noise (B, latent): (B,)."""
        mean, log_sigma = self.encode(x)
        z = mean + log_sigma.exp() * noise
        kl = (mean.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1) / 2
        error = ((x - self.decoder(z)) / self.log_sigma.exp()).square().sum(1)
        return -(error + self.size * LOG_2PI) / 2 - self.log_sigma.sum() - kl

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            mean = self.decoder(torch.randn(n, self.latent, generator=generator))
            return mean + self.log_sigma.exp() * torch.randn(n, self.size, generator=generator)

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.bound(x, torch.randn(len(x), self.latent, generator=generator))


class Coupling(nn.Module):
    """One invertible layer: the entries outside the mask are scaled and shifted by functions of those inside."""

    def __init__(self, mask: Tensor, width: int, blocks: int = 1):
        super().__init__()
        self.register_buffer("mask", mask)
        self.network = Perceptron(len(mask), 2 * len(mask), width, blocks)
        nn.init.zeros_(self.network.last.weight)
        nn.init.zeros_(self.network.last.bias)

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale, in (-2, 2), and shift, both 0 inside the mask."""
        log_scale, shift = self.network(x * self.mask).chunk(2, dim=1)
        return 2 * torch.tanh(log_scale / 2) * (1 - self.mask), shift * (1 - self.mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output, and the log of its Jacobian determinant (B,)."""
        log_scale, shift = self.scale_and_shift(x)
        return x * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = self.scale_and_shift(y)  # y equals x inside the mask
        return (y - shift) * (-log_scale).exp()


class Flow(Family):
    """Invertible layers between data and a Gaussian: RealNVP of Dinh, Sohl-Dickstein, Bengio (2017)."""

    likelihood = "exact"

    def __init__(self, size: int, layers: int = 8, width: int = 64, learning_rate: float = 5e-3):
        super().__init__(size, learning_rate)
        if size < 2:
            raise ValueError(f"a coupling layer needs at least 2 entries to split; got size = {size}.")
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for layer in range(layers):  # a random half of the entries, then the other half
            if layer % 2 == 0:
                mask = torch.zeros(size)
                mask[torch.randperm(size, generator=generator)[: size // 2]] = 1
            self.layers.append(Coupling(mask if layer % 2 == 0 else 1 - mask, width))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent point of each x, and the log of the Jacobian determinant (B,) of the whole map."""
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, log_determinant = layer(x)
            total = total + log_determinant
        return x, total

    def decode(self, z: Tensor) -> Tensor:
        """The point x of each latent point: the inverse of ``encode``."""
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z

    def density(self, x: Tensor) -> Tensor:
        """log p(x), (B,), by the change of variables."""
        z, log_determinant = self.encode(x)
        return -(z.square().sum(1) + self.size * LOG_2PI) / 2 + log_determinant

    def loss(self, x: Tensor) -> Tensor:
        return -self.density(x).mean()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.decode(torch.randn(n, self.size, generator=generator))

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.density(x)


class DDPM(Family):
    """This book's model with a multilayer perceptron: noise predicted, the simple loss, ancestral sampling."""

    likelihood = "bound"

    def __init__(self, size: int, T: int = 100, width: int = 92, blocks: int = 3, learning_rate: float = 1e-2):
        super().__init__(size, learning_rate)
        self.passes = T
        self.denoiser = Denoiser(Perceptron(size, size, width, blocks, timed=True), Schedule.linear(T))

    def loss(self, x: Tensor) -> Tensor:
        t = torch.randint(1, self.denoiser.schedule.T + 1, (len(x),))
        return simple_loss(self.denoiser, x, t, torch.randn_like(x)).mean()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return sample(self.denoiser, (n, self.size), variance="beta_tilde", clip=False, generator=generator)

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return -bound_terms(self.denoiser, x, generator=generator).sum(0)


def _descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
