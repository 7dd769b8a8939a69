"""The equations of the chapter on guidance, each against a computation that shares no code with the formula.

The world is one of three Gaussians in the plane whose densities are written out here, with gradients by autograd.
"""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn

from ddpm_lib import ClassifierGuided, GaussianMixture, Guided, Schedule, sample, transition

SCHEDULE = Schedule.linear(1000)
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.3], [1.0, -0.4]], dtype=torch.float64)
SHARES = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
VARIANCE = 0.06
IN_CLASS = torch.tensor([True, True, False])
WORLD = GaussianMixture(SHARES, MEANS, [VARIANCE] * 3)
CLASS = GaussianMixture(SHARES[IN_CLASS], MEANS[IN_CLASS], [VARIANCE] * 2)
REST = GaussianMixture([1.0], MEANS[2:], [VARIANCE])
AXIS = torch.linspace(-3, 3, 121, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)
X = torch.tensor([[0.3, 0.1], [1.0, 0.0], [-0.8, 0.4], [0.9, -0.6], [0.0, 0.0]], dtype=torch.float64)
LABEL = torch.zeros(len(X), dtype=torch.long)


class Exact(nn.Module):
    schedule = SCHEDULE

    def forward(self, x_t, t, condition=None):
        law = WORLD if condition is None else (CLASS, REST)[int(condition[0])]
        return law.denoiser(SCHEDULE)(x_t, t)


def log_joint(x, alpha_bar):
    """log of share times density of the three noised blobs, written out."""
    variance = alpha_bar * VARIANCE + 1 - alpha_bar
    squared = (x[:, None] - math.sqrt(alpha_bar) * MEANS).square().sum(2)
    return SHARES.log() - squared / (2 * variance) - math.log(2 * math.pi * variance)


def log_class(x, alpha_bar):
    """log q(c | x_t)."""
    joint = log_joint(x, alpha_bar)
    return joint[:, IN_CLASS].logsumexp(1) - joint.logsumexp(1)


def gradient(f, x=X):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def classifier(x_t, t):
    inside = log_class(x_t, float(SCHEDULE.alpha_bar[t])).exp()
    return torch.stack([inside, 1 - inside], 1).log()


@pytest.mark.equation("eq-guidance-bayes")
@pytest.mark.parametrize("t", [50, 300, 800])
def test_the_score_of_the_class_is_the_score_plus_that_of_the_classifier(t):
    expected = Exact()(X, t).score + gradient(lambda x: log_class(x, float(SCHEDULE.alpha_bar[t])))
    torch.testing.assert_close(Exact()(X, t, LABEL).score, expected, rtol=1e-7, atol=1e-8)


def posterior_on_grid(x_t, alpha_bar, law):
    """q(x_0 | x_t) as probabilities on the grid, by Bayes' rule, for a law given as log densities there."""
    near = -(x_t[:, None] - math.sqrt(alpha_bar) * GRID).square().sum(2) / (2 * (1 - alpha_bar))
    return (law + near).softmax(1)


@pytest.mark.equation("eq-guidance-average")
def test_the_noisy_classifier_is_the_mean_of_the_clean_one():
    alpha_bar = float(SCHEDULE.alpha_bar[300])
    past = posterior_on_grid(X, alpha_bar, log_joint(GRID, 1.0).logsumexp(1))
    torch.testing.assert_close(past @ log_class(GRID, 1.0).exp(), log_class(X, alpha_bar).exp(), rtol=1e-6, atol=1e-9)


@pytest.mark.equation("eq-guidance-weighted")
def test_a_weight_is_a_power_of_the_label():
    t, weight = 300, 2.5
    alpha_bar = float(SCHEDULE.alpha_bar[t])
    expected = gradient(lambda x: log_joint(x, alpha_bar).logsumexp(1) + weight * log_class(x, alpha_bar))
    found = ClassifierGuided(WORLD.denoiser(SCHEDULE), classifier, weight)(X, t, LABEL).score
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.equation("eq-guidance-eps")
def test_the_guided_noise_is_minus_the_guided_score_times_the_deviation():
    t, weight = 500, 2.0
    alpha_bar = float(SCHEDULE.alpha_bar[t])
    slope = gradient(lambda x: log_joint(x, alpha_bar).logsumexp(1) + weight * log_class(x, alpha_bar))
    found = ClassifierGuided(WORLD.denoiser(SCHEDULE), classifier, weight)(X, t, LABEL).eps
    torch.testing.assert_close(found, -math.sqrt(1 - alpha_bar) * slope, rtol=1e-7, atol=1e-8)


@pytest.mark.equation("eq-guidance-shift")
def test_a_linear_tilt_shifts_a_gaussian():
    """Mean and covariance of the tilted density by quadrature."""
    covariance = torch.tensor([[0.2, 0.1], [0.1, 0.3]], dtype=torch.float64)
    mu, g, weight = torch.tensor([0.1, -0.2]).double(), torch.tensor([0.8, -0.5]).double(), 1.5
    u = GRID - mu
    p = (-(u @ torch.linalg.inv(covariance) * u).sum(1) / 2 + weight * u @ g).softmax(0)
    mean = p @ GRID
    torch.testing.assert_close(mean, mu + weight * covariance @ g, rtol=1e-4, atol=1e-4)
    spread = (GRID - mean).T @ (p[:, None] * (GRID - mean))
    torch.testing.assert_close(spread, covariance, rtol=1e-3, atol=1e-4)


@pytest.mark.equation("eq-guidance-join")
@pytest.mark.parametrize("t", [2, 300, 1000])
def test_the_guided_noise_moves_the_ancestral_mean(t):
    weight = 3.0
    guided = ClassifierGuided(WORLD.denoiser(SCHEDULE), classifier, weight)(X, t, LABEL)
    moved = transition(guided, t, t - 1, SCHEDULE)[0] - transition(Exact()(X, t), t, t - 1, SCHEDULE)[0]
    beta = float(SCHEDULE.beta[t])
    slope = gradient(lambda x: log_class(x, float(SCHEDULE.alpha_bar[t])))
    torch.testing.assert_close(moved, weight * beta / math.sqrt(1 - beta) * slope, rtol=1e-6, atol=1e-10)


@pytest.mark.equation("eq-guidance-implicit")
def test_two_predictions_are_a_classifier():
    t = 200
    alpha_bar = float(SCHEDULE.alpha_bar[t])
    found = -(Exact()(X, t, LABEL).eps - Exact()(X, t).eps) / math.sqrt(1 - alpha_bar)
    torch.testing.assert_close(found, gradient(lambda x: log_class(x, alpha_bar)), rtol=1e-6, atol=1e-8)


@pytest.mark.equation("eq-guidance-free")
def test_free_guidance_is_classifier_guidance_with_one_more():
    free = Guided(Exact(), 1.5)(X, 250, LABEL).eps
    by_classifier = ClassifierGuided(WORLD.denoiser(SCHEDULE), classifier, 2.5)(X, 250, LABEL).eps
    torch.testing.assert_close(free, by_classifier, rtol=1e-7, atol=1e-8)


@pytest.mark.equation("eq-guidance-tilt")
def test_the_tilted_law_in_its_two_forms():
    w = 2.0
    joint = log_joint(GRID, 1.0)
    conditional, label = joint[:, IN_CLASS].logsumexp(1), log_class(GRID, 1.0)
    torch.testing.assert_close(
        (conditional + w * label).softmax(0), ((1 + w) * conditional - w * joint.logsumexp(1)).softmax(0)
    )
    in_normal = stats.norm(1.0, 0.5).logpdf(AXIS) * (1 + w) - w * stats.norm(0.0, 1.0).logpdf(AXIS)
    p = torch.as_tensor(in_normal).softmax(0)
    precision = (1 + w) / 0.25 - w
    assert float(p @ AXIS) == pytest.approx((1 + w) / 0.25 / precision, abs=1e-5)


@pytest.mark.equation("eq-guidance-right")
@pytest.mark.parametrize("t", [100, 400])
def test_the_score_of_the_noised_tilted_law(t):
    """The left side by differences of the density, tilted and then noised on a grid; the right side as it stands."""
    w, alpha_bar = 2.0, float(SCHEDULE.alpha_bar[t])
    in_class = log_joint(GRID, 1.0)[:, IN_CLASS].logsumexp(1)
    power = w * log_class(GRID, 1.0)

    def log_noised(x):
        near = -(x[:, None] - math.sqrt(alpha_bar) * GRID).square().sum(2) / (2 * (1 - alpha_bar))
        return (in_class + power + near).logsumexp(1)

    steps = 1e-4 * torch.eye(2, dtype=torch.float64)
    expected = torch.stack([(log_noised(X + e) - log_noised(X - e)) / 2e-4 for e in steps], 1)
    second = gradient(lambda x: (posterior_on_grid(x, alpha_bar, in_class) @ power.exp()).log())
    torch.testing.assert_close(Exact()(X, t, LABEL).score + second, expected, rtol=1e-4, atol=1e-5)
    guided = Guided(Exact(), w)(X, t, LABEL).score
    assert (guided - expected).abs().max() > 0.1  # guidance is another thing


class Narrow(nn.Module):
    schedule = SCHEDULE

    def forward(self, x_t, t, condition=None):
        law = GaussianMixture([1.0], [[0.0]], [1.0 if condition is None else 0.25])
        return law.denoiser(SCHEDULE)(x_t, t)


@pytest.mark.equation("eq-guidance-gaussian")
@pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
def test_three_variances_in_the_gaussian_case(w):
    """DDIM and ancestral variances step by step: a guided step is linear, so its factor is measured on one point."""
    guided, one, c = Guided(Narrow(), w), torch.ones(1, 1, dtype=torch.float64), torch.zeros(1)
    found = {}
    for eta in (0.0, 1.0):
        variance = 1.0
        for t in range(1000, 0, -1):
            mean, sigma = transition(guided(one, t, c), t, t - 1, SCHEDULE, eta=eta)
            variance = float(mean) ** 2 * variance + sigma**2
        found[eta] = variance
    r = 0.25
    tilted, ddim = r / (1 + w * (1 - r)), r * r**w
    ancestral = r * (1 - r ** (2 * w + 1)) / ((2 * w + 1) * (1 - r))
    assert found[0.0] == pytest.approx(ddim, rel=0.02)
    assert found[1.0] == pytest.approx(ancestral, rel=0.02)
    assert ddim < ancestral < tilted

    def density(x):
        return math.exp((1 + w) * stats.norm(0, 0.5).logpdf(x) - w * stats.norm(0, 1).logpdf(x))

    mass, second = (integrate.quad(lambda x, k=k: x**k * density(x), -8, 8)[0] for k in (0, 2))
    assert second / mass == pytest.approx(tilted, rel=1e-6)


@pytest.mark.equation("eq-guidance-rescale")
def test_rescaling_goes_from_the_guided_deviation_to_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    plain, pushed = torch.randn(200, generator=generator).double(), 3 * torch.randn(200, generator=generator).double()
    for phi in (0.0, 0.7, 1.0):
        out = (phi * plain.std() / pushed.std() + 1 - phi) * pushed
        assert float(out.std()) == pytest.approx(float(phi * plain.std() + (1 - phi) * pushed.std()))


@pytest.mark.equation("eq-guidance-interval")
def test_outside_the_interval_the_model_is_unguided_and_inside_it_is_guided():
    guided = Guided(Exact(), lambda x_t, t: 2.0 if 300 <= t <= 700 else 0.0)
    for t in (299, 300, 700, 701):
        alpha_bar = float(SCHEDULE.alpha_bar[t])
        power = 2.0 if t in (300, 700) else 0.0

        def target(x, alpha_bar=alpha_bar, power=power):
            return log_joint(x, alpha_bar)[:, IN_CLASS].logsumexp(1) + power * log_class(x, alpha_bar)

        torch.testing.assert_close(guided(X, t, LABEL).score, gradient(target), rtol=1e-7, atol=1e-8)


@pytest.mark.equation("eq-guidance-negative")
def test_a_negative_condition_divides_by_its_law():
    t, w = 300, 1.5
    alpha_bar = float(SCHEDULE.alpha_bar[t])

    def target(x):
        joint = log_joint(x, alpha_bar)
        return (1 + w) * joint[:, IN_CLASS].logsumexp(1) - w * joint[:, 2]

    found = Guided(Exact(), w, negative=torch.tensor([1]))(X, t, LABEL).score
    torch.testing.assert_close(found, gradient(target), rtol=1e-7, atol=1e-8)


@pytest.mark.equation("eq-guidance-not")
def test_not_c_has_the_odds_for_its_weight():
    """Away from the third blob, with the odds as weight, is the law of the first two."""
    t = 300
    alpha_bar = float(SCHEDULE.alpha_bar[t])

    class Free(Exact):
        """Condition 0 stands for none here."""

        def forward(self, x_t, t, condition=None):
            return super().forward(x_t, t, None if condition is None or condition[0] == 0 else condition)

    def odds(x_t, t):
        rho = 1 - log_class(x_t, float(SCHEDULE.alpha_bar[t])).exp()[:, None]
        return rho / (1 - rho)

    guided = Guided(Free(), odds, negative=torch.tensor([1]))
    expected = gradient(lambda x: log_joint(x, alpha_bar)[:, IN_CLASS].logsumexp(1))
    torch.testing.assert_close(guided(X, t, LABEL).score, expected, rtol=1e-7, atol=1e-8)
    x_T = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(guided, x_T=x_T, condition=torch.zeros(2000), steps=60, eta=0.0, clip=False)
    assert float((drawn[:, 0] < 0).double().mean()) == pytest.approx(0.5, abs=0.04)
