"""Analytic worlds against scipy, autograd, quadrature, Monte Carlo and numerical Bayes."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ddpm_lib import Gaussian, GaussianMixture, Schedule

WEIGHTS, MEANS, VARIANCES = [1.0, 3.0], [-1.0, 0.5], [0.04, 0.3]
LINE = GaussianMixture(WEIGHTS, [[m] for m in MEANS], VARIANCES)
PLANE = GaussianMixture(
    [0.2, 0.5, 0.3],
    [[-1.0, 0.3], [0.8, 0.8], [0.2, -1.1]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]], [[0.05, 0.0], [0.0, 0.05]]],
)
SCHEDULE = Schedule.linear(30)


def line_density(x):
    """The density of LINE by scipy; its weights sum to 4."""
    parts = (w / 4 * stats.norm.pdf(x, m, math.sqrt(v)) for w, m, v in zip(WEIGHTS, MEANS, VARIANCES))
    return sum(parts)


def points(n: int = 7) -> torch.Tensor:
    return 1.5 * torch.randn(n, 2, dtype=torch.float64)


def test_log_density_equals_scipy():
    x = points()
    laws = [stats.multivariate_normal(m, c) for m, c in zip(PLANE.means.numpy(), PLANE.covariances.numpy())]
    density = sum(w * law.pdf(x.numpy()) for w, law in zip([0.2, 0.5, 0.3], laws))
    np.testing.assert_allclose(PLANE.log_prob(x), np.log(density), rtol=1e-10)
    responsibilities = np.stack([w * law.pdf(x.numpy()) for w, law in zip([0.2, 0.5, 0.3], laws)], axis=1)
    np.testing.assert_allclose(PLANE.responsibilities(x), responsibilities / density[:, None], rtol=1e-9, atol=1e-14)


def test_log_density_far_away_is_finite():
    far = torch.full((1, 2), 100.0, dtype=torch.float64)
    assert PLANE.log_prob(far).isfinite().all()
    assert PLANE.score(far).isfinite().all()


def test_score_equals_autograd():
    x = points().requires_grad_()
    (gradient,) = torch.autograd.grad(PLANE.log_prob(x).sum(), x)
    torch.testing.assert_close(PLANE.score(x.detach()), gradient, rtol=1e-10, atol=1e-12)


def test_moments_and_density_of_the_samples(generator):
    n = 200_000
    x = PLANE.sample(n, generator)
    assert x.shape == (n, 2)
    se = PLANE.covariance.diagonal().sqrt() / math.sqrt(n)
    assert ((x.mean(0) - PLANE.mean).abs() < 5 * se).all()
    torch.testing.assert_close(x.T.cov(), PLANE.covariance, rtol=0, atol=0.01)
    line = LINE.sample(20_000, generator)[:, 0].numpy()

    def cdf(x):
        return sum(w / 4 * stats.norm.cdf(x, m, math.sqrt(v)) for w, m, v in zip(WEIGHTS, MEANS, VARIANCES))

    assert stats.kstest(line, cdf).pvalue > 0.01


def test_mean_and_covariance_by_quadrature():
    mean, _ = integrate.quad(lambda x: x * line_density(x), -6, 6)
    second, _ = integrate.quad(lambda x: x * x * line_density(x), -6, 6)
    assert float(LINE.mean) == pytest.approx(mean, rel=1e-9)
    assert float(LINE.covariance) == pytest.approx(second - mean**2, rel=1e-9)


def test_a_point_may_be_data(generator):
    """Zero variance: samples sit on the points, and the noised law is a proper mixture."""
    world = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.0, 0.0])
    assert set(world.sample(100, generator).flatten().tolist()) == {-1.0, 1.0}
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # Two points seen in noise: E[x0 | x_t] = tanh(sqrt(alpha_bar) x_t / (1 - alpha_bar)).
    torch.testing.assert_close(world.denoise(x_t, 0.3), torch.tanh(math.sqrt(0.3) * x_t / 0.7), rtol=1e-10, atol=1e-13)


def test_a_line_in_the_plane_may_be_data(generator):
    """A covariance of rank one, whose other eigenvalue is zero up to rounding; the reverse law lies on the line too."""
    direction = torch.tensor([0.3, 0.7], dtype=torch.float64)
    world = Gaussian([1.0, 2.0], direction.outer(direction))
    off = world.sample(50, generator) - world.mean
    assert (off[:, 0] * 0.7 - off[:, 1] * 0.3).abs().max() < 1e-7
    cloud = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    cloud = torch.cat([cloud, cloud[:, :1] - cloud[:, 1:2], 2 * cloud[:, :1]], dim=1)
    covariance = cloud.T.cov()
    world = Gaussian(cloud.mean(0), (covariance + covariance.T) / 2)
    law = world.reverse(torch.randn(7, dtype=torch.float64, generator=generator), 5, 0, SCHEDULE)
    assert float(law.mean[5]) == pytest.approx(float(law.mean[0] - law.mean[1]), abs=1e-9)


@pytest.mark.parametrize("alpha_bar", [0.0, 0.01, 0.6, 0.999, 1.0])
def test_the_noised_law_is_a_convolution(alpha_bar):
    noised = LINE.noised(alpha_bar)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    if alpha_bar == 1:
        expected = [line_density(float(v)) for v in x]
    else:

        def at(v):
            def integrand(x0):
                return line_density(x0) * stats.norm.pdf(v, math.sqrt(alpha_bar) * x0, math.sqrt(1 - alpha_bar))

            return integrate.quad(integrand, -6, 6, points=[-1, 0.5, v / math.sqrt(alpha_bar or 1)], limit=400)[0]

        expected = [at(float(v)) for v in x]
    np.testing.assert_allclose(noised.log_prob(x).exp(), expected, rtol=1e-7)


@pytest.mark.parametrize("t", [1, 4, 30])
def test_the_best_guess_by_quadrature(t):
    """E[x0 | x_t] by Bayes' rule, integrated numerically."""
    alpha_bar = math.prod((1 - SCHEDULE.beta[1 : t + 1]).tolist())
    grid = np.linspace(-6, 6, 60_001)
    for v in (-1.5, -0.2, 0.4, 2.0):
        weight = line_density(grid) * stats.norm.pdf(v, math.sqrt(alpha_bar) * grid, math.sqrt(1 - alpha_bar))
        found = LINE.denoiser(SCHEDULE)(torch.tensor([[v]], dtype=torch.float64), t)
        assert float(found.x0) == pytest.approx((grid * weight).sum() / weight.sum(), rel=1e-8)


def test_the_best_guess_by_monte_carlo(generator):
    """Average x0 weighted by q(x_t | x0), over many draws of x0."""
    x0 = PLANE.sample(400_000, generator)
    x_t = torch.tensor([[0.5, -0.4]], dtype=torch.float64)
    weight = torch.exp(-(x_t - math.sqrt(0.4) * x0).square().sum(1) / (2 * 0.6))
    expected = (weight[:, None] * x0).sum(0) / weight.sum()
    spread = ((weight[:, None] * (x0 - expected)).square().sum(0) / weight.sum() ** 2).sqrt()
    assert ((PLANE.denoise(x_t, 0.4)[0] - expected).abs() < 4 * spread).all()


def test_no_guess_is_better_than_the_best_guess(generator):
    """Against small changes of scale and offset, the mean squared error is lowest at the exact denoiser."""
    x0 = PLANE.sample(100_000, generator)
    x_t = SCHEDULE.q_sample(x0, 8, torch.randn(x0.shape, dtype=torch.float64, generator=generator))
    guess = PLANE.denoiser(SCHEDULE)(x_t, 8).x0
    best = (guess - x0).square().mean()
    for other in (guess * 1.05, guess * 0.95, guess + 0.05, guess - 0.05, 0.9 * guess + 0.1 * x_t):
        assert (other - x0).square().mean() > best


@pytest.mark.parametrize("t", [1, 10, 30])
def test_the_denoiser_obeys_tweedie(t):
    """Its score is that of the noised law, by autograd; its dtype is that of x_t."""
    x = points().requires_grad_()
    (gradient,) = torch.autograd.grad(PLANE.noised(float(SCHEDULE.alpha_bar[t])).log_prob(x).sum(), x)
    found = PLANE.denoiser(SCHEDULE)(x.detach(), t)
    torch.testing.assert_close(found.score, gradient, rtol=1e-8, atol=1e-10)
    assert PLANE.denoiser(SCHEDULE)(x.detach().float(), t).x0.dtype == torch.float32


@pytest.mark.parametrize(("t", "s"), [(1, 0), (2, 1), (9, 8), (20, 3), (30, 29), (30, 0)])
def test_the_reverse_law_is_bayes_rule_on_a_grid(t, s):
    """q(x_s | x_t) in proportion to q(x_s) q(x_t | x_s), on a grid of x_s."""
    bar_s = math.prod((1 - SCHEDULE.beta[1 : s + 1]).tolist())
    alpha = math.prod((1 - SCHEDULE.beta[s + 1 : t + 1]).tolist())
    grid = np.linspace(-6, 6, 40_001)
    prior = sum(
        w / 4 * stats.norm.pdf(grid, math.sqrt(bar_s) * m, math.sqrt(bar_s * v + 1 - bar_s))
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES)
    )
    for v in (-1.2, 0.1, 1.6):
        density = prior * stats.norm.pdf(v, math.sqrt(alpha) * grid, math.sqrt(1 - alpha))
        density /= density.sum() * (grid[1] - grid[0])
        found = LINE.reverse(torch.tensor([v], dtype=torch.float64), t, s, SCHEDULE)
        mine = found.log_prob(torch.from_numpy(grid)[:, None]).exp().numpy()
        np.testing.assert_allclose(mine, density, rtol=0, atol=1e-7 * density.max())


@pytest.mark.parametrize(("t", "s"), [(1, 0), (12, 7), (30, 29), (30, 0)])
def test_the_reverse_law_in_the_plane_obeys_bayes_rule_at_every_point(t, s):
    """q(x_s | x_t) q(x_t) = q(x_s) q(x_t | x_s), with full covariances."""
    alpha = math.prod((1 - SCHEDULE.beta[s + 1 : t + 1]).tolist())
    before, after = PLANE.noised(float(SCHEDULE.alpha_bar[s])), PLANE.noised(float(SCHEDULE.alpha_bar[t]))
    x_s = points()
    for x_t in points(3):
        step = torch.distributions.Normal(math.sqrt(alpha) * x_s, math.sqrt(1 - alpha)).log_prob(x_t).sum(1)
        reverse = PLANE.reverse(x_t, t, s, SCHEDULE).log_prob(x_s)
        torch.testing.assert_close(
            reverse + after.log_prob(x_t[None]), before.log_prob(x_s) + step, rtol=1e-8, atol=1e-8
        )


def test_the_mean_of_the_reverse_law_is_the_ancestral_mean():
    """E[x_s | x_t] = c0 E[x0 | x_t] + ct x_t, since the posterior's mean is linear in x0."""
    x_t = torch.tensor([0.3, -0.9], dtype=torch.float64)
    for t, s in [(5, 4), (30, 11), (2, 0)]:
        c0, ct, _ = SCHEDULE.posterior_coefficients(t, s)
        expected = c0 * PLANE.denoise(x_t[None], float(SCHEDULE.alpha_bar[t]))[0] + ct * x_t
        torch.testing.assert_close(PLANE.reverse(x_t, t, s, SCHEDULE).mean, expected, rtol=1e-8, atol=1e-10)


def test_a_gaussian_is_a_mixture_of_one():
    mean, covariance = [0.5, -0.2], [[0.5, 0.1], [0.1, 0.3]]
    world = Gaussian(mean, covariance)
    x = points()
    np.testing.assert_allclose(world.log_prob(x), stats.multivariate_normal(mean, covariance).logpdf(x), rtol=1e-10)
    torch.testing.assert_close(world.score(x), torch.linalg.solve(world.covariance, world.mean[:, None] - x.T).T)
    assert world.noised(0.5).mean.tolist() == pytest.approx([0.5 * 0.5**0.5, -0.2 * 0.5**0.5])


def test_weights_are_scaled_to_sum_to_one():
    assert LINE.weights.tolist() == [0.25, 0.75]


def test_draws_repeat_with_a_generator():
    a, b = (PLANE.sample(5, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_ring_is_even_and_centred():
    """The covariance of points spread evenly on a circle is radius^2 / 2, and each component adds its own."""
    ring = GaussianMixture.ring(5, radius=2.0, deviation=0.3)
    torch.testing.assert_close(ring.mean, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(ring.covariance, torch.eye(2, dtype=torch.float64) * (2 + 0.09), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64))
    neighbours = (ring.means - ring.means.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(neighbours, torch.full((5,), 4 * math.sin(math.pi / 5), dtype=torch.float64))


def test_a_covariance_that_rounding_made_askew_is_taken():
    """The product of a matrix and its transpose is symmetric only to rounding on some processors."""
    covariance = torch.tensor([[1.0, 0.3 + 1e-16], [0.3 - 1e-16, 0.5]], dtype=torch.float64)
    covariance[0, 1] = torch.nextafter(covariance[0, 1], torch.tensor(1.0, dtype=torch.float64))
    assert not torch.equal(covariance, covariance.T)
    found = Gaussian(torch.zeros(2), covariance).covariances[0]
    assert torch.equal(found, found.T)
