"""The equations of the chapter on evaluation, each against a computation that shares no code with the formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from ddpm_lib import (
    Denoiser,
    GaussianMixture,
    Guided,
    Schedule,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

A = np.array([[1.0, 0.6], [0.6, 0.5]])
B = np.array([[0.3, -0.2], [-0.2, 1.2]])


def normal(n: int, size: int, seed: int) -> Tensor:
    return torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exactly(mean: list[float], covariance: np.ndarray, seed: int) -> Tensor:
    """Points whose sample mean and sample covariance are these to rounding."""
    z = normal(50, len(mean), seed)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    return z @ torch.linalg.cholesky(torch.from_numpy(covariance)).T + torch.tensor(mean, dtype=torch.float64)


# Likelihood


@pytest.mark.equation("eq-evaluation-noise-component")
def test_a_noise_component_costs_at_most_log_100():
    good = GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [0.0005, 0.001])
    both = GaussianMixture([0.01 * 0.4, 0.01 * 0.6, 0.99], [[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]], [0.0005, 0.001, 1.0])
    x = torch.cat([good.sample(500, torch.Generator().manual_seed(0)), normal(500, 2, 1)])
    loss = good.log_prob(x) - both.log_prob(x)
    assert loss.max() <= math.log(1 / (1 - 0.99)) + 1e-9
    assert loss.max() > 0.9 * math.log(1 / (1 - 0.99))  # the bound is nearly reached: no smaller one holds
    ruined = (both.sample(4000, torch.Generator().manual_seed(2)).abs() > 1.6).any(1).double().mean()
    assert ruined > 0.15


# Frechet distance


@pytest.mark.equation("eq-evaluation-frechet")
def test_the_distance_is_the_least_cost_over_all_joint_covariances():
    """The covariance of X and Y is a C b^T with a a^T = A, b b^T = B, |C| <= 1; the best C are orthogonal."""
    a, b = np.linalg.cholesky(A), np.linalg.cholesky(B)
    angle = np.linspace(0, 2 * np.pi, 20_001)
    c, s = np.cos(angle), np.sin(angle)
    turns = [np.array([[c, -s], [s, c]]), np.array([[c, s], [s, -c]])]
    inner = np.random.default_rng(0).standard_normal((2, 2, 2000))
    inner /= np.linalg.norm(inner, ord=2, axis=(0, 1))
    best, within = (max(np.tensordot(a.T @ b, C, axes=2).max() for C in matrices) for matrices in (turns, [inner]))
    assert within < best
    found = frechet_distance(exactly([0, 0], A, 0), exactly([3, 1], B, 1))
    assert found == pytest.approx(9 + 1 + np.trace(A) + np.trace(B) - 2 * best, rel=1e-7)

    rng = np.random.default_rng(1)
    x, y = rng.multivariate_normal([0, 0], A, 700), rng.multivariate_normal([3, 1], B, 700)
    prices = ((x[:, None] - y) ** 2).sum(2)
    rows, columns = optimize.linear_sum_assignment(prices)
    assert found == pytest.approx(prices[rows, columns].mean(), rel=0.04)


@pytest.mark.equation("eq-evaluation-transport")
def test_the_linear_map_carries_one_gaussian_to_the_other_at_that_cost():
    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(values**0.5) @ vectors.T

    inverse = np.linalg.inv(root(A))
    M = torch.from_numpy(inverse @ root(root(A) @ B @ root(A)) @ inverse)
    x = exactly([0, 0], A, 4)
    y = x @ M.T + torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert torch.allclose(y.T.cov(), torch.from_numpy(B), atol=1e-12)
    n = len(x)
    way = (x - y - (x - y).mean(0)).square().sum() / (n - 1) + (x - y).mean(0).square().sum()
    assert frechet_distance(x, y) == pytest.approx(float(way), rel=1e-9)


def constant(values: Tensor) -> float:
    """The constant b of the bias, from the eigenvalues of the covariance."""
    pair = values[:, None] * values / (values[:, None] + values)
    return float(5 / 4 * values.sum() + pair.sum() / 2)


VALUES = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)


@pytest.mark.equation("eq-evaluation-bias")
@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 600)])
def test_bias_of_the_distance_by_simulation(n, m):
    draws = [
        frechet_distance(normal(n, 4, 2 * i) * VALUES.sqrt(), normal(m, 4, 2 * i + 1) * VALUES.sqrt())
        for i in range(1500)
    ]
    error = np.std(draws) / len(draws) ** 0.5
    expected = constant(VALUES) * (1 / n + 1 / m)
    assert error < 0.02 * expected
    assert np.mean(draws) == pytest.approx(expected, rel=0.04)


@pytest.mark.equation("eq-evaluation-bias")
def test_bias_in_one_dimension_from_the_moments_of_mean_and_deviation():
    """E (difference of means)^2 + E (difference of deviations)^2, the latter by the chi distribution."""
    n, sigma = 400, 1.7
    mean_deviation = stats.chi(n - 1).mean() / (n - 1) ** 0.5
    exact = 2 * sigma**2 / n + 2 * sigma**2 * (1 - mean_deviation**2)
    assert constant(torch.tensor([sigma**2], dtype=torch.float64)) * 2 / n == pytest.approx(exact, rel=0.005)


@pytest.mark.equation("eq-evaluation-extrapolation")
def test_extrapolation_takes_the_bias_away():
    """A true distance of 1 (a shift), a known reference, and sets so small that the bias is as large."""
    reference = exactly([0.0] * 4, np.diag(VALUES.numpy()), 0)

    def average(n):
        shifted = ((normal(n, 4, i) * VALUES.sqrt()) + 0.5 for i in range(1500))
        return np.mean([frechet_distance(x, reference) for x in shifted])

    n, N = 40, 160
    small, large = average(n), average(N)
    assert small > 1.1
    assert (N * large - n * small) / (N - n) == pytest.approx(1.0, abs=0.01)
    assert abs(large - 1) > 0.02


@pytest.mark.equation("eq-evaluation-bootstrap")
def test_resampled_sets_have_the_bias_twice():
    n, excess = 200, []
    reference = exactly([0.0] * 4, np.diag(VALUES.numpy()), 0)
    for i in range(40):
        x = normal(n, 4, i) * VALUES.sqrt()
        generator = torch.Generator().manual_seed(i)
        resampled = [x[torch.randint(n, (n,), generator=generator)] for _ in range(25)]
        excess.append(np.mean([frechet_distance(y, reference) for y in resampled]) - frechet_distance(x, reference))
    assert np.mean(excess) == pytest.approx(constant(VALUES) / n, rel=0.1)


@pytest.mark.equation("eq-evaluation-interval")
def test_interval_holds_the_mean_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    v = rng.normal(3.0, 0.4, size=(40_000, 5))
    half = 2.776 * v.std(1, ddof=1) / 5**0.5
    assert np.mean(abs(v.mean(1) - 3.0) <= half) == pytest.approx(0.95, abs=0.005)
    assert stats.t.ppf(0.975, df=4) == pytest.approx(2.776, abs=1e-3)


# The other measures


@pytest.mark.equation("eq-evaluation-inception")
def test_score_is_the_mutual_information_of_a_table():
    """Images and classes as a joint table of probabilities: mutual information by its definition, cell by cell."""
    logits = 2 * normal(7, 4, 0)
    p = np.exp(logits.numpy())
    joint = p / p.sum(1, keepdims=True) / len(p)
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, y] * math.log(joint[i, y] / (rows[i] * columns[y])) for i, y in itertools.product(range(7), range(4))
    )
    assert math.log(inception_score(logits)) == pytest.approx(information, rel=1e-9)
    entropies = [stats.entropy(row * len(p)) for row in joint]
    assert information == pytest.approx(stats.entropy(columns) - np.mean(entropies), rel=1e-9)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return (float(np.dot(x, y)) / len(x) + 1) ** 3


@pytest.mark.equation("eq-evaluation-mmd")
def test_kernel_distance_pair_by_pair_and_without_bias():
    a, b = normal(9, 3, 0).numpy(), 1.3 * normal(7, 3, 1).numpy() + 0.2
    within = [np.mean([cubic(x, y) for x, y in itertools.permutations(s, 2)]) for s in (a, b)]
    across = np.mean([cubic(x, y) for x in a for y in b])
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(sum(within) - 2 * across)

    same = [kernel_distance(normal(20, 3, 2 * i), normal(20, 3, 2 * i + 1)) for i in range(3000)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    assert min(same) < 0


@pytest.mark.equation("eq-evaluation-moments")
def test_a_cubic_kernel_is_three_moments():
    """Two finite laws, all points equally likely; means over all pairs, the same point with itself included."""
    a, b = normal(6, 3, 0).numpy(), 0.7 * normal(5, 3, 1).numpy() + 0.4
    exact = (
        np.mean([cubic(x, y) for x in a for y in a])
        + np.mean([cubic(x, y) for x in b for y in b])
        - 2 * np.mean([cubic(x, y) for x in a for y in b])
    )
    moments = 0.0
    for r, weight in ((1, 3 / 3), (2, 3 / 3**2), (3, 1 / 3**3)):
        for axes in itertools.product(range(3), repeat=r):
            moments += weight * (np.prod(a[:, axes], axis=1).mean() - np.prod(b[:, axes], axis=1).mean()) ** 2
    assert moments == pytest.approx(exact, rel=1e-9)
    many_a, many_b = (torch.from_numpy(x).repeat(400, 1) for x in (a, b))
    assert kernel_distance(many_a, many_b) == pytest.approx(exact, rel=0.01)


@pytest.mark.equation("eq-evaluation-precision")
def test_precision_and_recall_point_by_point():
    a, b = normal(40, 2, 0).numpy(), normal(30, 2, 1).numpy() * 0.6 + 0.8

    def inside(points, centres, k):
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)
                if math.dist(point, centre) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    for k in (1, 3):
        found = precision_recall(torch.from_numpy(a), torch.from_numpy(b), k)
        assert found == pytest.approx((inside(b, a, k), inside(a, b, k)))
        assert found[0] != found[1]


@pytest.mark.equation("eq-evaluation-exchangeable")
@pytest.mark.parametrize(("n", "m"), [(8, 8), (12, 4)])
def test_by_chance_the_nearest_is_a_training_image_in_proportion(n, m):
    """Also for a source that is unlike the data; not for one that has seen them."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((20_000, n + m, 2))
    for x in (rng.standard_normal((20_000, 1, 2)), 5 + rng.uniform(size=(20_000, 1, 2))):
        nearest = ((images - x) ** 2).sum(2).argmin(1)
        assert np.mean(nearest < n) == pytest.approx(n / (n + m), abs=0.012)
    copied = images[:, :1] + 0.1 * rng.standard_normal((20_000, 1, 2))
    assert np.mean(((images - copied) ** 2).sum(2).argmin(1) < n) > n / (n + m) + 0.1


# Guidance


class TwoClasses(nn.Module):
    """The exact noise of a mixture of two Gaussians: of one component where a label is given, of both where not."""

    def __init__(self, schedule: Schedule, parts: list[GaussianMixture], whole: GaussianMixture):
        super().__init__()
        self.schedule, self.parts, self.whole = schedule, parts, whole

    def forward(self, x, steps, label=None):
        world = self.whole if label is None else self.parts[int(label[0])]
        return world.denoiser(self.schedule)(x, int(steps[0]) + 1).eps


@pytest.mark.equation("eq-evaluation-guidance")
def test_guidance_adds_the_gradient_of_the_log_probability_of_the_class():
    schedule, t, w = Schedule.linear(100), 40, 1.5
    means, deviations = torch.tensor([[-0.5, 0.2], [0.7, -0.1]], dtype=torch.float64), (0.3, 0.2)
    parts = [GaussianMixture([1.0], means[i : i + 1], [deviations[i] ** 2]) for i in (0, 1)]
    whole = GaussianMixture([0.4, 0.6], means, [d**2 for d in deviations])
    guided = Guided(Denoiser(TwoClasses(schedule, parts, whole), schedule), w)
    x = normal(6, 2, 0).requires_grad_()
    signal, noise = float(schedule.signal[t]), float(schedule.noise[t])

    def log_normal(c):
        variance = signal**2 * deviations[c] ** 2 + noise**2
        return -(x - signal * means[c]).square().sum(1) / (2 * variance) - math.log(2 * math.pi * variance)

    logs = torch.stack([math.log(0.4) + log_normal(0), math.log(0.6) + log_normal(1)])
    target = log_normal(1) + w * (logs[1] - logs.logsumexp(0))  # log q(x | c) + w log q(c | x)
    gradient = torch.autograd.grad(target.sum(), x)[0]
    found = guided(x.detach(), t, torch.ones(6, dtype=torch.long)).eps
    assert torch.allclose(found, -noise * gradient, atol=1e-9)
