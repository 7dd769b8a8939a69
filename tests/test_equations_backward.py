"""The equations of the chapter on the backward process, each against an independent computation."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.distributions import Laplace, MultivariateNormal, Normal, kl_divergence

from ddpm_lib import Gaussian, GaussianMixture, Prediction, Schedule, step, transition

SHORT = Schedule.linear(T=50)
STEPS = [(2, 1), (3, 2), (15, 14), (50, 49), (15, 4), (50, 1), (50, 30)]
WORLD = GaussianMixture([0.4, 0.6], [[-1.0], [0.6]], [0.09, 0.09])
# The same world for computations that do not go through ddpm_lib: weights, means, variances.
WEIGHTS, MEANS, VARIANCES = np.array([0.4, 0.6]), np.array([-1.0, 0.6]), np.array([0.09, 0.09])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(low: float, high: float, n: int) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def log_normal(x, mean, variance):
    """Log density of a normal law, in numpy."""
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def alpha_bar(t: int, schedule: Schedule = SHORT) -> float:
    """The signal left after t steps, multiplied up from beta alone."""
    return math.prod(1 - float(beta) for beta in schedule.beta[1 : t + 1])


def conditioned(t: int, s: int, x_t: float, x0: float, schedule: Schedule = SHORT) -> tuple[float, float]:
    """Mean and variance of x_s given x_t and x_0: run the chain as a joint Gaussian of x_1 .. x_t, then condition."""
    mean, maps = x0, np.zeros((t + 1, t + 1))
    means = [x0]
    for i in range(1, t + 1):
        beta = float(schedule.beta[i])
        maps[i] = math.sqrt(1 - beta) * maps[i - 1]
        maps[i, i] = math.sqrt(beta)
        mean = math.sqrt(1 - beta) * mean
        means.append(mean)
    covariance = maps @ maps.T
    gain = covariance[s, t] / covariance[t, t]
    return means[s] + gain * (x_t - means[t]), covariance[s, s] - gain * covariance[s, t]


def world_log_prob(x: np.ndarray, signal2: float) -> np.ndarray:
    """Log density of WORLD noised to alpha_bar = signal2."""
    parts = log_normal(x[..., None], math.sqrt(signal2) * MEANS, signal2 * VARIANCES + 1 - signal2)
    return np.logaddexp.reduce(parts + np.log(WEIGHTS), axis=-1)


def x0_given(x_t: float, signal2: float) -> tuple[np.ndarray, np.ndarray]:
    """A grid of x0 and the probabilities of its points given x_t, in WORLD."""
    x0 = np.linspace(-3, 3, 6001)
    log_joint = world_log_prob(x0, 1.0) + log_normal(x_t, math.sqrt(signal2) * x0, 1 - signal2)
    weights = np.exp(log_joint - log_joint.max())
    return x0, weights / weights.sum()


@pytest.mark.equation("eq-backward-model")
def test_the_model_draws_from_a_round_gaussian(generator):
    x_t, eps = tensor(0.3, -1.2), tensor(0.5, -0.4)
    t, n = 15, 200_000
    prediction = Prediction.of("eps", eps.expand(n, 2), x_t.expand(n, 2), t, SHORT)
    beta, a_bar = float(SHORT.beta[t]), alpha_bar(t)
    mean = (x_t - beta / math.sqrt(1 - a_bar) * eps) / math.sqrt(1 - beta)
    beta_tilde = beta * (1 - alpha_bar(t - 1)) / (1 - a_bar)
    for variance, value in (("beta", beta), ("beta_tilde", beta_tilde)):
        z = (step(prediction, t, t - 1, SHORT, variance=variance, generator=generator) - mean) / math.sqrt(value)
        assert torch.allclose(z.mean(0), torch.zeros(2, dtype=z.dtype), atol=0.01)
        assert torch.allclose(z.T.cov(), torch.eye(2, dtype=z.dtype), atol=0.015)
        assert torch.allclose((z**4).mean(0), tensor(3, 3), atol=0.1)


@pytest.mark.equation("eq-backward-average")
@pytest.mark.parametrize(("t", "s"), [(3, 2), (15, 14), (40, 10)])
def test_the_reverse_step_is_an_average_of_posteriors(t, s):
    x_t, x = 0.2, np.linspace(-2.5, 2.5, 41)
    x0, weights = x0_given(x_t, alpha_bar(t))
    c0, ct, variance = SHORT.posterior_coefficients(t, s)
    averaged = np.exp(log_normal(x[:, None], c0 * x0 + ct * x_t, variance)) @ weights
    exact = WORLD.reverse(tensor(x_t), t, s, SHORT).log_prob(torch.tensor(x)[:, None]).exp()
    np.testing.assert_allclose(averaged, exact, atol=1e-6)


@pytest.mark.equation("eq-backward-bayes")
@pytest.mark.parametrize("t", [2, 15, 50])
def test_bayes_gives_the_density_of_the_conditioned_chain(t):
    x0, x_t, x = 0.8, -0.3, np.linspace(-3, 3, 61)
    before, after = alpha_bar(t - 1), alpha_bar(t)
    beta = float(SHORT.beta[t])
    quotient = (
        log_normal(x_t, math.sqrt(1 - beta) * x, beta)
        + log_normal(x, math.sqrt(before) * x0, 1 - before)
        - log_normal(x_t, math.sqrt(after) * x0, 1 - after)
    )
    np.testing.assert_allclose(quotient, log_normal(x, *conditioned(t, t - 1, x_t, x0)), rtol=1e-9)


@pytest.mark.equation("eq-backward-abc")
@pytest.mark.parametrize("t", [2, 15, 50])
def test_the_exponent_is_the_parabola_of_a_b_c(t):
    x0, x_t, x = 0.8, -0.3, np.linspace(-2, 2, 9)
    alpha, before = 1 - float(SHORT.beta[t]), alpha_bar(t - 1)
    scale = np.log(2 * np.pi * (1 - alpha)) + np.log(2 * np.pi * (1 - before))
    logs = log_normal(x_t, math.sqrt(alpha) * x, 1 - alpha) + log_normal(x, math.sqrt(before) * x0, 1 - before)
    A = alpha / (1 - alpha) + 1 / (1 - before)
    B = -2 * (math.sqrt(alpha) / (1 - alpha) * x_t + math.sqrt(before) / (1 - before) * x0)
    C = x_t**2 / (1 - alpha) + before * x0**2 / (1 - before)
    np.testing.assert_allclose(np.polyfit(x, -2 * logs - scale, 2), [A, B, C], rtol=1e-8)


@pytest.mark.equation("eq-backward-vertex")
@pytest.mark.parametrize(("A", "B", "C"), [(9.5, 2.9, 0.4), (1.3, -4.0, 7.0), (40.0, 0.0, -2.0)])
def test_a_parabola_in_the_exponent_has_this_mean_and_variance(A, B, C):
    x = np.linspace(-12, 12, 200_001)
    density = np.exp(-0.5 * (A * x**2 + B * x + C))
    density /= density.sum()
    mean = density @ x
    np.testing.assert_allclose([mean, density @ (x - mean) ** 2], [-B / (2 * A), 1 / A], rtol=1e-9, atol=1e-12)


@pytest.mark.equation("eq-backward-mean-x0")
@pytest.mark.equation("eq-backward-variance")
@pytest.mark.parametrize("t", [1, 2, 3, 15, 50])
def test_the_posterior_is_the_conditioned_chain(t):
    for x_t, x0 in ((-0.3, 0.8), (1.7, -1.0), (0.0, 0.5)):
        mean, variance = SHORT.posterior(tensor(x_t), tensor(x0), t)
        expected_mean, expected_variance = conditioned(t, t - 1, x_t, x0)
        assert mean.item() == pytest.approx(expected_mean, abs=1e-12)
        assert variance == pytest.approx(expected_variance, abs=1e-12)
    assert float(SHORT.beta_tilde[t]) == pytest.approx(expected_variance, abs=1e-12)
    a, b, beta = alpha_bar(t - 1), alpha_bar(t), float(SHORT.beta[t])
    assert (1 - a) / (1 - b) * beta == pytest.approx(expected_variance, abs=1e-12)
    c0, ct = math.sqrt(a) * beta / (1 - b), math.sqrt(1 - beta) * (1 - a) / (1 - b)
    assert SHORT.posterior_coefficients(t) == pytest.approx((c0, ct, expected_variance), abs=1e-12)


@pytest.mark.equation("eq-backward-mean-x0")
@pytest.mark.equation("eq-backward-variance")
def test_least_squares_on_simulated_chains_finds_the_posterior(generator):
    n, t = 200_000, 15
    x0 = torch.randint(0, 2, (n,), generator=generator) * 1.6 - 1.0
    x_t = x0
    for i in range(1, t + 1):
        x_prev = x_t
        x_t = SHORT.q_step(x_prev, i, torch.randn(n, generator=generator))
    design = torch.stack([x0, x_t], 1)
    fit = torch.linalg.lstsq(design, x_prev).solution
    error = (x_prev - design @ fit).var()
    assert torch.stack([*fit, error]).tolist() == pytest.approx(SHORT.posterior_coefficients(t), abs=4e-3)


@pytest.mark.equation("eq-backward-variance")
def test_golden_values_of_the_papers_schedule(linear):
    assert linear.beta_tilde[1] == 0
    assert linear.beta_tilde[[2, 3, 1000]].tolist() == pytest.approx(
        [5.4531876613e-05, 8.5489115e-05, 0.0199999835], rel=1e-7
    )
    assert linear.posterior_log_variance[1] == linear.posterior_log_variance[2]
    assert linear.posterior_log_variance[1].item() == pytest.approx(math.log(5.4531876613e-05), rel=1e-9)


@pytest.mark.equation("eq-backward-general")
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_any_step_back_is_the_conditioned_chain(t, s):
    x_t, x0 = -0.3, 0.8
    mean, variance = SHORT.posterior(tensor(x_t), tensor(x0), t, s)
    expected = conditioned(t, s, x_t, x0)
    assert (mean.item(), variance) == pytest.approx(expected, abs=1e-12)
    ratio = alpha_bar(t) / alpha_bar(s)
    c0 = math.sqrt(alpha_bar(s)) * (1 - ratio) / (1 - alpha_bar(t))
    ct = math.sqrt(ratio) * (1 - alpha_bar(s)) / (1 - alpha_bar(t))
    beta_tilde = (1 - alpha_bar(s)) / (1 - alpha_bar(t)) * (1 - ratio)
    assert (c0 * x0 + ct * x_t, beta_tilde) == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("eq-backward-mean-eps")
@pytest.mark.parametrize("t", [1, 2, 15, 50])
def test_the_mean_in_terms_of_the_noise(t, generator):
    x0 = torch.randn(64, dtype=torch.float64, generator=generator)
    eps = torch.randn(64, dtype=torch.float64, generator=generator)
    beta, a_bar = float(SHORT.beta[t]), alpha_bar(t)
    x_t = math.sqrt(a_bar) * x0 + math.sqrt(1 - a_bar) * eps
    written = (x_t - beta / math.sqrt(1 - a_bar) * eps) / math.sqrt(1 - beta)
    chain = torch.tensor([conditioned(t, t - 1, float(a), float(b))[0] for a, b in zip(x_t, x0)])
    library, _ = transition(Prediction.of("eps", eps, x_t, t, SHORT), t, t - 1, SHORT)
    assert torch.allclose(written, chain.double(), atol=1e-6)
    assert torch.allclose(written, library, atol=1e-12)
    assert torch.allclose(written, SHORT.posterior(x_t, x0, t)[0], atol=1e-12)


@pytest.mark.equation("eq-backward-mean-v")
@pytest.mark.parametrize("t", [2, 15, 50])
def test_the_mean_in_terms_of_the_velocity(t, generator):
    x_t, v = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    beta, before, after = float(SHORT.beta[t]), alpha_bar(t - 1), alpha_bar(t)
    written = math.sqrt(1 - beta) * x_t - math.sqrt(before) * beta / math.sqrt(1 - after) * v
    library, _ = transition(Prediction.of("v", v, x_t, t, SHORT), t, t - 1, SHORT)
    assert torch.allclose(written, library, atol=1e-12)


@pytest.mark.equation("eq-backward-answer-key")
@pytest.mark.parametrize("p", [Normal(tensor(0.1), tensor(0.2)), Laplace(tensor(-0.2), tensor(0.3))])
def test_training_on_the_answer_key_adds_a_constant(p):
    points = GaussianMixture([0.5, 0.3, 0.2], [[-0.1], [0.1], [0.3]], [0.0, 0.0, 0.0])
    t, x_t, x = 2, 0.12, grid(-1.5, 1.5, 12_001)
    dx = float(x[1] - x[0])
    a_bar, log_p = alpha_bar(t), p.log_prob(x)
    behind = torch.softmax(points.weights.log() - (x_t - a_bar**0.5 * points.means[:, 0]) ** 2 / (2 * (1 - a_bar)), 0)
    keys = []
    for x0 in points.means[:, 0]:
        mean, variance = conditioned(t, t - 1, x_t, float(x0))
        keys.append(Normal(tensor(mean), tensor(math.sqrt(variance))).log_prob(x))
    key = sum(w * (log.exp() * (log - log_p)).sum() * dx for w, log in zip(behind, keys))
    log_true = points.reverse(tensor(x_t), t, t - 1, SHORT).log_prob(x[:, None])
    truth = (log_true.exp() * (log_true - log_p)).sum() * dx
    # The constant by another road: the entropy of the truth less the entropy of a posterior.
    entropy = -(log_true.exp() * log_true).sum() * dx
    information = entropy - 0.5 * math.log(2 * math.pi * math.e * variance)
    assert key - truth == pytest.approx(float(information), abs=1e-9)


@pytest.mark.equation("eq-backward-kl")
def test_the_divergence_of_two_round_gaussians(generator):
    d, a, b = 3, 0.05, 0.08
    mu, mu_theta = torch.randn(2, d, dtype=torch.float64, generator=generator)
    eye = torch.eye(d, dtype=torch.float64)
    expected = kl_divergence(MultivariateNormal(mu, a * eye), MultivariateNormal(mu_theta, b * eye))
    written = (mu - mu_theta).square().sum() / (2 * b) + d / 2 * (a / b - 1 - math.log(a / b))
    assert written.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.equation("eq-backward-weight")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("t", [2, 15, 50])
def test_the_divergence_is_a_weighted_error_of_the_noise(t, variance, generator):
    x0, eps, guess = torch.randn(3, 1, 5, dtype=torch.float64, generator=generator)
    x_t = SHORT.q_sample(x0, t, eps)
    eye = torch.eye(5, dtype=torch.float64)
    target, sigma2 = SHORT.posterior(x_t, x0, t)
    q = MultivariateNormal(target, sigma2 * eye)

    def divergence(noise):
        mean, sigma = transition(Prediction.of("eps", noise, x_t, t, SHORT), t, t - 1, SHORT, variance=variance)
        return kl_divergence(q, MultivariateNormal(mean, sigma**2 * eye)).item()

    beta, a_bar = float(SHORT.beta[t]), alpha_bar(t)
    sigma2 = beta if variance == "beta" else beta * (1 - alpha_bar(t - 1)) / (1 - a_bar)
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - a_bar))
    assert divergence(guess) - divergence(eps) == pytest.approx(weight * (eps - guess).square().sum().item(), rel=1e-9)


def coin_noise(x_t: torch.Tensor, a_bar: float) -> torch.Tensor:
    """E[eps | x_t] when x_0 is +1 or -1 with equal probability, by hand."""
    return (x_t - a_bar**0.5 * torch.tanh(a_bar**0.5 * x_t / (1 - a_bar))) / (1 - a_bar) ** 0.5


@pytest.mark.equation("eq-backward-best")
def test_the_conditional_mean_is_the_best_guess(generator):
    n, t = 400_000, 12
    a_bar = alpha_bar(t)
    x0 = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    eps = torch.randn(n, dtype=torch.float64, generator=generator)
    x_t = SHORT.q_sample(x0, t, eps)
    best = coin_noise(x_t, a_bar)
    coin = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.0, 0.0])
    assert torch.allclose(coin.denoiser(SHORT)(x_t[:, None], t).eps[:, 0], best, atol=1e-9)
    floor = (eps - best).square().mean()
    for guess in (torch.zeros_like(x_t), 0.7 * x_t, best + 0.1 * x_t, torch.sin(3 * x_t)):
        total, excess = (eps - guess).square().mean(), (best - guess).square().mean()
        assert total.item() == pytest.approx((floor + excess).item(), abs=0.01)
    powers = torch.stack([x_t**k for k in range(8)], 1)
    fitted = powers @ torch.linalg.lstsq(powers, eps).solution
    assert (eps - fitted).square().mean() > floor - 1e-4


@pytest.mark.equation("eq-backward-tweedie")
@pytest.mark.parametrize("t", [2, 12, 40])
def test_the_best_noise_is_the_score(t):
    a_bar, h = alpha_bar(t), 1e-5
    for x_t in (-1.4, -0.2, 0.3, 1.1):
        x0, weights = x0_given(x_t, a_bar)
        mean = weights @ ((x_t - math.sqrt(a_bar) * x0) / math.sqrt(1 - a_bar))
        ends = world_log_prob(np.array([x_t - h, x_t + h]), a_bar)
        from_score = -math.sqrt(1 - a_bar) * (ends[1] - ends[0]) / (2 * h)
        prediction = WORLD.denoiser(SHORT)(tensor(x_t)[None], t)
        from_x0 = (x_t - math.sqrt(a_bar) * (weights @ x0)) / math.sqrt(1 - a_bar)
        assert (from_score, from_x0, prediction.eps.item()) == pytest.approx((mean, mean, mean), abs=1e-6)
        score = WORLD.noised(a_bar).score(tensor(x_t)[None])
        assert prediction.score.item() == pytest.approx(score.item(), abs=1e-9)
        assert Prediction.of("score", score, tensor(x_t)[None], t, SHORT).eps.item() == pytest.approx(mean, abs=1e-6)


def gaussian_world_variance(c: float, t: int, schedule: Schedule = SHORT) -> float:
    """The formula of the book, from beta alone."""
    before, after = alpha_bar(t - 1, schedule), alpha_bar(t, schedule)
    return float(schedule.beta[t]) * (1 - before + before * c**2) / (1 - after + after * c**2)


@pytest.mark.equation("eq-backward-gaussian-world")
@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, 2.0])
def test_the_variance_in_a_gaussian_world(c):
    for t in (2, 15, 50):
        exact = Gaussian([0.0], [[c**2]]).reverse(tensor(0.7), t, t - 1, SHORT).covariance.item()
        assert gaussian_world_variance(c, t) == pytest.approx(exact, rel=1e-9)
    assert gaussian_world_variance(0.0, 15) == pytest.approx(float(SHORT.beta_tilde[15]), rel=1e-9)
    assert gaussian_world_variance(1.0, 15) == pytest.approx(float(SHORT.beta[15]), rel=1e-9)


@pytest.mark.equation("eq-backward-gaussian-world")
def test_the_variance_in_a_gaussian_world_by_simulation(generator):
    n, t, c = 400_000, 15, 0.3
    x_t = c * torch.randn(n, dtype=torch.float64, generator=generator)
    for i in range(1, t + 1):
        x_prev = x_t
        x_t = SHORT.q_step(x_prev, i, torch.randn(n, dtype=torch.float64, generator=generator))
    residual = x_prev - (x_prev @ x_t) / (x_t @ x_t) * x_t
    assert residual.var().item() == pytest.approx(gaussian_world_variance(c, t), rel=0.01)


@pytest.mark.equation("eq-backward-total-variance")
@pytest.mark.parametrize("t", [2, 15, 40])
def test_the_variance_is_that_of_the_posterior_and_of_the_ignorance(t):
    beta, before, after = float(SHORT.beta[t]), alpha_bar(t - 1), alpha_bar(t)
    for x_t in (-1.1, -0.2, 0.5):
        x0, weights = x0_given(x_t, after)
        ignorance = weights @ (x0 - weights @ x0) ** 2
        written = beta * (1 - before) / (1 - after) + (math.sqrt(before) * beta / (1 - after)) ** 2 * ignorance
        exact = WORLD.reverse(tensor(x_t), t, t - 1, SHORT).covariance.item()
        assert written == pytest.approx(exact, rel=1e-6)


@pytest.mark.equation("eq-backward-total-variance")
def test_the_covariance_in_two_dimensions():
    world = GaussianMixture([0.3, 0.7], [[-0.5, 0.2], [0.4, 0.1]], [[[0.1, 0.05], [0.05, 0.2]], [[0.02, 0], [0, 0.3]]])
    t, x_t = 15, tensor(0.1, -0.4)
    axis = grid(-3, 3, 301)
    x0 = torch.cartesian_prod(axis, axis)
    weights = torch.softmax(
        world.log_prob(x0) - (x_t - alpha_bar(t) ** 0.5 * x0).square().sum(1) / (2 - 2 * alpha_bar(t)), 0
    )
    c0, _, beta_tilde = SHORT.posterior_coefficients(t)
    off = x0 - weights @ x0
    written = beta_tilde * torch.eye(2, dtype=torch.float64) + c0**2 * (weights * off.T) @ off
    assert torch.allclose(written, world.reverse(x_t, t, t - 1, SHORT).covariance, atol=1e-6)


def noise_floor(world: GaussianMixture, t: int) -> float:
    """The loss of the perfect noise predictor at step t in a one-dimensional world: 1 - (1 - alpha_bar) E[score^2]."""
    x_t = grid(-6, 6, 4001)[:, None]
    noised = world.noised(alpha_bar(t))
    weight = noised.log_prob(x_t).exp()
    return 1 - (1 - alpha_bar(t)) * float((weight * noised.score(x_t)[:, 0] ** 2).sum() / weight.sum())


def best_variance(world: GaussianMixture, t: int) -> float:
    """The formula of the book for the best single variance."""
    beta, before, after = float(SHORT.beta[t]), alpha_bar(t - 1), alpha_bar(t)
    return beta * (1 - before) / (1 - after) + beta**2 / ((1 - beta) * (1 - after)) * noise_floor(world, t)


@pytest.mark.equation("eq-backward-optimal-variance")
@pytest.mark.parametrize("t", [3, 12, 40])
def test_the_best_single_variance_minimises_the_divergence(t):
    points = grid(-4, 4, 121)
    weight = WORLD.noised(alpha_bar(t)).log_prob(points[:, None]).exp()
    weight /= weight.sum()
    u, logs, means, spreads = grid(-8, 8, 801), [], [], []
    for x_t in points:
        law = WORLD.reverse(x_t[None], t, t - 1, SHORT)
        sd = law.covariance.sqrt().item()
        logs.append(law.log_prob(law.mean + sd * u[:, None]))
        means.append(law.mean)
        spreads.append(sd)
    log_q, sd = torch.stack(logs), torch.tensor(spreads, dtype=torch.float64)[:, None]
    density = log_q.exp() * sd * (u[1] - u[0])

    def divergence(variance):
        log_p = -0.5 * ((sd * u) ** 2 / variance + math.log(2 * math.pi * variance))
        return float((weight[:, None] * density * (log_q - log_p)).sum())

    beta = float(SHORT.beta[t])
    found = minimize_scalar(divergence, bounds=(0.2 * beta, 2 * beta), method="bounded", options={"xatol": 1e-9 * beta})
    assert best_variance(WORLD, t) == pytest.approx(found.x, rel=1e-4)


@pytest.mark.equation("eq-backward-optimal-variance")
def test_the_loss_of_the_perfect_predictor_tells_the_best_variance(generator):
    n, t = 200_000, 12
    x0 = WORLD.sample(n, generator)
    eps = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    loss = (eps - WORLD.denoiser(SHORT)(SHORT.q_sample(x0, t, eps), t).eps).square().mean()
    assert loss.item() == pytest.approx(noise_floor(WORLD, t), abs=0.01)


@pytest.mark.equation("eq-backward-bounds")
@pytest.mark.parametrize("t", [2, 5, 12])
def test_the_best_single_variance_lies_between_the_papers_two(t, generator):
    low, high = float(SHORT.beta_tilde[t]), float(SHORT.beta[t])
    for _ in range(10):
        weights = torch.rand(4, generator=generator) + 0.05
        means = torch.randn(4, 1, generator=generator, dtype=torch.float64)
        raw = GaussianMixture(weights, means, torch.rand(4, generator=generator))
        scale = raw.covariance.item() ** -0.5
        world = GaussianMixture(weights, scale * (means - raw.mean), scale**2 * raw.covariances)
        assert low < best_variance(world, t) < high
    assert best_variance(Gaussian([0.4], [[0.0]]), t) == pytest.approx(low, rel=1e-6)
    assert best_variance(Gaussian([0.4], [[1.0]]), t) == pytest.approx(high, rel=1e-6)
    assert best_variance(Gaussian([0.0], [[1.5]]), t) > high


def small_step(beta: float, x_t: float = -0.1, signal2: float = 0.9) -> tuple[float, float]:
    """KL from the reverse of one step to two Gaussians of its mean: one of its variance, one of variance beta."""
    a, centre = math.sqrt(1 - beta), x_t / math.sqrt(1 - beta)
    x = centre + math.sqrt(beta) * np.linspace(-14, 14, 8001)
    log_q = world_log_prob(x, signal2) + log_normal(x_t, a * x, beta)
    dx = x[1] - x[0]
    log_q -= np.log(np.exp(log_q).sum() * dx)
    q = np.exp(log_q) * dx
    mean = q @ x
    matched = q @ (x - mean) ** 2
    return tuple(q @ (log_q - log_normal(x, mean, variance)) for variance in (matched, beta))


def log_derivatives(x: float, signal2: float = 0.9, h: float = 0.02) -> tuple[float, float]:
    """Second and third derivative of the log density of WORLD at x, by central differences of order h^4."""
    g = world_log_prob(x + h * np.arange(-3, 4), signal2)
    second = (-g[1] + 16 * g[2] - 30 * g[3] + 16 * g[4] - g[5]) / (12 * h**2)
    third = (g[0] - 8 * g[1] + 13 * g[2] - 13 * g[4] + 8 * g[5] - g[6]) / (8 * h**3)
    return second, third


@pytest.mark.equation("eq-backward-small-step")
@pytest.mark.equation("eq-backward-small-step-beta")
@pytest.mark.parametrize("x_t", [-0.4, -0.1, 0.3])
def test_the_order_and_constant_of_the_small_step_error(x_t):
    second, third = log_derivatives(x_t)
    gaps = []
    for beta in (4e-3, 1e-3):
        matched, with_beta = small_step(beta, x_t)
        shape = third**2 / 12 * beta**3
        width = (1 + second) ** 2 / 4 * beta**2
        gaps.append((abs(matched / shape - 1), abs(with_beta / width - 1)))
    (shape_far, width_far), (shape_near, width_near) = gaps
    assert shape_near < 0.1
    assert width_near < 0.1
    assert shape_near < 0.45 * shape_far  # what is left out is of one order more: a quarter of the step, of the gap
    assert width_near < 0.45 * width_far


@pytest.mark.equation("eq-backward-chain")
def test_the_divergence_of_the_chains_is_the_sum_over_steps():
    c, betas = 0.5, [0.1, 0.3, 0.4]
    slopes, sigmas = [0.8, 0.7, 0.5], [0.2, 0.4, 0.6]  # any Gaussian model of the reverse steps
    T = len(betas)
    forward = np.zeros((T + 1, T + 1))
    forward[0, 0] = c
    for t, beta in enumerate(betas, start=1):
        forward[t] = math.sqrt(1 - beta) * forward[t - 1]
        forward[t, t] = math.sqrt(beta)
    backward = np.zeros((T + 1, T + 1))
    backward[T, T] = 1
    for t in range(T, 0, -1):
        backward[t - 1] = slopes[t - 1] * backward[t]
        backward[t - 1, t - 1] = sigmas[t - 1]
    q, p = (torch.tensor(m @ m.T) for m in (forward, backward))
    zero = torch.zeros(T + 1, dtype=torch.float64)
    joint = kl_divergence(MultivariateNormal(zero, q), MultivariateNormal(zero, p)).item()
    schedule, world = Schedule(betas), Gaussian([0.0], [[c**2]])
    total = kl_divergence(Normal(0.0, q[T, T].sqrt()), Normal(0.0, tensor(1.0))).item()
    for t in range(1, T + 1):
        law = world.reverse(tensor(1.0), t, t - 1, schedule)
        slope, variance, sigma2 = law.mean.item(), law.covariance.item(), sigmas[t - 1] ** 2
        total += (slope - slopes[t - 1]) ** 2 * q[t, t].item() / (2 * sigma2)
        total += 0.5 * (variance / sigma2 - 1 - math.log(variance / sigma2))
    assert total == pytest.approx(joint, rel=1e-9)


@pytest.mark.equation("eq-backward-euler")
@pytest.mark.parametrize("b", [5.0, 10.0])
def test_the_wrong_extreme_costs_a_part_of_eulers_constant(b):
    T = 200_000
    schedule = Schedule(torch.full((T,), b / T, dtype=torch.float64))
    t = torch.arange(2, T + 1)
    left = -torch.expm1(t * math.log1p(-b / T)), -torch.expm1((t - 1) * math.log1p(-b / T))  # 1 - alpha_bar at t, t - 1

    def cost(c, choice):
        W, V = (noise + (1 - noise) * c**2 for noise in left)
        ratio = schedule.beta[t] * V / W / getattr(schedule, choice)[t]
        return 0.5 * (ratio - 1 - ratio.log()).sum().item()

    euler = sum(1 / k for k in range(1, 10**6)) - math.log(10**6) + 0.5e-6
    for c in (0.5, 1.0, 2.0):
        assert cost(c, "beta_tilde") == pytest.approx(euler / 2, abs=1e-3)
    assert cost(0.0, "beta") == pytest.approx((1 - euler) / 2, abs=1e-3)
    assert cost(1.0, "beta") == pytest.approx(0, abs=1e-9)
