"""The equations of the chapter on inpainting, each against an independent computation."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import linalg, optimize, stats

from ddpm_lib import (
    DPS,
    MMPS,
    Gaussian,
    GaussianMixture,
    Mask,
    NullSpace,
    PiGDM,
    Prediction,
    Replacement,
    Schedule,
    Windows,
    pretrained_classifier,
    repaint,
    repaint_path,
    sample,
    timesteps,
)
from scripts import inpainting_table
from scripts.inpainting_table import seam

SCHEDULE = Schedule.linear()
ALPHA_BAR = np.cumprod(np.r_[1.0, 1 - np.linspace(1e-4, 0.02, 1000)])
A = np.array([[1.0, -0.5, 0.3], [0.2, 0.8, 0.0]])
M = np.array([0.3, -0.2, 0.1])
C = np.array([[1.0, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]])
Y, SIGMA = np.array([0.9, -0.4]), 0.4
T = 300
LAW = Gaussian(M, C)
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [0.2, 0.1])


class Matrix:
    """A degradation by the matrix A."""

    def forward(self, x):
        return x @ torch.from_numpy(A).T

    def transpose(self, y):
        return y @ torch.from_numpy(A)

    def pseudo_inverse(self, y, ridge=0.0):
        return torch.linalg.solve(torch.from_numpy(A @ A.T) + ridge * torch.eye(2, dtype=torch.float64), y.T).T @ (
            torch.from_numpy(A)
        )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def numbers(x):
    return torch.as_tensor(x, dtype=torch.float64)


def slopes(function, x, h=1e-5):
    """Gradient of a scalar function of one point (d,), by differences."""
    eye = np.eye(len(x))
    return np.array([(function(x + h * e) - function(x - h * e)) / (2 * h) for e in eye])


def gaussian_parts(x_t, mean=M, covariance=C):
    """Mean and covariance of x0 given x_t, in the form of precisions."""
    signal, variance = math.sqrt(ALPHA_BAR[T]), 1 - ALPHA_BAR[T]
    inner = np.linalg.inv(np.linalg.inv(covariance) + signal**2 / variance * np.eye(len(mean)))
    return inner @ (np.linalg.solve(covariance, mean) + signal / variance * x_t), inner


# The problem


@pytest.mark.equation("eq-inpainting-observation")
@pytest.mark.equation("eq-inpainting-posterior")
def test_the_posterior_is_that_of_observations_drawn_by_the_model():
    """Draw (x0, y), regress x0 on y: coefficients and residuals are the posterior's. And in the form of precisions."""
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(M, C, 400_000)
    y = x @ A.T + SIGMA * rng.standard_normal((len(x), 2))
    design = np.c_[np.ones(len(y)), y]
    coefficients, *_ = np.linalg.lstsq(design, x, rcond=None)
    K = C @ A.T @ np.linalg.inv(A @ C @ A.T + SIGMA**2 * np.eye(2))
    np.testing.assert_allclose(coefficients[1:].T, K, atol=0.01)
    np.testing.assert_allclose(coefficients.T @ np.r_[1, Y], M + K @ (Y - A @ M), atol=0.01)
    np.testing.assert_allclose(np.cov((x - design @ coefficients).T), C - K @ A @ C, atol=0.01)
    precision = np.linalg.inv(C) + A.T @ A / SIGMA**2
    np.testing.assert_allclose(C - K @ A @ C, np.linalg.inv(precision), atol=1e-12)
    mean = np.linalg.solve(precision, np.linalg.solve(C, M) + A.T @ Y / SIGMA**2)
    np.testing.assert_allclose(M + K @ (Y - A @ M), mean, atol=1e-12)


# Replacement


def constant(value):
    """A denoiser that always predicts the same x0."""

    def denoiser(x_t, t):
        return Prediction.of("x0", value.expand_as(x_t), x_t, t, SCHEDULE)

    denoiser.schedule = SCHEDULE
    return denoiser


@pytest.mark.equation("eq-inpainting-project")
def test_the_projection_is_the_nearest_point_that_agrees():
    guess = np.array([1.0, 2.0, -1.0])
    found = NullSpace(constant(numbers(guess)), Matrix(), numbers(Y)[None])(normal(1, 3), T).x0[0].numpy()
    nearest = optimize.minimize(
        lambda x: np.sum((x - guess) ** 2),
        np.zeros(3),
        constraints={"type": "eq", "fun": lambda x: A @ x - Y},
        tol=1e-12,
    ).x
    np.testing.assert_allclose(found, nearest, atol=1e-4)
    np.testing.assert_allclose(A @ found, Y, atol=1e-12)


@pytest.mark.equation("eq-inpainting-replace")
def test_the_pasted_image_has_the_law_of_a_noised_observation_and_the_rest_is_kept():
    x_t, seen = normal(40_000, 3, seed=1), []

    def spy(x, t):
        seen.append(x)
        return constant(torch.zeros(3, dtype=torch.float64))(x, t)

    spy.schedule = SCHEDULE
    Replacement(spy, Matrix(), numbers(Y)[None], seeded(2))(x_t, T)
    known = seen[0].numpy() @ A.T
    np.testing.assert_allclose(known.mean(0), math.sqrt(ALPHA_BAR[T]) * Y, atol=0.02)
    np.testing.assert_allclose(np.cov(known.T), (1 - ALPHA_BAR[T]) * A @ A.T, atol=0.02)
    null = linalg.null_space(A)
    np.testing.assert_allclose(seen[0].numpy() @ null, x_t.numpy() @ null, atol=1e-10)


# RePaint


@pytest.mark.equation("eq-inpainting-climb")
def test_a_climb_is_as_many_steps_of_the_forward_process():
    """A denoiser that knows x0 makes x_s a draw of q(x_s | x0); after the climb it must be one of q(x_t | x0)."""
    x0, seen = torch.full((20_000, 1), 0.7, dtype=torch.float64), {}

    def spy(x, t):
        seen.setdefault(t, []).append(x)
        return constant(x0[:1])(x, t)

    spy.schedule = SCHEDULE
    repaint(spy, x_T=normal(20_000, 1), steps=4, jump=2, resamplings=2, variance="beta_tilde", generator=seeded(1))
    for t in (500, 250):
        after = seen[t][-1]
        assert float(after.mean()) == pytest.approx(0.7 * math.sqrt(ALPHA_BAR[t]), abs=0.03)
        assert float(after.var()) == pytest.approx(1 - ALPHA_BAR[t], abs=0.03)
    first, second = seen[1000]
    assert abs(float(torch.corrcoef(torch.cat([first, second], 1).T)[0, 1])) < 0.03


@pytest.mark.equation("eq-inpainting-cost")
@pytest.mark.parametrize(("steps", "jump", "resamplings"), [(20, 5, 3), (50, 10, 1), (12, 12, 4)])
def test_the_network_is_asked_once_per_pass_and_step(steps, jump, resamplings):
    asked = 0

    def counting(x, t):
        nonlocal asked
        asked += 1
        return constant(torch.zeros(1, dtype=torch.float64))(x, t)

    counting.schedule = SCHEDULE
    repaint(counting, x_T=normal(1, 1), steps=steps, jump=jump, resamplings=resamplings)
    assert asked == resamplings * steps
    assert sum(s < t for t, s in pairwise(repaint_path(1000, steps, jump, resamplings))) == asked


# The likelihood


@pytest.mark.equation("eq-inpainting-score")
@pytest.mark.equation("eq-inpainting-likelihood")
@pytest.mark.equation("eq-inpainting-tweedie")
def test_score_likelihood_and_mean_given_an_observation_by_sums_over_a_grid():
    """A mixture in the plane, its first number seen with noise: every integral is a sum over a grid."""
    side = np.linspace(-3, 3, 241)
    points = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    prior = MIXTURE.log_prob(torch.from_numpy(points)).exp().numpy()
    likelihood = stats.norm.pdf(0.1, points[:, 0], SIGMA)
    signal, noise = math.sqrt(ALPHA_BAR[T]), math.sqrt(1 - ALPHA_BAR[T])
    x_t = np.array([0.1, -0.3])

    def weights(x):
        return prior * np.exp(-((x - signal * points) ** 2).sum(1) / (2 * noise**2))

    def log_y_given(x):
        return math.log((weights(x) * likelihood).sum() / weights(x).sum())

    with_y, without = (slopes(lambda x, f=f: math.log((weights(x) * f).sum()), x_t) for f in (likelihood, 1.0))
    score = MIXTURE.noised(ALPHA_BAR[T]).score(torch.from_numpy(x_t)[None])[0].numpy()
    np.testing.assert_allclose(without, score, atol=1e-5)
    np.testing.assert_allclose(with_y, score + slopes(log_y_given, x_t), atol=1e-5)
    mean_y = (weights(x_t) * likelihood) @ points / (weights(x_t) * likelihood).sum()
    mean = MIXTURE.denoise(torch.from_numpy(x_t)[None], ALPHA_BAR[T])[0].numpy()
    np.testing.assert_allclose(mean_y, mean + noise**2 / signal * slopes(log_y_given, x_t), atol=1e-5)

    draws = points[np.random.default_rng(1).choice(len(points), 200_000, p=weights(x_t) / weights(x_t).sum())]
    seen = draws[:, 0] + SIGMA * np.random.default_rng(2).standard_normal(len(draws))
    assert math.exp(log_y_given(x_t)) == pytest.approx((np.abs(seen - 0.1) < 0.05).mean() / 0.1, rel=0.03)


def log_normal(residual, covariance):
    return stats.multivariate_normal(np.zeros(len(residual)), covariance).logpdf(residual)


METHODS = {
    "pigdm": lambda plain: PiGDM(plain, Matrix(), numbers(Y)[None], SIGMA, 0.7),
    "mmps": lambda plain: MMPS(plain, Matrix(), numbers(Y)[None], SIGMA, 2),
    "dps": lambda plain: DPS(plain, Matrix(), numbers(Y)[None], 1.7),
}


def assumed(name):
    """The covariance of y given x_t that each method assumes, written anew."""
    a = ALPHA_BAR[T]
    match name:
        case "pigdm":
            return 1 / (1 / 0.7 + a / (1 - a)) * A @ A.T + SIGMA**2 * np.eye(2)
        case "mmps":
            return A @ gaussian_parts(np.zeros(3))[1] @ A.T + SIGMA**2 * np.eye(2)
        case "dps":
            return (1 - a) / (1.7 * a) * np.eye(2)


@pytest.mark.equation("eq-inpainting-guided")
@pytest.mark.equation("eq-inpainting-dps")
@pytest.mark.equation("eq-inpainting-pigdm")
@pytest.mark.equation("eq-inpainting-mmps")
@pytest.mark.parametrize("name", METHODS)
def test_the_guided_guess_adds_the_slope_of_the_assumed_likelihood(name):
    x_t = np.array([0.4, -0.6, 0.2])
    covariance = assumed(name)

    def log_likelihood(x):
        return log_normal(Y - A @ gaussian_parts(x)[0], covariance)

    expected = gaussian_parts(x_t)[0] + (1 - ALPHA_BAR[T]) / math.sqrt(ALPHA_BAR[T]) * slopes(log_likelihood, x_t)
    found = METHODS[name](LAW.denoiser(SCHEDULE))(numbers(x_t)[None], T).x0[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    if name == "dps":

        def error(x):
            return np.sum((Y - A @ gaussian_parts(x)[0]) ** 2)

        down = gaussian_parts(x_t)[0] - 1.7 * math.sqrt(ALPHA_BAR[T]) / 2 * slopes(error, x_t)
        np.testing.assert_allclose(found, down, rtol=1e-6, atol=1e-8)


@pytest.mark.equation("eq-inpainting-covariance")
def test_the_covariance_given_x_t_is_the_jacobian():
    """Of a mixture, whose covariance given x_t is the sum over a grid."""
    side = np.linspace(-3, 3, 241)
    points = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    signal, variance = math.sqrt(ALPHA_BAR[T]), 1 - ALPHA_BAR[T]
    x_t = np.array([0.1, -0.3])
    weights = MIXTURE.log_prob(torch.from_numpy(points)).exp().numpy()
    weights = weights * np.exp(-((x_t - signal * points) ** 2).sum(1) / (2 * variance))
    covariance = np.cov(points.T, aweights=weights, ddof=0)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: MIXTURE.denoise(x[None], ALPHA_BAR[T])[0], torch.from_numpy(x_t)
    )
    np.testing.assert_allclose(variance / signal * jacobian.numpy(), covariance, atol=1e-6)


@pytest.mark.equation("eq-inpainting-moments")
def test_the_moments_are_those_of_samples():
    law = Gaussian([0.3, -0.2], [[1.0, 0.8], [0.8, 1.0]])
    y = torch.tensor([[1.2, 0.0]], dtype=torch.float64)
    method = PiGDM(law.denoiser(SCHEDULE), Mask(torch.tensor([True, False])), y, 0.5)
    mean, covariance, eye = np.zeros(2), np.eye(2), np.eye(2)
    for t, s in pairwise(timesteps(1000, 20)):
        a, b = ALPHA_BAR[t], ALPHA_BAR[s]
        c0, ct = math.sqrt(b) * (1 - a / b) / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a)
        x0 = method(numbers(np.vstack([np.zeros(2), eye])), t).x0.numpy()
        F = c0 * (x0[1:] - x0[0]).T + ct * eye
        mean, covariance = F @ mean + c0 * x0[0], F @ covariance @ F.T + (1 - b) / (1 - a) * (1 - a / b) * eye
    options = {"steps": 20, "variance": "beta_tilde", "clip": False, "generator": seeded(3)}
    x = sample(method, x_T=normal(20_000, 2, seed=4), **options)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(x.T.cov(), covariance, atol=0.02)


# Pictures


@pytest.mark.equation("eq-inpainting-seam")
def test_the_seam_by_hand():
    x = torch.tensor([[[[1.0, 2.0, 4.0], [0.0, 5.0, 1.0]]]])
    known = torch.tensor([[True, False, False], [True, True, False]])
    # pairs: (1, 2), (5, 1) beside each other; (2, 5), below each other; (4, 1) are both unknown
    assert seam(x, known) == pytest.approx(math.sqrt((1 + 16 + 9) / 3))


@pytest.mark.equation("eq-inpainting-calibration")
def test_a_fill_is_as_far_from_the_truth_as_from_another_fill():
    """In a mixture seen with noise, by drawing truth, observation and two fills from the exact posterior."""
    rng = np.random.default_rng(5)
    means, deviation = np.array([-1.0, 0.8]), 0.3
    truth = means[rng.integers(2, size=100_000)] + deviation * rng.standard_normal(100_000)
    y = truth + 0.8 * rng.standard_normal(len(truth))
    log_odds = stats.norm.logpdf(y[:, None], means, math.hypot(deviation, 0.8)) @ [-1, 1]
    gain = deviation**2 / (deviation**2 + 0.8**2)

    def fill():
        side = means[(rng.random(len(y)) < 1 / (1 + np.exp(-log_odds))).astype(int)]
        return side + gain * (y - side) + math.sqrt(deviation**2 * (1 - gain)) * rng.standard_normal(len(y))

    a, b = fill(), fill()
    assert np.mean((a - truth) ** 2) == pytest.approx(np.mean((a - b) ** 2), rel=0.02)


@pytest.mark.equation("eq-inpainting-windows")
def test_the_mean_of_windows_is_the_best_compromise():
    """Least squares over all windows at once; each window predicts a field of its own."""
    guesses = []

    def denoiser(x, t):
        x0 = normal(*x.shape, seed=len(guesses))
        guesses.append(x0.numpy())
        return Prediction.of("x0", x0, x, t, SCHEDULE)

    denoiser.schedule = SCHEDULE
    found = Windows(denoiser, (2, 4), (1, 3))(normal(1, 1, 3, 7), T).x0.numpy()
    corners = [(row, column) for row in (0, 1) for column in (0, 3)]
    rows, values = [], []
    for (row, column), guess in zip(corners, guesses, strict=True):
        for i in range(2):
            for j in range(4):
                select = np.zeros((3, 7))
                select[row + i, column + j] = 1
                rows.append(select.flatten())
                values.append(guess[0, 0, i, j])
    best, *_ = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)
    np.testing.assert_allclose(found.flatten(), best, atol=1e-12)


def test_the_stored_table_is_that_of_the_script():
    stored = json.loads(inpainting_table.RESULTS.read_text())
    settings = inpainting_table.SETTINGS
    assert stored["settings"]["data"] == settings
    expected = [(d, m, method) for d in settings for m in settings[d]["masks"] for method in inpainting_table.PASSES]
    assert [(row["data"], row["mask"], row["method"]) for row in stored["rows"]] == expected


def test_the_shipped_clothes_are_ten_of_each_class_and_what_the_judge_says():
    x, label = inpainting_table.examples("fashion-mnist", 100)
    assert torch.equal(label, torch.arange(100) % 10)
    assert float((pretrained_classifier("fashion-mnist")(x).argmax(1) == label).double().mean()) > 0.9
