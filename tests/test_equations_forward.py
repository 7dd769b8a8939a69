"""Checks of the equations of the chapter "The forward process"."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ddpm_lib import GaussianMixture, Schedule

LINEAR, COSINE = Schedule.linear(), Schedule.cosine()
COARSE = Schedule(
    torch.tensor([0.05, 0.3, 0.15, 0.6, 0.4], dtype=torch.float64)
)  # five steps, large and uneven: mistakes show
N = 40_000


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fits(draws, mean, variance):
    """Whether the draws look like N(mean, variance); a right formula fails once in 10,000 seeds."""
    return stats.kstest(np.asarray(draws), "norm", (mean, math.sqrt(variance))).pvalue > 1e-4


def walk(schedule, x, t, s=0):
    """x after the single steps s + 1 .. t."""
    for step in range(s + 1, t + 1):
        x = schedule.q_step(x, step, normal(*x.shape, seed=step))
    return x


@pytest.mark.equation("eq-forward-step")
@pytest.mark.parametrize("x", [-1.0, 0.0, 0.7])
def test_one_step_has_this_law(x):
    for t, beta in enumerate([0.05, 0.3, 0.15, 0.6, 0.4], start=1):
        draws = COARSE.q_step(torch.full((N,), x, dtype=torch.float64), t, normal(N, seed=t))
        assert fits(draws, math.sqrt(1 - beta) * x, beta)


@pytest.mark.equation("eq-forward-draw")
def test_one_step_weighs_image_and_noise_by_roots():
    """Differentiated by autograd: the weights' squares are 1 - beta and beta, and they add up to 1."""
    x_prev, eps = normal(3, 4, seed=0).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    t = torch.tensor([1, 4, 5])
    by_x, by_eps = torch.autograd.grad(COARSE.q_step(x_prev, t, eps).sum(), (x_prev, eps))
    expected = torch.tensor([0.05, 0.6, 0.4], dtype=torch.float64)[:, None].expand(3, 4)
    torch.testing.assert_close(by_eps.square(), expected)
    torch.testing.assert_close(by_x.square(), 1 - expected)


@pytest.mark.equation("eq-forward-chain")
def test_product_of_steps_is_the_joint_law():
    """The product of the five densities is a Gaussian whose covariance the simulated chain shows."""
    x0, alpha = 0.8, 1 - COARSE.beta[1:].numpy()
    beta = 1 - alpha

    def log_product(path):
        before = [x0, *path[:-1]]
        return sum(stats.norm.logpdf(x, np.sqrt(a) * b, np.sqrt(v)) for x, b, a, v in zip(path, before, alpha, beta))

    x, paths = torch.full((10 * N,), x0, dtype=torch.float64), []
    for t in range(1, 6):
        x = COARSE.q_step(x, t, normal(10 * N, seed=t))
        paths.append(x)
    paths = torch.stack(paths, 1).numpy()
    joint = stats.multivariate_normal(paths.mean(0), np.cov(paths.T))
    for path in paths[:20]:
        assert log_product(path) == pytest.approx(joint.logpdf(path), abs=0.04)
    precision = np.linalg.inv(np.cov(paths.T))
    apart = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) > 1
    assert np.abs(precision[apart]).max() < 0.05 < np.abs(precision[~apart]).min()


@pytest.mark.equation("eq-forward-variance")
def test_covariance_after_a_step():
    mixing = torch.tensor([[1.5, 0.0], [-0.8, 0.4]], dtype=torch.float64)
    coins = torch.randint(0, 2, (4 * N, 2), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    before = np.array([[2.25, -1.2], [-1.2, 0.8]])  # mixing @ mixing.T, as coins have covariance I
    x = coins @ mixing.T
    for t, beta in enumerate([0.05, 0.3, 0.15, 0.6, 0.4], start=1):
        x = COARSE.q_step(x, t, normal(*x.shape, seed=t))
        before = (1 - beta) * before + beta * np.eye(2)
        np.testing.assert_allclose(torch.cov(x.T), before, atol=0.02)


@pytest.mark.equation("eq-forward-merging")
@pytest.mark.parametrize(("a", "b"), [(0.6, 0.8), (2.0, -0.5), (0.1, 0.1)])
def test_density_of_a_sum_by_convolution(a, b):
    first, second = stats.norm(0, abs(a)), stats.norm(0, abs(b))
    for x in (0.0, 0.3, -1.7):
        density, _ = integrate.quad(lambda u, x=x: first.pdf(u) * second.pdf(x - u), -12 * abs(a), 12 * abs(a))
        assert density == pytest.approx(stats.norm.pdf(x, 0, math.hypot(a, b)), rel=1e-7)


@pytest.mark.equation("eq-forward-two-steps")
def test_two_steps():
    """Line 3 holds draw by draw, line 4 in law; alpha_3 = 0.85, alpha_4 = 0.4."""
    x, eps_3, eps_4 = torch.full((N,), -0.9, dtype=torch.float64), normal(N, seed=3), normal(N, seed=4)
    draws = COARSE.q_step(COARSE.q_step(x, 3, eps_3), 4, eps_4)
    line_3 = math.sqrt(0.34) * x + math.sqrt(0.4 - 0.34) * eps_3 + math.sqrt(0.6) * eps_4
    torch.testing.assert_close(draws, line_3)
    assert fits(draws, -0.9 * math.sqrt(0.34), 1 - 0.34)


@pytest.mark.equation("eq-forward-alpha-bar")
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, COARSE])
def test_alpha_bar_is_the_running_product(schedule):
    """Multiplied in exact rational arithmetic."""
    product = Fraction(1)
    assert schedule.alpha_bar[0] == 1
    for t in range(1, schedule.T + 1):
        if t <= 30:
            product *= 1 - Fraction(float(schedule.beta[t]))
            assert float(schedule.alpha_bar[t]) == pytest.approx(float(product), rel=1e-13)
    logs = np.log1p(-schedule.beta.numpy())
    np.testing.assert_allclose(schedule.alpha_bar, [math.exp(math.fsum(logs[: t + 1])) for t in range(schedule.T + 1)])
    assert schedule.alpha_bar.dtype == torch.float64
    assert len(schedule.alpha_bar) == schedule.T + 1


@pytest.mark.equation("eq-forward-closed-form")
@pytest.mark.parametrize("t", [1, 2, 5])
def test_single_steps_arrive_at_the_closed_form(t):
    product = math.prod([0.95, 0.7, 0.85, 0.4, 0.6][:t])
    x0 = torch.full((N,), 1.3, dtype=torch.float64)
    assert fits(walk(COARSE, x0, t), 1.3 * math.sqrt(product), 1 - product)
    assert fits(COARSE.q_sample(x0, t, normal(N, seed=9)), 1.3 * math.sqrt(product), 1 - product)


@pytest.mark.equation("eq-forward-closed-form")
def test_closed_form_after_a_thousand_steps():
    """The mean by noiseless steps, the variance by its own recursion: no sampling error."""
    x, variance = torch.ones(1, dtype=torch.float64), 0.0
    for t in range(1, LINEAR.T + 1):
        x = LINEAR.q_step(x, t, torch.zeros_like(x))
        variance = (1 - float(LINEAR.beta[t])) * variance + float(LINEAR.beta[t])
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        assert float(LINEAR.q_sample(one, t, zero)) == pytest.approx(float(x), rel=1e-11)
        assert float(LINEAR.q_sample(zero, t, one)) == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.equation("eq-forward-unrolled")
def test_walk_is_a_weighted_sum_of_its_noises():
    t, x0 = 400, normal(1, 6, seed=0)
    eps = normal(t + 1, 6, seed=1)
    x, expected = x0, math.sqrt(float(LINEAR.alpha_bar[t])) * x0[0]
    for s in range(1, t + 1):
        x = LINEAR.q_step(x, s, eps[s : s + 1])
    squares = 0.0
    for s in range(1, t + 1):
        square = float(LINEAR.beta[s]) * float(LINEAR.alpha_bar[t]) / float(LINEAR.alpha_bar[s])
        expected, squares = expected + math.sqrt(square) * eps[s], squares + square
    torch.testing.assert_close(x[0], expected, rtol=0, atol=1e-12)
    assert squares == pytest.approx(1 - float(LINEAR.alpha_bar[t]), rel=1e-12)


@pytest.mark.equation("eq-forward-snr")
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, COARSE])
def test_snr_is_power_of_image_over_power_of_noise(schedule):
    """Measured on what q_sample makes of an image without noise and of a noise without image, both of mean square 1."""
    unit, zero = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(1, schedule.T + 1):
        image, noise = schedule.q_sample(unit, t, zero), schedule.q_sample(zero, t, unit)
        assert float(image.square().mean() / noise.square().mean()) == pytest.approx(float(schedule.snr[t]), rel=1e-9)
    assert (schedule.snr.diff() < 0).all()


@pytest.mark.equation("eq-forward-jump")
@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 5), (1, 4), (2, 5), (4, 5)])
def test_a_jump_has_the_law_of_its_steps(s, t):
    ratio = float(COARSE.alpha_bar[t] / COARSE.alpha_bar[s])
    start = torch.full((N,), -1.1, dtype=torch.float64)
    assert fits(walk(COARSE, start, t, s), -1.1 * math.sqrt(ratio), 1 - ratio)
    assert COARSE.between(t, s)[0] == pytest.approx(1 - ratio, rel=1e-12)


@pytest.mark.equation("eq-forward-semigroup")
@pytest.mark.parametrize(("r", "s", "t"), [(0, 100, 300), (200, 201, 700), (300, 600, 999)])
def test_summing_over_the_place_between(r, s, t):
    """Chapman and Kolmogorov's integral by quadrature, with densities of the library's long steps."""

    def density(x, start, t, s):
        beta, _ = LINEAR.between(t, s)
        return stats.norm.pdf(x, math.sqrt(1 - beta) * start, math.sqrt(beta))

    for start, x in ((0.8, -0.4), (-1.0, 1.5)):
        centre = math.sqrt(1 - LINEAR.between(s, r)[0]) * start
        spread = 12 * math.sqrt(LINEAR.between(s, r)[0])
        integral, _ = integrate.quad(
            lambda y, start=start, x=x: density(x, y, t, s) * density(y, start, s, r), centre - spread, centre + spread
        )
        assert integral == pytest.approx(density(x, start, t, r), rel=1e-7)


@pytest.mark.equation("eq-forward-linear")
def test_linear_schedule():
    """In exact rational arithmetic, and with the golden values of alpha_bar."""
    first, last = Fraction(1, 10_000), Fraction(2, 100)
    for t in (1, 2, 77, 500, 999, 1000):
        beta = first + Fraction(t - 1, 999) * (last - first)
        assert float(LINEAR.beta[t]) == pytest.approx(float(beta), rel=1e-12)
    assert LINEAR.T == 1000
    assert float(LINEAR.alpha_bar[500]) == pytest.approx(0.07858724288, rel=1e-9)
    assert float(LINEAR.alpha_bar[1000]) == pytest.approx(4.0358297653756754e-05, rel=1e-12)


@pytest.mark.equation("eq-forward-cosine")
def test_cosine_schedule():
    """By the half-angle formula, cos^2(a) = (1 + cos 2a) / 2, and with golden values."""
    f = (1 + np.cos(np.pi * (np.arange(1001) / 1000 + 0.008) / 1.008)) / 2
    np.testing.assert_allclose(COSINE.alpha_bar[:-1], f[:-1] / f[0], rtol=1e-9)
    assert float(COSINE.beta[1]) == pytest.approx(4.128422e-05, rel=1e-6)
    assert [t for t in range(1, 1001) if COSINE.beta[t] == 0.999] == [1000]
    assert float(COSINE.alpha_bar[1000]) == pytest.approx(float(COSINE.alpha_bar[999]) * 0.001, rel=1e-12)
    assert float(COSINE.alpha_bar[1000]) == pytest.approx(2.42877e-09, rel=1e-5)


@pytest.mark.equation("eq-forward-prior")
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_distance_from_pure_noise(t):
    x0 = normal(64, seed=0) * 0.3 - 0.4
    m, alpha_bar = float(x0.square().mean()), float(LINEAR.alpha_bar[t])
    formula = (alpha_bar * (m - 1) - math.log1p(-alpha_bar)) / (2 * math.log(2))
    q = torch.distributions.Normal(LINEAR.signal[t] * x0, LINEAR.noise[t])
    p = torch.distributions.Normal(torch.zeros(64).double(), torch.ones(64).double())
    nats = torch.distributions.kl_divergence(q, p).sum()
    assert float(nats) / (64 * math.log(2)) == pytest.approx(formula, rel=1e-6)


@pytest.mark.equation("eq-forward-prior")
def test_distance_from_pure_noise_by_quadrature_and_golden():
    def integrand(x, mean, deviation):
        log_q = stats.norm.logpdf(x, mean, deviation)
        return math.exp(log_q) * (log_q - stats.norm.logpdf(x)) / math.log(2)

    alpha_bar = float(LINEAR.alpha_bar[400])
    mean, deviation = math.sqrt(alpha_bar) * 0.9, math.sqrt(1 - alpha_bar)
    bits, _ = integrate.quad(integrand, -12, 12, (mean, deviation), epsabs=1e-12)
    assert bits == pytest.approx((alpha_bar * (0.81 - 1) - math.log1p(-alpha_bar)) / (2 * math.log(2)), rel=1e-8)
    end = float(LINEAR.alpha_bar[1000])
    assert (end * (0.25 - 1) - math.log1p(-end)) / (2 * math.log(2)) == pytest.approx(7.2787e-06, rel=1e-5)


@pytest.mark.equation("eq-forward-cumulants")
@pytest.mark.parametrize("t", [1, 3, 5])
def test_cumulants_shrink_by_powers(t):
    """x0 is 2 with probability 0.2, else -0.5; moments of x_t by exact (Gauss-Hermite) integration over the noise."""
    eps, weight = np.polynomial.hermite_e.hermegauss(20)
    weight = torch.from_numpy(weight / weight.sum())
    values = {2.0: 0.2, -0.5: 0.8}

    def moment(n):
        eps_t = torch.from_numpy(eps)
        return sum(
            p * float((weight * COARSE.q_sample(torch.full_like(eps_t, x), t, eps_t) ** n).sum())
            for x, p in values.items()
        )

    p, step = 0.2, 2.5  # the cumulants of step * Bernoulli(p): third and fourth
    third = step**3 * p * (1 - p) * (1 - 2 * p)
    fourth = step**4 * p * (1 - p) * (1 - 6 * p * (1 - p))
    alpha_bar = math.prod([0.95, 0.7, 0.85, 0.4, 0.6][:t])
    assert moment(1) == pytest.approx(0, abs=1e-12)
    assert moment(3) == pytest.approx(alpha_bar**1.5 * third, rel=1e-9)
    assert moment(4) - 3 * moment(2) ** 2 == pytest.approx(alpha_bar**2 * fourth, rel=1e-9)


@pytest.mark.equation("eq-forward-information")
def test_information_left_of_gaussian_data():
    """Data N(0, v) keep 0.5 log2(1 + v SNR) bits (Shannon): the equation's mean of logarithms must find them."""
    v, law = 2.0, GaussianMixture([1.0], [[0.0]], [2.0])
    x0 = law.sample(10 * N, torch.Generator().manual_seed(0))
    for t in (1, 3, 5):
        alpha_bar = float(COARSE.alpha_bar[t])
        x_t = COARSE.q_sample(x0, t, normal(*x0.shape, seed=t))
        log_given = stats.norm.logpdf(x_t[:, 0], math.sqrt(alpha_bar) * x0[:, 0], math.sqrt(1 - alpha_bar))
        bits = (log_given - law.noised(alpha_bar).log_prob(x_t).numpy()).mean() / math.log(2)
        assert bits == pytest.approx(0.5 * math.log2(1 + v * float(COARSE.snr[t])), abs=0.01)


@pytest.mark.equation("eq-forward-reader")
def test_probabilities_of_the_origin():
    """Simulated: among draws of x_t that fall near a place, count where they came from."""
    atoms = torch.tensor([[-1.0, 0.2], [0.5, 0.9], [0.8, -1.0]], dtype=torch.float64)
    origin = torch.randint(0, 3, (50 * N,), generator=torch.Generator().manual_seed(0))
    t, place = 3, torch.tensor([0.1, 0.2], dtype=torch.float64)
    x_t = COARSE.q_sample(atoms[origin], t, normal(50 * N, 2, seed=1))
    near = origin[(x_t - place).norm(dim=1) < 0.1]
    counted = np.bincount(near, minlength=3) / len(near)
    alpha_bar = 0.95 * 0.7 * 0.85
    distance = ((place - math.sqrt(alpha_bar) * atoms) ** 2).sum(1)
    np.testing.assert_allclose(torch.softmax(-distance / (2 * (1 - alpha_bar)), 0), counted, atol=0.02)
    by_library = GaussianMixture(torch.ones(3), atoms, torch.zeros(3)).noised(alpha_bar).responsibilities(place[None])
    torch.testing.assert_close(by_library[0], torch.softmax(-distance / (2 * (1 - alpha_bar)), 0))


@pytest.mark.equation("eq-forward-continuous")
def test_many_steps_become_an_exponential():
    """The gap closes as 1/T with the constant of the text, and the SDE's moments solve their differential equations."""

    def exponential(u):
        return math.exp(-(0.1 * u + 19.9 * u**2 / 2))

    for T in (2000, 4000, 8000):
        schedule = Schedule.linear(T)
        gaps = [math.log(exponential(u) / float(schedule.alpha_bar[int(u * T)])) for u in (0.5, 1.0)]
        assert T * gaps[1] == pytest.approx(0.5 * integrate.quad(lambda u: (0.1 + 19.9 * u) ** 2, 0, 1)[0], rel=0.02)
        assert abs(gaps[0]) < 20 / T
    moments = integrate.solve_ivp(
        lambda u, y: (0.1 + 19.9 * u) * np.array([-0.5 * y[0], 1 - y[1]]), (0, 0.6), [1.0, 0.0], rtol=1e-10, atol=1e-12
    ).y[:, -1]
    assert moments[0] == pytest.approx(math.sqrt(exponential(0.6)), rel=1e-6)
    assert moments[1] == pytest.approx(1 - exponential(0.6), rel=1e-6)
