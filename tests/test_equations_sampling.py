"""The equations of the chapter on sampling, each against an independent computation."""

import ast
import math
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from ddpm_lib import Gaussian, GaussianMixture, Prediction, Schedule, sample, step, timesteps, transition

CHAPTER = Path(__file__).resolve().parent.parent / "book" / "sampling.ipynb"
SCHEDULE = Schedule.linear()
ALPHA_BAR = np.cumprod(np.r_[1.0, 1 - np.linspace(1e-4, 0.02, 1000)])
BETA = np.r_[0.0, np.linspace(1e-4, 0.02, 1000)]
V_0 = 0.25
V = ALPHA_BAR * V_0 + 1 - ALPHA_BAR
GAUSSIAN = Gaussian([0.0], [[V_0]]).denoiser(SCHEDULE)
PAIRS = [(1000, 999), (600, 599), (2, 1), (1000, 700), (640, 20), (90, 10)]


def from_chapter(name):
    """A function as the chapter defines it."""
    cells = [cell.source for cell in nbformat.read(CHAPTER, as_version=4).cells if cell.cell_type == "code"]
    definition = next(
        node
        for source in cells
        if f"def {name}(" in source
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    scope = {"torch": torch, "math": math, "pairwise": pairwise, "schedule": SCHEDULE, "alpha_bar": SCHEDULE.alpha_bar}
    exec(ast.unparse(definition), scope)
    return scope[name]


def covariance(s, t):
    """Of x_s and x_t, s <= t, for Gaussian data of variance V_0: by carrying x_s through the noising steps."""
    variance = V_0
    for i in range(1, s + 1):
        variance = (1 - BETA[i]) * variance + BETA[i]
    return variance * math.prod(math.sqrt(1 - BETA[i]) for i in range(s + 1, t + 1))


def coefficients(t, s, eta, variance="beta_tilde"):
    """Weights of x0 and x_t in the mean of the step, and its sigma."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    of_x0, sigma = transition(Prediction.of("x0", one, zero, t, SCHEDULE), t, s, SCHEDULE, eta=eta, variance=variance)
    of_x_t, _ = transition(Prediction.of("x0", zero, one, t, SCHEDULE), t, s, SCHEDULE, eta=eta, variance=variance)
    return float(of_x0), float(of_x_t), sigma


def gain(t, s, eta):
    """Factor of x_t in the mean of the step, with the exact denoiser of the Gaussian world."""
    x_t = torch.ones(1, 1, dtype=torch.float64)
    return float(transition(GAUSSIAN(x_t, t), t, s, SCHEDULE, eta=eta, variance="beta_tilde")[0])


def gain_along(path, eta):
    return math.prod(gain(t, s, eta) for t, s in pairwise(path))


class Mixture:
    """A one-dimensional mixture on a grid, in numpy."""

    weights, means, variances = np.array([0.7, 0.3]), np.array([-0.5, 0.6]), np.array([0.02, 0.05])
    world = GaussianMixture(weights, means[:, None], variances)
    grid = np.linspace(-6, 6, 1201)

    def density(self, t):
        a = ALPHA_BAR[t]
        variances = a * self.variances + 1 - a
        off = self.grid[:, None] - math.sqrt(a) * self.means
        values = (self.weights / np.sqrt(2 * np.pi * variances) * np.exp(-(off**2) / 2 / variances)).sum(1)
        return values / values.sum()

    def given(self, t, s):
        """Row i: the law of x_s given that x_t is grid point i, by Bayes."""
        ratio = ALPHA_BAR[t] / ALPHA_BAR[s]
        off = self.grid[:, None] - math.sqrt(ratio) * self.grid
        joint = np.exp(-(off**2) / 2 / (1 - ratio)) * self.density(s)
        return joint / joint.sum(1, keepdims=True)

    def step_mean(self, t, s):
        x_t = torch.as_tensor(self.grid)[:, None]
        return transition(self.world.denoiser(SCHEDULE)(x_t, t), t, s, SCHEDULE)[0][:, 0].numpy()


@pytest.mark.equation("eq-sampling-mixture")
@pytest.mark.parametrize("t", [1, 100, 400, 900])
def test_the_best_denoiser_of_a_mixture_is_the_mean_by_bayes_rule(t):
    """By summing over a grid of x_0, and the library's denoiser against the same."""
    weights, means, variances = Mixture.weights, Mixture.means, Mixture.variances
    x_t, x_0 = np.linspace(-2, 2, 9)[:, None], np.linspace(-3, 3, 20_001)
    a, b = math.sqrt(ALPHA_BAR[t]), 1 - ALPHA_BAR[t]
    prior = (weights / np.sqrt(variances) * np.exp(-((x_0[:, None] - means) ** 2) / 2 / variances)).sum(1)
    exponent = -((x_t - a * x_0) ** 2) / 2 / b
    joint = prior * np.exp(exponent - exponent.max(1, keepdims=True))
    truth = (joint * x_0).sum(1) / joint.sum(1)
    V_k = a**2 * variances + b
    r = weights / np.sqrt(V_k) * np.exp(-((x_t - a * means) ** 2) / 2 / V_k)
    r /= r.sum(1, keepdims=True)
    by_formula = (r * (means + a * variances / V_k * (x_t - a * means))).sum(1)
    assert np.abs(by_formula - truth).max() < 1e-6
    assert np.abs(Mixture.world.denoiser(SCHEDULE)(torch.as_tensor(x_t), t).x0[:, 0].numpy() - truth).max() < 1e-6


@pytest.mark.equation("eq-sampling-step")
@pytest.mark.parametrize("t", [1000, 500, 2, 1])
def test_the_step_has_the_mean_of_the_reverse_law_and_fresh_noise(t):
    x_t = torch.tensor([[-1.3], [0.4]], dtype=torch.float64)
    eps = math.sqrt(1 - ALPHA_BAR[t]) / covariance(t, t) * x_t  # E[eps | x_t]: covariance over variance
    prediction = Prediction.of("eps", eps, x_t, t, SCHEDULE)
    z = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) if t > 1 else 0.0
    x = step(prediction, t, t - 1, SCHEDULE, variance="beta", generator=torch.Generator().manual_seed(0))
    by_formula = (x_t - BETA[t] / math.sqrt(1 - ALPHA_BAR[t]) * eps) / math.sqrt(1 - BETA[t]) + math.sqrt(BETA[t]) * z
    by_conditioning = covariance(t - 1, t) / covariance(t, t) * x_t + math.sqrt(BETA[t]) * z
    torch.testing.assert_close(x, by_formula, rtol=0, atol=1e-11)
    torch.testing.assert_close(x, by_conditioning, rtol=0, atol=1e-11)


@pytest.mark.equation("eq-sampling-tower")
@pytest.mark.parametrize(("t", "s"), [(900, 899), (500, 499), (900, 500), (400, 250)])
def test_the_mean_of_the_step_is_the_mean_over_all_pasts(t, s):
    mixture = Mixture()
    inside = np.abs(mixture.grid) < 3
    error = (mixture.given(t, s) @ mixture.grid - mixture.step_mean(t, s))[inside]
    assert np.abs(error).max() < 1e-6


@pytest.mark.equation("eq-sampling-total-variance")
@pytest.mark.parametrize(("t", "s"), [(500, 499), (900, 500), (400, 250)])
def test_mean_and_noise_share_the_variance(t, s):
    mixture = Mixture()
    here, law = mixture.density(t), mixture.given(t, s)
    mean = mixture.step_mean(t, s)
    noise = here @ (law @ mixture.grid**2 - (law @ mixture.grid) ** 2)
    of_data = mixture.weights @ (mixture.variances + mixture.means**2) - (mixture.weights @ mixture.means) ** 2
    truth = ALPHA_BAR[s] * of_data + 1 - ALPHA_BAR[s]
    assert here @ mean**2 - (here @ mean) ** 2 + noise == pytest.approx(truth, abs=1e-6)


@pytest.mark.equation("eq-sampling-gain")
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_factor_of_a_step_is_covariance_over_variance(t, s):
    by_formula = math.sqrt(ALPHA_BAR[t] / ALPHA_BAR[s]) * V[s] / V[t]
    assert by_formula == pytest.approx(covariance(s, t) / covariance(t, t), rel=1e-12)
    assert gain(t, s, eta=1.0) == pytest.approx(by_formula, rel=1e-11)


@pytest.mark.equation("eq-sampling-collapse")
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_without_noise_the_walk_ends_in_the_mean_given_its_start(steps):
    end = gain_along(timesteps(1000, steps), eta=1.0)
    assert end == pytest.approx(math.sqrt(ALPHA_BAR[-1]) * V_0 / V[-1], rel=1e-9)
    assert end == pytest.approx(covariance(0, 1000) / covariance(1000, 1000), rel=1e-9)


@pytest.mark.equation("eq-sampling-gaussian-variance")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("steps", [5, 40])
def test_the_variance_of_the_samples(variance, steps):
    path = timesteps(1000, steps)
    by_formula = from_chapter("gaussian_variance")(V_0, path, variance)
    carried = 1.0
    for t, s in pairwise(path):
        x_t = torch.ones(1, 1, dtype=torch.float64)
        mean, sigma = transition(GAUSSIAN(x_t, t), t, s, SCHEDULE, variance=variance)
        carried = float(mean) ** 2 * carried + sigma**2
    assert by_formula == pytest.approx(carried, rel=1e-10)
    x_T = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    x = sample(GAUSSIAN, x_T=x_T, steps=steps, variance=variance, clip=False, generator=generator)
    assert float(x.var()) == pytest.approx(by_formula, rel=4 * math.sqrt(2 / 20_000))


@pytest.mark.equation("eq-sampling-long-step")
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_a_long_step_is_many_short_ones(t, s):
    added, signal = 0.0, 1.0
    for i in range(s + 1, t + 1):
        added, signal = (1 - BETA[i]) * added + BETA[i], signal * (1 - BETA[i])
    beta, beta_tilde = SCHEDULE.between(t, s)
    assert beta == pytest.approx(added, rel=1e-10)
    assert signal == pytest.approx(ALPHA_BAR[t] / ALPHA_BAR[s], rel=1e-10)
    assert beta_tilde == pytest.approx(1 / (1 / (1 - ALPHA_BAR[s]) + signal / added), rel=1e-10)


@pytest.mark.equation("eq-sampling-long-mean")
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_mean_of_a_long_step_weighs_by_precision(t, s):
    x_t, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    prediction = Prediction.of("eps", eps, x_t, t, SCHEDULE)
    x0 = (x_t - math.sqrt(1 - ALPHA_BAR[t]) * eps) / math.sqrt(ALPHA_BAR[t])
    ratio = ALPHA_BAR[t] / ALPHA_BAR[s]
    from_x0, from_x_t = 1 / (1 - ALPHA_BAR[s]), ratio / (1 - ratio)  # precisions of x_s by x0 and by x_t
    mean = (from_x0 * math.sqrt(ALPHA_BAR[s]) * x0 + from_x_t * x_t / math.sqrt(ratio)) / (from_x0 + from_x_t)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-10, atol=0)
    torch.testing.assert_close(transition(prediction, t, s, SCHEDULE)[0], mean, rtol=1e-8, atol=1e-10)


@pytest.mark.equation("eq-sampling-family")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_every_member_of_the_family_keeps_the_marginals(t, s, eta):
    of_x0, of_x_t, sigma = coefficients(t, s, eta)
    assert of_x0 + of_x_t * math.sqrt(ALPHA_BAR[t]) == pytest.approx(math.sqrt(ALPHA_BAR[s]), rel=1e-10)
    assert of_x_t**2 * (1 - ALPHA_BAR[t]) + sigma**2 == pytest.approx(1 - ALPHA_BAR[s], rel=1e-10)


@pytest.mark.equation("eq-sampling-ddim")
@pytest.mark.parametrize(("t", "s"), [*PAIRS, (20, 0), (1, 0)])
def test_ddim_without_noise_is_a_straight_line_in_scaled_coordinates(t, s):
    x_t, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ratio = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)  # noise per signal
    scaled = x_t / math.sqrt(ALPHA_BAR[t]) + (ratio[s] - ratio[t]) * eps
    x_s = step(Prediction.of("eps", eps, x_t, t, SCHEDULE), t, s, SCHEDULE, eta=0.0)
    torch.testing.assert_close(x_s, math.sqrt(ALPHA_BAR[s]) * scaled, rtol=1e-8, atol=1e-9)


@pytest.mark.equation("eq-sampling-ddim")
def test_ddim_with_noise_has_its_three_parts():
    t, s, eta = 600, 300, 0.5
    x_t, eps = torch.randn(2, 200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    prediction = Prediction.of("eps", eps, x_t, t, SCHEDULE)
    generator = torch.Generator().manual_seed(6)
    x_s = step(prediction, t, s, SCHEDULE, eta=eta, variance="beta_tilde", generator=generator)
    sigma = eta / math.sqrt(1 / (1 - ALPHA_BAR[s]) + ALPHA_BAR[t] / (ALPHA_BAR[s] - ALPHA_BAR[t]))
    parts = torch.cat([prediction.x0, eps], dim=1)
    weights = torch.linalg.lstsq(parts, x_s).solution.flatten()
    expected = torch.tensor([math.sqrt(ALPHA_BAR[s]), math.sqrt(1 - ALPHA_BAR[s] - sigma**2)], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0.006)
    assert float((x_s - parts @ weights[:, None]).std()) == pytest.approx(sigma, rel=0.01)


@pytest.mark.equation("eq-sampling-eta")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_eta_is_the_share_of_the_posterior_deviation(t, s, eta):
    ratio = ALPHA_BAR[t] / ALPHA_BAR[s]
    posterior = 1 / (1 / (1 - ALPHA_BAR[s]) + ratio / (1 - ratio))
    assert coefficients(t, s, eta)[2] == pytest.approx(eta * math.sqrt(posterior), rel=1e-10)


@pytest.mark.equation("eq-sampling-slerp")
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_the_great_circle_turns_one_vector_into_the_other(weight):
    x, y = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    x, y = x / x.norm(), y / y.norm()
    across = y - (x * y).sum() * x
    angle = math.acos(float((x * y).sum()))
    turned = math.cos(weight * angle) * x + math.sin(weight * angle) * across / across.norm()
    torch.testing.assert_close(from_chapter("great_circle")(x, y, weight), turned, rtol=0, atol=1e-12)


def angle(t):
    return math.atan2(math.sqrt(1 - ALPHA_BAR[t]), math.sqrt(ALPHA_BAR[t] * V_0))


@pytest.mark.equation("eq-sampling-angle")
@pytest.mark.parametrize(("t", "s"), [*PAIRS, (20, 0)])
def test_a_ddim_step_in_the_gaussian_world_is_a_cosine(t, s):
    assert gain(t, s, eta=0.0) == pytest.approx(math.sqrt(V[s] / V[t]) * math.cos(angle(t) - angle(s)), rel=1e-10)


@pytest.mark.equation("eq-sampling-ddim-deviation")
@pytest.mark.parametrize("steps", [5, 50])
def test_the_deviation_of_ddim_samples(steps):
    path = timesteps(1000, steps)
    by_formula = math.sqrt(V_0 / V[-1]) * math.prod(math.cos(angle(t) - angle(s)) for t, s in pairwise(path))
    assert from_chapter("deviation_by_angles")(V_0, path) == pytest.approx(by_formula, rel=1e-10)
    x_T = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    x = sample(GAUSSIAN, x_T=x_T, steps=steps, eta=0.0, clip=False)
    assert float(x.std() / x_T.std()) == pytest.approx(by_formula, rel=1e-10)


@pytest.mark.equation("eq-sampling-forget")
@pytest.mark.parametrize("t", [900, 500, 100])
def test_what_becomes_of_an_error(t):
    correlation = covariance(0, t) / math.sqrt(V_0 * covariance(t, t))
    assert math.cos(angle(t)) == pytest.approx(correlation, rel=1e-10)
    for path in ([t, 0], list(range(t, -1, -10)), list(range(t, -1, -1))):
        assert gain_along(path, eta=1.0) == pytest.approx(math.sqrt(V_0 / V[t]) * correlation, rel=1e-9)
    assert gain_along(list(range(t, -1, -1)), eta=0.0) == pytest.approx(math.sqrt(V_0 / V[t]), rel=0.01)


@pytest.mark.equation("eq-sampling-double")
@pytest.mark.parametrize("t", [900, 500, 100])
@pytest.mark.parametrize(("eta", "weight"), [(1.0, 1.0), (0.0, 0.5)])
def test_an_error_of_eps_counts_double_with_noise(t, eta, weight):
    eps = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    prediction = Prediction.of("eps", eps, torch.ones(1, 1, dtype=torch.float64), t, SCHEDULE)
    mean, _ = transition(prediction, t, t - 1, SCHEDULE, eta=eta, variance="beta_tilde")
    (derivative,) = torch.autograd.grad(mean.sum(), eps)
    assert float(derivative) == pytest.approx(-weight * BETA[t] / math.sqrt(1 - ALPHA_BAR[t]), rel=0.02)
