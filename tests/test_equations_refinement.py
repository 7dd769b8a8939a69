"""The equations of the chapter on image refinement, each against an independent computation."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import fft, ndimage, optimize, stats

from ddpm_lib import Blur, Downsample, GaussianMixture, Prediction, Schedule
from scripts import refinement_table
from scripts.refinement_table import SIGMA, as_file, edited, linear_rule, means_of, psnr

ALPHA_BAR = np.cumprod(np.r_[1.0, 1 - np.linspace(1e-4, 0.02, 1000)])
A = np.array([[1.0, -0.5, 0.3], [0.2, 0.8, 0.0]])
M = np.array([0.3, -0.2, 0.1])
C = np.array([[1.0, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]])
NOISE = 0.4


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


class Finite:
    """A world of six images of two pixels and four things that can be seen: every mean is a sum over a table."""

    points = 2 * uniform(6, 2, seed=1) - 1
    joint = uniform(6, 4, seed=2) ** 3
    joint /= joint.sum()
    seen = joint.sum(0)
    law = joint.sum(1)
    posterior = joint / seen
    means = posterior.T @ points
    mmse = float((joint * ((points[:, None] - means) ** 2).sum(2)).sum())

    def error_of_mean(self, table, n):
        """E |x0 - mean of n draws|^2, the draws from a table (6, 4), by going through all cases."""
        total = 0.0
        for y in range(4):
            for drawn in product(range(6), repeat=n):
                weight = np.prod(table[list(drawn), y])
                off = self.points - self.points[list(drawn)].mean(0)
                total += weight * (self.joint[:, y] @ (off**2).sum(1))
        return total

    def covariance_of_mean(self, n):
        first, second = np.zeros(2), np.zeros((2, 2))
        for y in range(4):
            for drawn in product(range(6), repeat=n):
                weight = self.seen[y] * np.prod(self.posterior[list(drawn), y])
                mean = self.points[list(drawn)].mean(0)
                first, second = first + weight * mean, second + weight * np.outer(mean, mean)
        return second - np.outer(first, first)


WORLD = Finite()

# The problem


@pytest.mark.equation("eq-refinement-rounding")
def test_rounding_to_a_file_adds_noise_of_this_deviation():
    x = 2 * uniform(400_000, seed=3) - 1
    stored = np.rint((x + 1) / 2 * 255).astype(np.uint8)
    off = stored / 255 * 2 - 1 - x
    assert off.std() == pytest.approx(2 / 255 / math.sqrt(12), rel=0.01)
    assert pytest.approx(off.std(), rel=0.01) == SIGMA
    np.testing.assert_allclose(as_file(torch.from_numpy(x)).numpy() - x, off, atol=1e-12)


@pytest.mark.equation("eq-refinement-psnr")
def test_the_psnr_is_that_of_bytes_with_peak_255():
    a, b = np.random.default_rng(4).integers(0, 256, (2, 28, 28)).astype(float)
    of_bytes = 20 * math.log10(255) - 10 * math.log10(np.mean((a - b) ** 2))
    assert psnr(float(np.mean((a / 127.5 - b / 127.5) ** 2))) == pytest.approx(of_bytes, abs=1e-9)
    assert psnr(0.01**2) == pytest.approx(20 * math.log10(200))


# The best answer


@pytest.mark.equation("eq-refinement-best")
def test_the_error_of_any_answer_is_the_least_one_plus_its_distance_from_the_mean():
    for seed in range(5):
        f = 2 * uniform(4, 2, seed=10 + seed) - 1
        error = sum(WORLD.joint[i, y] * np.sum((WORLD.points[i] - f[y]) ** 2) for i, y in product(range(6), range(4)))
        assert error == pytest.approx(WORLD.mmse + WORLD.seen @ ((WORLD.means - f) ** 2).sum(1))
    best = optimize.minimize(
        lambda f: sum(
            WORLD.joint[i, y] * np.sum((WORLD.points[i] - f.reshape(4, 2)[y]) ** 2)
            for i, y in product(range(6), range(4))
        ),
        np.zeros(8),
        tol=1e-12,
    )
    assert best.fun == pytest.approx(WORLD.mmse, abs=1e-9)
    np.testing.assert_allclose(best.x.reshape(4, 2), WORLD.means, atol=1e-5)


@pytest.mark.equation("eq-refinement-draws")
@pytest.mark.equation("eq-refinement-decibels")
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_error_of_a_mean_of_draws_by_going_through_all_draws(n):
    error = WORLD.error_of_mean(WORLD.posterior, n)
    assert error == pytest.approx((1 + 1 / n) * WORLD.mmse)
    assert psnr(error) == pytest.approx(psnr(WORLD.mmse) - 10 * math.log10(1 + 1 / n))
    if n == 1:
        assert psnr(WORLD.mmse) - psnr(error) == pytest.approx(3.01, abs=0.001)


@pytest.mark.equation("eq-refinement-smooth")
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_covariance_of_a_mean_of_draws_by_going_through_all_draws(n):
    C = np.cov(WORLD.points.T, aweights=WORLD.law, ddof=0)
    P = sum(WORLD.seen[y] * np.cov(WORLD.points.T, aweights=WORLD.posterior[:, y], ddof=0) for y in range(4))
    np.testing.assert_allclose(WORLD.covariance_of_mean(n), C - (1 - 1 / n) * P, atol=1e-12)


@pytest.mark.equation("eq-refinement-cheapest")
def test_the_cheapest_answer_with_the_law_of_images_by_two_linear_programs():
    """All tables r(answer | seen) with the right law on one side; on the other, transport from the means to images."""
    distance = ((WORLD.points[:, None] - WORLD.points) ** 2).sum(2)
    cost = (WORLD.joint.T @ distance).flatten()  # of r[y, answer]
    right_law = np.kron(WORLD.seen, np.eye(6))
    sums = np.kron(np.eye(4), np.ones(6))
    rule = optimize.linprog(cost, A_eq=np.vstack([right_law, sums]), b_eq=np.r_[WORLD.law, np.ones(4)])
    apart = ((WORLD.means[:, None] - WORLD.points) ** 2).sum(2).flatten()
    plan = np.vstack([np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))])
    carried = optimize.linprog(apart, A_eq=plan, b_eq=np.r_[WORLD.seen, WORLD.law])
    assert rule.fun == pytest.approx(WORLD.mmse + carried.fun, abs=1e-9)
    assert WORLD.mmse < rule.fun < 2 * WORLD.mmse


# The conditional network


@pytest.mark.equation("eq-refinement-conditional")
def test_the_mean_of_images_by_what_is_seen_and_x_t_is_the_denoiser_of_the_posterior():
    """The best function of (x_t, y) is the mean of x0 among pairs with nearly the same x_t and the same y."""
    rng, t = np.random.default_rng(5), 300
    points = np.array([-0.9, -0.2, 0.1, 0.4, 0.8, 1.0])
    drawn = rng.choice(24, 2_000_000, p=WORLD.joint.flatten())
    x0, y = points[drawn // 4], drawn % 4
    x_t = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * rng.standard_normal(len(x0))
    for value, centre in product(range(4), (-0.8, 0.0, 0.7)):
        near = (y == value) & (np.abs(x_t - centre) < 0.03)
        posterior = GaussianMixture(WORLD.posterior[:, value], points[:, None], np.full(6, 1e-12))
        best = float(posterior.denoise(torch.tensor([[centre]], dtype=torch.float64), ALPHA_BAR[t]))
        assert x0[near].mean() == pytest.approx(best, abs=0.03)


@pytest.mark.equation("eq-refinement-means")
def test_the_error_of_means_of_draws_that_are_not_right():
    table = uniform(6, 4, seed=6)
    table /= table.sum(0)
    wrong = table.T @ WORLD.points
    E = WORLD.mmse + WORLD.seen @ ((WORLD.means - wrong) ** 2).sum(1)
    V = sum(WORLD.seen[y] * np.trace(np.cov(WORLD.points.T, aweights=table[:, y], ddof=0)) for y in range(4))
    for n in (1, 2, 4):
        assert WORLD.error_of_mean(table, n) == pytest.approx(E + V / n)


def test_the_script_takes_means_of_disjoint_draws():
    answers = torch.randn(8, 3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = means_of(answers, torch.zeros(3, 1, 28, 28, dtype=torch.float64))
    assert list(found) == [1, 2, 4, 8]
    assert found[2] == pytest.approx(
        np.mean([float(((answers[i] + answers[i + 1]) / 2).square().mean()) for i in (0, 2, 4, 6)])
    )
    assert found[8] == pytest.approx(float(answers.mean(0).square().mean()))


def posterior_draws(y, rng):
    """Of the Gaussian world seen through A, in the form of precisions."""
    inner = np.linalg.inv(np.linalg.inv(C) + A.T @ A / NOISE**2)
    means = (np.linalg.solve(C, M) + y @ A / NOISE**2) @ inner
    return means + rng.standard_normal(means.shape) @ np.linalg.cholesky(inner).T


@pytest.mark.equation("eq-refinement-fit")
def test_an_answer_misses_what_was_seen_by_the_noise():
    rng = np.random.default_rng(7)
    y = rng.multivariate_normal(M, C, 300_000) @ A.T + NOISE * rng.standard_normal((300_000, 2))
    misfit = y - posterior_draws(y, rng) @ A.T
    assert np.mean((misfit**2).sum(1)) == pytest.approx(2 * NOISE**2, rel=0.01)
    np.testing.assert_allclose(np.cov(misfit.T), NOISE**2 * np.eye(2), atol=0.003)


# Blur


@pytest.mark.equation("eq-refinement-damping")
@pytest.mark.parametrize("k", [0, 1, 5, 9])
def test_a_cosine_wave_is_damped_as_by_a_gaussian_filter_with_mirrors(k):
    wave = np.cos(np.pi * k * (np.arange(28) + 0.5) / 28)
    d = math.exp(-((2 * math.pi * k / 28) ** 2) / 2)
    filtered = ndimage.gaussian_filter1d(wave, 2.0, mode="reflect", truncate=12)
    np.testing.assert_allclose(filtered, d * wave, atol=1e-8)
    image = torch.from_numpy(np.outer(wave, np.ones(28)))[None, None]
    np.testing.assert_allclose(Blur(2.0).forward(image)[0, 0].numpy(), d * image[0, 0].numpy(), atol=1e-8)


@pytest.mark.equation("eq-refinement-inverse")
def test_the_inverse_filter_multiplies_the_noise_of_each_wave():
    rng, blur = np.random.default_rng(8), Blur(1.0)
    x, n = torch.from_numpy(rng.standard_normal((2, 4000, 1, 8, 8)))
    off = blur.pseudo_inverse(blur.forward(x) + 0.1 * n) - x
    found = fft.dctn(off[:, 0].numpy(), axes=(1, 2), norm="ortho")
    d = np.exp(-((np.pi * np.arange(8) / 8) ** 2) / 2)
    ratio = (found**2).mean(0) / (0.1**2 / np.outer(d, d) ** 2)
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert np.abs(ratio - 1).max() < 0.15


@pytest.mark.equation("eq-refinement-wiener")
@pytest.mark.parametrize(("d", "c", "sigma"), [(0.9, 2.0, 0.3), (0.1, 0.5, 0.2)])
def test_the_wiener_filter_is_the_regression_on_what_is_seen(d, c, sigma):
    rng = np.random.default_rng(9)
    x = math.sqrt(c) * rng.standard_normal(1_000_000)
    y = d * x + sigma * rng.standard_normal(len(x))
    slope = x @ y / (y @ y)
    assert slope == pytest.approx(d * c / (d**2 * c + sigma**2), rel=0.01)
    assert np.mean((x - slope * y) ** 2) == pytest.approx(c * sigma**2 / (d**2 * c + sigma**2), rel=0.01)


@pytest.mark.equation("eq-refinement-linear")
def test_the_best_linear_answer_of_a_law_that_is_not_normal_is_its_regression():
    rng = np.random.default_rng(10)
    x = M + (rng.exponential(size=(400_000, 3)) - 1) @ np.linalg.cholesky(C).T
    y = x @ A.T + NOISE * rng.standard_normal((len(x), 2))
    design = np.c_[np.ones(len(y)), y]
    coefficients, *_ = np.linalg.lstsq(design, x, rcond=None)
    K = C @ A.T @ np.linalg.inv(A @ C @ A.T + NOISE**2 * np.eye(2))
    np.testing.assert_allclose(coefficients[1:].T, K, atol=0.02)
    np.testing.assert_allclose(coefficients[0], M - K @ A @ M, atol=0.02)
    assert np.mean(((x - design @ coefficients) ** 2).sum(1)) == pytest.approx(np.trace(C - K @ A @ C), rel=0.02)


def test_the_linear_rule_of_the_script_is_a_regression():
    rng = np.random.default_rng(11)
    x = torch.from_numpy(rng.standard_normal((3000, 16)) @ (rng.standard_normal((16, 16)) / 4)).view(-1, 1, 4, 4)
    K, k = linear_rule(Downsample(2), x)
    y = Downsample(2).forward(x).flatten(1).numpy()
    coefficients, *_ = np.linalg.lstsq(np.c_[np.ones(len(y)), y], x.flatten(1).numpy(), rcond=None)
    np.testing.assert_allclose(K.numpy(), coefficients[1:].T, atol=1e-2)
    np.testing.assert_allclose(k.numpy(), coefficients[0], atol=1e-2)


# From a drawing


@pytest.mark.equation("eq-refinement-start")
def test_the_walk_starts_at_the_drawing_noised_to_the_step():
    schedule, seen = Schedule.linear(), {}

    def spy(x, t):
        seen.setdefault(t, x)
        return Prediction.of("x0", torch.zeros_like(x), x, t, schedule)

    spy.schedule = schedule
    edited(spy, torch.full((20_000, 1, 1, 1), 0.7), 300)
    assert max(seen) == 300
    assert float(seen[300].mean()) == pytest.approx(0.7 * math.sqrt(ALPHA_BAR[300]), abs=0.02)
    assert float(seen[300].var()) == pytest.approx(1 - ALPHA_BAR[300], abs=0.02)


@pytest.mark.equation("eq-refinement-sdedit")
@pytest.mark.parametrize("tau", [100, 300, 600])
def test_the_results_of_a_drawing_in_a_gaussian_world_by_drawing_them(tau):
    rng, g = np.random.default_rng(12), np.array([1.5, 1.0, -2.0])
    signal, variance = math.sqrt(ALPHA_BAR[tau]), 1 - ALPHA_BAR[tau]
    x_tau = signal * g + math.sqrt(variance) * rng.standard_normal((500_000, 3))
    inner = np.linalg.inv(np.linalg.inv(C) + signal**2 / variance * np.eye(3))
    x = (np.linalg.solve(C, M) + signal / variance * x_tau) @ inner
    x += rng.standard_normal(x.shape) @ np.linalg.cholesky(inner).T
    K = signal**2 * C @ np.linalg.inv(signal**2 * C + variance * np.eye(3))
    np.testing.assert_allclose(x.mean(0), M + K @ (g - M), atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), C - K @ C @ K, atol=0.01)


@pytest.mark.equation("eq-refinement-realism")
def test_the_results_are_no_further_from_images_than_the_noised_drawings():
    """Images of two humps, drawings of one; every law is a table over a grid."""
    grid = np.linspace(-6, 6, 801)
    images = 0.3 * stats.norm.pdf(grid, -1.0, 0.3) + 0.7 * stats.norm.pdf(grid, 0.8, 0.2)
    drawings = stats.norm.pdf(grid, 0.2, 0.5)
    images, drawings = images / images.sum(), drawings / drawings.sum()

    def divergence(a, b):
        return np.sum(a * (np.log(a + 1e-300) - np.log(b + 1e-300)))

    before = math.inf
    for tau in (50, 200, 400, 700):
        noising = stats.norm.pdf(grid[:, None], math.sqrt(ALPHA_BAR[tau]) * grid, math.sqrt(1 - ALPHA_BAR[tau]))
        noising /= noising.sum(0)
        noised = noising @ images
        back = images[:, None] * noising.T / (noised + 1e-300)
        result = back @ (noising @ drawings)
        bound = divergence(noising @ drawings, noised)
        assert -1e-9 < divergence(result, images) <= bound + 1e-9
        assert bound < before
        before = bound


# The table


def stored():
    return json.loads(refinement_table.RESULTS.read_text())


def test_the_stored_table_is_that_of_the_script():
    found = stored()
    settings = found["settings"]
    assert (settings["images"], settings["steps"]) == (refinement_table.IMAGES, refinement_table.STEPS)
    assert settings["draws"] == refinement_table.DRAWS
    untrained = [(r["task"], r["method"]) for r in found["untrained"]]
    methods = ("real", "as seen", "linear", "null space", "PiGDM")
    assert untrained == [(task, method) for task in refinement_table.TASKS for method in methods]
    trained = [(r["task"], r["method"]) for r in found["trained"]]
    assert trained == [(task, m) for task in refinement_table.TASKS for m in ("conditional", "mean of 8")]
    assert [r["start"] for r in found["sdedit"]] == [0, *refinement_table.STARTS]
    assert len(found["strangers"]) == 2 * (1 + len(refinement_table.STRANGERS))


def test_the_figures_of_the_table_agree_with_each_other():
    found = stored()
    for row in found["untrained"] + found["trained"] + found["strangers"]:
        if row["mse"]:
            assert row["psnr"] == pytest.approx(10 * math.log10(4 / row["mse"]), abs=0.01)
    rows = {(r["task"], r["method"]): r for r in found["trained"]}
    for task, means in found["means"].items():
        assert means["1"] == pytest.approx(rows[task, "conditional"]["mse"], rel=1e-3)
        assert means["8"] == pytest.approx(rows[task, "mean of 8"]["mse"], rel=1e-3)
        E, V = means["1"] - rows[task, "conditional"]["variance"], rows[task, "conditional"]["variance"]
        for n in (2, 4, 8):
            assert means[str(n)] == pytest.approx(E + V / n, rel=0.02)


@pytest.mark.parametrize("task", refinement_table.TASKS)
def test_refinement_looks_more_like_real_images_than_what_was_seen(task):
    rows = {r["method"]: r for r in stored()["untrained"] + stored()["trained"] if r["task"] == task}
    for method in ("PiGDM", "conditional"):
        assert rows[method]["frechet"] < rows["as seen"]["frechet"]
        assert rows[method]["accuracy"] > rows["as seen"]["accuracy"]
    assert rows["mean of 8"]["psnr"] > rows["conditional"]["psnr"]
