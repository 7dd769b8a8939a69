"""The equations of the chapter on intuition, each against a computation that shares no code with the formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_lib import Gaussian, GaussianMixture, Schedule

DROPS = GaussianMixture([0.3, 0.5, 0.2], [[-1.2], [0.4], [1.5]], [0.1, 0.2, 0.05])
GRID = np.linspace(-9, 9, 18_001)
STEP = GRID[1] - GRID[0]


def drops(x, weights=(0.3, 0.5, 0.2), means=(-1.2, 0.4, 1.5), variances=(0.1, 0.2, 0.05)) -> np.ndarray:
    """The density of DROPS, by scipy."""
    return sum(w * stats.norm.pdf(x, m, math.sqrt(v)) for w, m, v in zip(weights, means, variances))


def way_back(x_t: float, beta: float) -> np.ndarray:
    """q(x_{t-1} | x_t) on the grid: the joint density cut at x_t and made to integrate to 1."""
    cut = drops(GRID) * stats.norm.pdf(x_t, math.sqrt(1 - beta) * GRID, math.sqrt(beta))
    return cut / (cut.sum() * STEP)


def density_of_x_t(x_t: float, beta: float) -> float:
    return float((drops(GRID) * stats.norm.pdf(x_t, math.sqrt(1 - beta) * GRID, math.sqrt(beta))).sum() * STEP)


def bounced(x: float, move: float) -> float:
    """A walk between walls at -1 and 1, bounce by bounce."""
    x += move
    while abs(x) > 1:
        x = 2 - x if x > 1 else -2 - x
    return x


# Dye


@pytest.mark.equation("eq-intuition-spread")
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kick", ["normal", "coin"])
def test_the_squared_distance_grows_like_time(d, kick):
    D, delta, k, generator = 0.3, 0.05, 40, np.random.default_rng(d)
    scale = math.sqrt(2 * D * delta)
    shape = (k, 20_000, d)
    moves = generator.standard_normal(shape) if kick == "normal" else generator.choice([-1.0, 1.0], shape)
    squared = np.square(scale * moves.sum(0)).sum(1)
    error = squared.std() / math.sqrt(len(squared))
    assert squared.mean() == pytest.approx(2 * d * D * k * delta, abs=4.5 * error)


@pytest.mark.equation("eq-intuition-heat")
def test_the_gaussian_solves_the_heat_equation():
    D, a, x, t = 0.3, -0.4, np.linspace(-3, 3, 41), 0.7

    def c(x, t):
        return stats.norm.pdf(x, a, math.sqrt(2 * D * t))

    h = 1e-4
    in_time = (c(x, t + h) - c(x, t - h)) / (2 * h)
    in_space = (c(x + h, t) - 2 * c(x, t) + c(x - h, t)) / h**2
    np.testing.assert_allclose(in_time, D * in_space, atol=1e-6)
    assert np.abs(in_time).max() > 0.1


@pytest.mark.equation("eq-intuition-heat")
def test_independent_moves_add_up_to_the_gaussian():
    D, a, generator = 0.3, -0.4, np.random.default_rng(1)
    x = a + math.sqrt(2 * D * 0.1) * generator.standard_normal((20_000, 10)).sum(1)  # ten moves, until time 1
    assert stats.kstest(x, stats.norm(a, math.sqrt(2 * D * 1.0)).cdf).pvalue > 1e-3


@pytest.mark.equation("eq-intuition-mirror")
def test_the_concentration_in_the_glass_is_that_of_bouncing_molecules():
    a, spread, n, generator = 0.6, 0.9, 40_000, np.random.default_rng(2)
    x = [bounced(a, move) for move in spread * generator.standard_normal(n)]
    edges = np.linspace(-1, 1, 21)
    fine = (edges[:-1, None] + (np.arange(200) + 0.5) / 2000).ravel()
    free = stats.norm(a, spread).pdf
    glass = sum(free(fine + 4 * m) + free(2 - fine + 4 * m) for m in range(-4, 5))
    expected = n * glass.reshape(20, 200).mean(1) * 0.1
    assert expected.sum() == pytest.approx(n, rel=1e-5)
    assert stats.chisquare(np.histogram(x, edges)[0], expected * n / expected.sum()).pvalue > 1e-3


@pytest.mark.equation("eq-intuition-forget")
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_the_side_of_the_drop_is_forgotten_exponentially(t):
    """The heat equation with walls, by finite differences: a random walk on cells that stays where it would leave."""
    D, cells = 0.3, 200
    width = 2 / cells
    centres = -1 + width * (np.arange(cells) + 0.5)
    laplace = -2 * np.eye(cells) + np.eye(cells, k=1) + np.eye(cells, k=-1)
    laplace[0, 0] = laplace[-1, -1] = -1
    values, vectors = np.linalg.eigh(D * laplace / width**2)
    c = stats.norm.pdf(centres, -0.5, 0.1)
    later = vectors @ (np.exp(values * t) * (vectors.T @ c))
    witness = np.sin(math.pi * centres / 2)
    assert later.sum() == pytest.approx(c.sum())
    assert (witness @ later) / (witness @ c) == pytest.approx(math.exp(-(math.pi**2) * D * t / 4), rel=1e-3)


@pytest.mark.equation("eq-intuition-spring")
@pytest.mark.parametrize("start", ["point", "coin", "wide"])
def test_the_spring_forgets_mean_and_variance(start):
    beta, t, n, generator = 0.07, 25, 100_000, np.random.default_rng(3)
    x = {
        "point": np.full(n, 2.0),
        "coin": generator.choice([-1.0, 4.0], n),
        "wide": generator.uniform(-9, 3, n),
    }[start]
    mean, variance = x.mean(), x.var()
    schedule, x = Schedule([beta] * t), torch.tensor(x)
    for i in range(1, t + 1):
        x = schedule.q_step(x, i, torch.tensor(generator.standard_normal(n)))
    assert float(x.mean()) == pytest.approx((1 - beta) ** (t / 2) * mean, abs=0.015)
    assert float(x.var()) - 1 == pytest.approx((1 - beta) ** t * (variance - 1), abs=0.03)


# One molecule


@pytest.mark.equation("eq-intuition-kicks")
@pytest.mark.parametrize("values", [[-1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 1.0]])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_excess_kurtosis_of_a_sum_falls_as_one_over_n(values, n):
    """All outcomes, one by one."""
    sums = np.array([sum(outcome) for outcome in itertools.product(values, repeat=n)])
    assert stats.kurtosis(sums) == pytest.approx(stats.kurtosis(values) / n, abs=1e-12)


# The film backwards


@pytest.mark.equation("eq-intuition-bayes")
def test_bayes_rule_counts_where_molecules_came_from():
    beta, x_t, generator = 0.4, 0.2, np.random.default_rng(4)
    k = generator.choice(3, 1_000_000, p=[0.3, 0.5, 0.2])
    before = np.array([-1.2, 0.4, 1.5])[k] + np.sqrt([0.1, 0.2, 0.05])[k] * generator.standard_normal(len(k))
    after = math.sqrt(1 - beta) * before + math.sqrt(beta) * generator.standard_normal(len(k))
    came_from = before[np.abs(after - x_t) < 0.01]
    edges = np.linspace(-1.8, 1.8, 13)
    law = DROPS.reverse(torch.tensor([x_t], dtype=torch.float64), 1, 0, Schedule([beta]))
    product = torch.tensor(drops(GRID) * stats.norm.pdf(x_t, math.sqrt(1 - beta) * GRID, math.sqrt(beta)))
    bayes = product / float(DROPS.noised(1 - beta).log_prob(torch.tensor([[x_t]], dtype=torch.float64)).exp())
    torch.testing.assert_close(law.log_prob(torch.tensor(GRID)[:, None]).exp(), bayes, rtol=0, atol=1e-9)
    share = [float(bayes[(a <= GRID) & (b > GRID)].sum()) * STEP for a, b in itertools.pairwise(edges)]
    expected = np.array([*share, 1 - sum(share)]) * len(came_from)
    counted = np.histogram(came_from, edges)[0]
    counted = np.array([*counted, len(came_from) - counted.sum()])
    assert stats.chisquare(counted, expected).pvalue > 1e-3


@pytest.mark.equation("eq-intuition-drift")
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.8])
@pytest.mark.parametrize("x_t", [-1.7, 0.1, 0.9])
def test_the_centre_of_the_way_back_is_the_drift(beta, x_t):
    score = float(DROPS.noised(1 - beta).score(torch.tensor([[x_t]], dtype=torch.float64)))
    expected = (x_t + beta * score) / math.sqrt(1 - beta)
    assert float((GRID * way_back(x_t, beta)).sum() * STEP) == pytest.approx(expected, abs=1e-9)


@pytest.mark.equation("eq-intuition-drift")
def test_the_centre_in_the_plane():
    ring, beta, generator = GaussianMixture.ring(), 0.3, torch.Generator().manual_seed(5)
    axis = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    density = ring.log_prob(plane).exp()
    for x_t in torch.randn(3, 2, generator=generator, dtype=torch.float64):
        away = (x_t - math.sqrt(1 - beta) * plane).square().sum(1)
        joint = density * (-away / (2 * beta)).exp()
        centre = (joint[:, None] * plane).sum(0) / joint.sum()
        expected = (x_t + beta * ring.noised(1 - beta).score(x_t[None])[0]) / math.sqrt(1 - beta)
        torch.testing.assert_close(centre, expected, rtol=0, atol=1e-8)


@pytest.mark.equation("eq-intuition-width")
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.8])
@pytest.mark.parametrize("x_t", [-1.7, 0.1, 0.9])
def test_the_width_of_the_way_back(beta, x_t):
    law, h = way_back(x_t, beta), 1e-3
    mean = (GRID * law).sum() * STEP
    variance = ((GRID - mean) ** 2 * law).sum() * STEP
    left, middle, right = (math.log(density_of_x_t(x, beta)) for x in (x_t - h, x_t, x_t + h))
    curvature = (left - 2 * middle + right) / h**2
    assert variance == pytest.approx(beta / (1 - beta) * (1 + beta * curvature), rel=1e-4)


@pytest.mark.equation("eq-intuition-reversible")
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.8])
def test_in_the_final_state_both_directions_are_alike(beta):
    x_t = torch.tensor([0.7, -1.1], dtype=torch.float64)
    law = Gaussian([0.0, 0.0], torch.eye(2)).reverse(x_t, 1, 0, Schedule([beta]))
    torch.testing.assert_close(law.mean, math.sqrt(1 - beta) * x_t)
    torch.testing.assert_close(law.covariance, beta * torch.eye(2, dtype=torch.float64))
    joint = stats.norm.pdf(GRID) * stats.norm.pdf(0.7, math.sqrt(1 - beta) * GRID, math.sqrt(beta))
    forwards = stats.norm.pdf(GRID, math.sqrt(1 - beta) * 0.7, math.sqrt(beta))
    np.testing.assert_allclose(joint / (joint.sum() * STEP), forwards, atol=1e-9)


# The chain


def backwards_coefficients(beta: list[float], variance: float) -> list[tuple[float, float]]:
    """For data N(0, variance): factor of x_t and variance of each exact step back, by regression of Gaussians."""
    steps, v = [], variance
    for b in beta:
        after = (1 - b) * v + b
        factor = math.sqrt(1 - b) * v / after
        steps.append((factor, v - factor**2 * after))
        v = after
    return steps


@pytest.mark.equation("eq-intuition-chain")
def test_the_chain_of_steps_back_is_the_law_of_the_film():
    """Data N(0, 1): the model with exact steps has the joint density of the forward walk, evaluated as one Gaussian."""
    beta, generator = [0.1, 0.3, 0.6], np.random.default_rng(6)
    film = generator.standard_normal((5, 4))
    log_model = stats.norm.logpdf(film[:, 3])
    for t, (factor, variance) in enumerate(backwards_coefficients(beta, 1.0), start=1):
        log_model += stats.norm.logpdf(film[:, t - 1], factor * film[:, t], math.sqrt(variance))
    alpha_bar = np.cumprod([1.0, *(1 - np.array(beta))])
    covariance = [[math.sqrt(alpha_bar[max(s, t)] / alpha_bar[min(s, t)]) for s in range(4)] for t in range(4)]
    np.testing.assert_allclose(log_model, stats.multivariate_normal(cov=covariance).logpdf(film), atol=1e-10)


@pytest.mark.equation("eq-intuition-latent")
def test_summing_out_the_latent_variables_leaves_the_law_of_the_data():
    """Three steps, exact ways back from DROPS: the integral over x_1, x_2, x_3 is the density of the data."""
    schedule, grid = Schedule([0.5, 0.8, 0.999]), torch.linspace(-6, 6, 151, dtype=torch.float64)
    dx = float(grid[1] - grid[0])
    p = torch.tensor(stats.norm.pdf(grid))
    for t in (3, 2, 1):
        steps = [DROPS.reverse(x_t[None], t, t - 1, schedule).log_prob(grid[:, None]).exp() for x_t in grid]
        p = p @ torch.stack(steps) * dx
    np.testing.assert_allclose(p, drops(grid.numpy()), atol=2e-3)  # x_3 is standard normal up to its last traces


@pytest.mark.equation("eq-intuition-latent")
def test_drawing_the_whole_chain_and_looking_at_x_0_only():
    """Gaussian data of variance 0.25: draws of the chain, of which only x_0 is kept."""
    beta, generator = [0.2, 0.5, 0.9, 0.99], np.random.default_rng(7)
    x = generator.standard_normal(100_000)
    steps = backwards_coefficients(beta, 0.25)
    variance = 1.0
    for factor, step in reversed(steps):
        x = factor * x + math.sqrt(step) * generator.standard_normal(len(x))
        variance = factor**2 * variance + step
    assert variance == pytest.approx(0.25, abs=1e-3)
    assert stats.kstest(x, stats.norm(0, 0.5).cdf).pvalue > 1e-3
