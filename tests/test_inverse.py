"""Inverse problems: degradations against dense matrices, methods against exact posteriors in analytic worlds."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_models import tiny_denoiser
from torch import nn

from ddpm_lib import (
    DPS,
    MMPS,
    Blur,
    Denoiser,
    Downsample,
    Gaussian,
    GaussianMixture,
    Grey,
    Guided,
    Mask,
    NullSpace,
    PiGDM,
    Prediction,
    Replacement,
    Schedule,
    UNet,
    Windows,
    repaint,
    repaint_path,
    sample,
    timesteps,
)

SCHEDULE = Schedule.linear(1000)
PLAIN = {"clip": False, "variance": "beta_tilde", "steps": 100}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


# Degradations


def dense(A, shape):
    """The matrix of A for images of this shape, column by column."""
    columns = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return A.forward(columns).flatten(1).T.numpy()


AVERAGE = np.kron(np.eye(3), [[0.5, 0.5]])
KEEP = torch.rand(4, 6, generator=seeded(1)) < 0.5
CASES = {
    "mask": (Mask(KEEP), (1, 4, 6), np.diag(KEEP.flatten().numpy().astype(float))),
    "points": (Mask(torch.tensor([True, False, True])), (3,), np.diag([1.0, 0.0, 1.0])),
    "downsample": (Downsample(2), (1, 4, 6), np.kron(np.kron(np.eye(2), [[0.5, 0.5]]), AVERAGE)),
    "grey": (Grey((0.5, -1.0, 2.0)), (3, 2, 2), np.kron([[0.5, -1.0, 2.0]], np.eye(4))),
    "blur": (Blur(1.5), (1, 5, 6), None),
    "strong blur": (Blur(4.0), (1, 5, 6), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_degradation_is_its_matrix(name):
    A, shape, matrix = CASES[name]
    found = dense(A, shape)
    if matrix is not None:
        np.testing.assert_allclose(found, matrix, atol=1e-12)
    x = normal(5, *shape)
    y = A.forward(normal(5, *shape, seed=2))
    np.testing.assert_allclose(A.forward(x).flatten(1), x.flatten(1).numpy() @ found.T, atol=1e-12)
    np.testing.assert_allclose(A.transpose(y).flatten(1), y.flatten(1).numpy() @ found, atol=1e-12)
    inverse = y.flatten(1).numpy() @ np.linalg.pinv(found, rcond=1e-7).T
    np.testing.assert_allclose(A.pseudo_inverse(y).flatten(1), inverse, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(A.forward(A.pseudo_inverse(y)), y, rtol=1e-9, atol=1e-9)
    ridge = y.flatten(1).numpy() @ np.linalg.inv(found @ found.T + 0.3 * np.eye(len(found))) @ found
    np.testing.assert_allclose(A.pseudo_inverse(y, 0.3).flatten(1), ridge, atol=1e-10)


def test_the_blur_is_that_of_scipy_with_reflecting_edges():
    x = normal(2, 3, 9, 12)
    expected = ndimage.gaussian_filter(x.numpy(), 1.5, mode="reflect", truncate=12, axes=(2, 3))
    np.testing.assert_allclose(Blur(1.5).forward(x), expected, atol=1e-4)
    assert Blur(1.5).forward(x.float()).dtype == torch.float32


# The exact posterior of a Gaussian


def world(d, seed=3):
    """A Gaussian whose neighbouring numbers go together."""
    i = torch.arange(d, dtype=torch.float64)
    spread = 0.6 + 0.1 * i
    covariance = 0.8 ** (i[:, None] - i).abs() * spread[:, None] * spread
    return Gaussian(0.5 * normal(d, seed=seed), (covariance + covariance.T) / 2)


def linear(law):
    """The optimal denoiser of a Gaussian as one product of matrices: fast."""
    m, C = law.mean, law.covariance

    def denoiser(x_t, t):
        a = float(SCHEDULE.alpha_bar[t])
        gain = math.sqrt(a) * C @ torch.linalg.inv(a * C + (1 - a) * torch.eye(len(m), dtype=torch.float64))
        return Prediction.of("x0", m + (x_t - math.sqrt(a) * m) @ gain.T, x_t, t, SCHEDULE)

    denoiser.schedule = SCHEDULE
    return denoiser


def law_of(method, d):
    """Mean and covariance of the samples of a method whose x0 is linear in x_t: no random numbers.

    In ancestral sampling x_s = c0 x0 + ct x_t + noise, so both moments follow step by step.
    """
    mean, covariance = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)])
    for t in range(SCHEDULE.T, 0, -1):
        x0 = method(points, t).x0
        c0, ct, variance = SCHEDULE.posterior_coefficients(t)
        step = c0 * (x0[1:] - x0[0]).T + ct * torch.eye(d, dtype=torch.float64)
        mean, covariance = step @ mean + c0 * x0[0], step @ covariance @ step.T
        covariance = covariance + variance * torch.eye(d, dtype=torch.float64)
    return mean, covariance


class Matrix:
    """A degradation by any matrix, for points."""

    def __init__(self, A):
        self.A = A

    def forward(self, x):
        return x @ self.A.T

    def transpose(self, y):
        return y @ self.A

    def pseudo_inverse(self, y, ridge=0.0):
        A = self.A.numpy()
        inverse = A.T @ np.linalg.inv(A @ A.T + float(ridge) * np.eye(len(A)))
        return y @ torch.from_numpy(inverse).T


def posterior(law, A, y, sigma):
    """Mean and covariance of x given y, by conditioning the joint Gaussian."""
    m, C = law.mean.numpy(), law.covariance.numpy()
    gain = C @ A.T @ np.linalg.pinv(A @ C @ A.T + sigma**2 * np.eye(len(A)), hermitian=True)
    left = C - gain @ A @ C
    return torch.from_numpy(m + gain @ (y - A @ m)), torch.from_numpy((left + left.T) / 2)


def exact_denoiser(law, A, y, sigma):
    """E[x0 | x_t, y]: the denoiser of the posterior, by conditioning x0 on (y, x_t) at once."""
    m, C, d = law.mean.numpy(), law.covariance.numpy(), len(law.mean)

    def at(x_t, t):
        alpha_bar = float(SCHEDULE.alpha_bar[t])
        H = np.vstack([A, math.sqrt(alpha_bar) * np.eye(d)])
        R = np.diag([sigma**2] * len(A) + [1 - alpha_bar] * d)
        gain = C @ H.T @ np.linalg.inv(H @ C @ H.T + R)
        seen = np.hstack([np.broadcast_to(y, (len(x_t), len(y))), x_t.numpy()])
        return torch.from_numpy(m + (seen - H @ m) @ gain.T)

    return at


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("t", [3, 400, 1000])
def test_mmps_is_the_exact_posterior_of_any_gaussian(sigma, t):
    law, A, y = world(8), normal(3, 8, seed=4).numpy(), np.array([0.7, -1.0, 0.4])
    wrapped = MMPS(law.denoiser(SCHEDULE), Matrix(torch.from_numpy(A)), torch.from_numpy(y)[None], sigma, 3)
    x_t = normal(6, 8, seed=5)
    expected = exact_denoiser(law, A, y, sigma)(x_t, t)
    torch.testing.assert_close(wrapped(x_t, t).x0, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_pigdm_is_exact_for_independent_numbers_of_one_variance_and_only_then(sigma):
    A, y = normal(3, 8, seed=4).numpy(), np.array([0.7, -1.0, 0.4])
    degradation, x_t = Matrix(torch.from_numpy(A)), normal(6, 8, seed=5)
    for law, right in ((Gaussian(0.3 * torch.ones(8), 0.5 * torch.eye(8)), True), (world(8), False)):
        wrapped = PiGDM(law.denoiser(SCHEDULE), degradation, torch.from_numpy(y)[None], sigma, 0.5)
        error = max(
            float((wrapped(x_t, t).x0 - exact_denoiser(law, A, y, sigma)(x_t, t)).abs().max()) for t in (3, 400, 1000)
        )
        assert (error < 1e-9) if right else (error > 0.05)


def test_dps_takes_the_step_of_algorithm_1():
    """x_{t-1} as without y, then minus zeta times the gradient of |y - A x0(x_t)|^2."""
    law, A, zeta, t = world(4), normal(2, 4, seed=4), 0.05, 300
    y, x_t = normal(5, 2, seed=6), normal(5, 4, seed=5).requires_grad_()
    plain = law.denoiser(SCHEDULE)
    loss = (y - plain(x_t, t).x0 @ A.T).square().sum()
    expected = SCHEDULE.posterior(x_t, plain(x_t, t).x0, t)[0] - zeta * torch.autograd.grad(loss, x_t)[0]

    def weight(x_t, t):
        return 2 * zeta / (float(SCHEDULE.signal[t]) * SCHEDULE.posterior_coefficients(t)[0])

    found = DPS(plain, Matrix(A), y, weight)(x_t.detach(), t)
    torch.testing.assert_close(SCHEDULE.posterior(found.x_t, found.x0, t)[0], expected.detach())


def test_dps_with_the_weight_of_equation_16_adds_the_gradient_of_that_likelihood():
    law, A, sigma, t = world(4), normal(2, 4, seed=4), 0.3, 300
    y, x_t = normal(5, 2, seed=6), normal(5, 4, seed=5)
    plain = law.denoiser(SCHEDULE)

    def log_likelihood(x):
        return -(y - plain(x, t).x0 @ A.T).square().sum(1) / (2 * sigma**2)

    h, eye = 1e-5, torch.eye(4, dtype=torch.float64)
    slope = torch.stack([(log_likelihood(x_t + h * e) - log_likelihood(x_t - h * e)) / (2 * h) for e in eye], 1)
    weight = float(SCHEDULE.noise[t] / SCHEDULE.signal[t]) ** 2 / sigma**2
    found = DPS(plain, Matrix(A), y, lambda x_t, t: weight)(x_t, t).score
    torch.testing.assert_close(found, plain(x_t, t).score + slope, rtol=1e-6, atol=1e-6)


# Sampling: the plane, where the first number is known

LAW = Gaussian([0.3, -0.2], [[1.0, 0.8], [0.8, 1.0]])
FIRST = Mask(torch.tensor([True, False]))
Y = torch.tensor([[1.2, 0.0]], dtype=torch.float64)
MEAN, DEVIATION = -0.2 + 0.8 * 0.9, 0.6  # of the second number given the first
N = 8000


def second(method, walk=sample, **options):
    """Mean and deviation of the second number over samples, with the first one checked."""
    x = walk(method, x_T=normal(N, 2), generator=seeded(1), **PLAIN | options)
    assert torch.equal(x[:, 0], Y[:, 0].expand(N))
    return float(x[:, 1].mean()), float(x[:, 1].std())


@pytest.mark.parametrize(("d", "sigma"), [(2, 0.0), (8, 0.3)])
def test_moment_matching_samples_the_posterior_and_the_others_do_not(d, sigma):
    law = LAW if d == 2 else world(8)
    keep = torch.arange(d) % 3 == 0
    A, plain = Mask(keep), linear(law)
    y = 1.2 * keep.double()[None]
    mean, covariance = posterior(law, np.eye(d)[keep.numpy()], np.full(int(keep.sum()), 1.2), sigma)

    def error(method):
        found_mean, found_covariance = law_of(method, d)
        return float((found_mean - mean).norm()), float((found_covariance - covariance).norm() / covariance.norm())

    right = error(MMPS(plain, A, y, sigma, iterations=d))
    pseudo = error(PiGDM(plain, A, y, sigma, float(law.covariance.diagonal().mean())))
    null = error(NullSpace(plain, A, y))
    assert right[0] < 0.001
    assert right[1] < 0.02  # of the finite steps
    assert 0.02 < pseudo[0] < null[0] / 4
    assert 0.03 < pseudo[1] < null[1] / 5


def test_replacement_follows_its_own_recursion_and_that_is_not_the_posterior():
    """With fresh noise at every step the second number is a chain of its own: mean and variance by hand."""
    m, C = LAW.mean.numpy(), LAW.covariance.numpy()
    mean, variance = 0.0, 1.0
    for t, s in pairwise(timesteps(1000, 100)):
        a, b = float(SCHEDULE.alpha_bar[t]), float(SCHEDULE.alpha_bar[s])
        gain = math.sqrt(a) * C @ np.linalg.inv(a * C + (1 - a) * np.eye(2))
        step_variance = (1 - b) / (1 - a) * (1 - a / b)
        c0, ct = math.sqrt(b) * (1 - a / b) / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a)
        known = math.sqrt(a) * (Y[0, 0].item() - m[0])
        mean = c0 * (m[1] + gain[1] @ [known, mean - math.sqrt(a) * m[1]]) + ct * mean
        variance = (c0 * gain[1, 1] + ct) ** 2 * variance + (c0 * gain[1, 0]) ** 2 * (1 - a) + step_variance
    found = second(Replacement(linear(LAW), FIRST, Y, seeded(9)))
    assert found == pytest.approx((mean, math.sqrt(variance)), abs=0.04)
    assert mean < MEAN - 0.2  # too little of what is known arrives
    assert math.sqrt(variance) > DEVIATION + 0.05


def test_the_null_space_alone_errs_in_the_same_direction_and_walking_back_helps():
    plain = linear(LAW)
    mean, covariance = law_of(NullSpace(plain, FIRST, Y), 2)
    assert second(NullSpace(plain, FIRST, Y)) == pytest.approx(
        (float(mean[1]), float(covariance[1, 1].sqrt())), abs=0.03
    )
    assert mean[1] < MEAN - 0.2
    assert covariance[1, 1].sqrt() > DEVIATION + 0.08
    assert covariance[0].abs().max() < 1e-20
    means = [
        second(Replacement(plain, FIRST, Y, seeded(9)), repaint, steps=50, jump=5, resamplings=r)[0] for r in (1, 8)
    ]
    assert means[0] + 0.15 < means[1] < MEAN


def test_a_likelihood_that_is_too_sure_narrows_and_one_that_is_too_loose_does_not_arrive():
    plain, noise, sigma = linear(LAW), SCHEDULE.noise / SCHEDULE.signal, 0.5
    true_mean, true_covariance = posterior(LAW, np.eye(2)[:1], np.array([1.2]), sigma)
    sure_mean, sure = law_of(DPS(plain, FIRST, Y, lambda x_t, t: float(noise[t] / sigma) ** 2), 2)
    assert (sure.diagonal() < 0.9 * true_covariance.diagonal()).all()
    assert (sure_mean > true_mean + 0.05).all()
    loose_mean, _ = law_of(DPS(plain, FIRST, Y, 0.3), 2)
    assert (loose_mean < torch.tensor([1.2, MEAN]) - 0.02).all()


def test_no_method_gives_two_modes_of_the_posterior_their_shares():
    """What is known first decides late, when the hole has chosen its side: the share of the upper mode is too low."""
    law = GaussianMixture([0.5, 0.5], [[1.0, 1.0], [-1.0, -1.0]], [0.09, 0.09])
    y = torch.tensor([[0.15, 0.0]], dtype=torch.float64)
    log_odds = 2 * 0.15 / 0.09  # of the upper mode, by Bayes' rule
    share = 1 / (1 + math.exp(-log_odds))
    plain, upper = law.denoiser(SCHEDULE), {}
    for method in (NullSpace(plain, FIRST, y), PiGDM(plain, FIRST, y, 0.0, 1.09)):
        x = sample(method, x_T=normal(1000, 2), generator=seeded(1), **PLAIN | {"steps": 50})
        above = x[:, 1] > 0
        upper[type(method)] = float(above.double().mean())
        assert x[above, 1].mean() == pytest.approx(1, abs=0.15)  # within a mode all is well
        assert x[above, 1].std() == pytest.approx(0.3, abs=0.1)
    assert 0.5 < upper[NullSpace] < upper[PiGDM] - 0.04 < share - 0.15


# Around a network


def network():
    torch.manual_seed(0)
    unet = UNet(8, 1, 8, (1, 2), 1, (4,), dropout=0.5, groups=4, classes=3)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Denoiser(unet, Schedule.linear(50))


IMAGES = normal(3, 1, 8, 8, seed=7).float().clamp(-1, 1)
HOLE = torch.ones(8, 8, dtype=torch.bool)
HOLE[2:6, 2:6] = False


@pytest.mark.parametrize("make", [NullSpace, Replacement, DPS, PiGDM, MMPS])
def test_a_network_is_steered_without_being_changed(make):
    plain, A = network(), Mask(HOLE)
    y = A.forward(IMAGES)
    wrapped = make(Guided(plain, 0.5), A, y)
    x = sample(wrapped, IMAGES.shape, steps=5, condition=torch.tensor([0, 1, 2]), generator=seeded(0))
    assert x.shape == IMAGES.shape
    assert x.isfinite().all()
    assert not x.requires_grad
    assert plain.training
    assert wrapped.training
    assert all(parameter.grad is None for parameter in plain.parameters())
    if issubclass(make, NullSpace):
        assert torch.equal(x[..., HOLE], IMAGES[..., HOLE])
        assert not torch.equal(x[..., ~HOLE], IMAGES[..., ~HOLE])


def test_replacement_shows_the_network_y_with_the_noise_of_its_step():
    seen = []

    def blind(x_t, t):
        seen.append(x_t)
        return Prediction.of("x0", torch.zeros_like(x_t), x_t, t, SCHEDULE)

    blind.schedule = SCHEDULE
    t, x_t = 600, normal(N, 2)
    found = Replacement(blind, FIRST, Y, seeded(3))(x_t, t)
    first = seen[0][:, 0]
    assert float(first.mean()) == pytest.approx(1.2 * float(SCHEDULE.signal[t]), abs=0.03)
    assert float(first.std()) == pytest.approx(float(SCHEDULE.noise[t]), abs=0.02)
    assert torch.equal(seen[0][:, 1], x_t[:, 1])
    assert torch.equal(found.x_t, seen[0])
    assert torch.equal(found.x0, Y.expand(N, 2) * torch.tensor([1, 0]))


def test_a_path_that_climbs():
    assert repaint_path(4, 4, 2, 2) == [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0]
    assert repaint_path(3, 3, 2, 2) == [3, 2, 1, 0, 1, 2, 1, 0]
    assert repaint_path(1000, 50, 7, 1) == timesteps(1000, 50)
    for steps, jump, resamplings in ((50, 10, 5), (50, 7, 3), (3, 3, 4)):
        path = repaint_path(1000, steps, jump, resamplings)
        assert path[0] == 1000
        assert path[-1] == 0
        assert sum(s < t for t, s in pairwise(path)) == steps + steps // jump * jump * (resamplings - 1)


def test_one_pass_of_repaint_is_sample():
    plain, A = network().eval(), Mask(HOLE)
    y, options = A.forward(IMAGES), {"steps": 6, "eta": 0.5, "condition": torch.tensor([0, 1, 2])}
    walks = [
        walk(NullSpace(plain, A, y), IMAGES.shape, generator=seeded(4), **options, **more)
        for walk, more in ((sample, {}), (repaint, {"jump": 3, "resamplings": 1}))
    ]
    assert torch.equal(*walks)


def test_climbing_keeps_the_law_of_x_t():
    """In a world that knows nothing of y, going back up must leave the samples' law as it is."""
    law = world(2)
    walks = [
        walk(linear(law), x_T=normal(N, 2), generator=seeded(1), **PLAIN, **more)
        for walk, more in ((sample, {}), (repaint, {"jump": 10, "resamplings": 3}))
    ]
    torch.testing.assert_close(walks[1].mean(0), law.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(walks[1].T.cov(), walks[0].T.cov(), rtol=0.1, atol=0.02)


# Windows


def test_windows_average_where_they_overlap():
    plain = network().eval()
    x_t, label = normal(2, 1, 10, 13, seed=8).float(), torch.tensor([0, 2])
    with torch.no_grad():
        found = Windows(plain, (8, 8), (2, 3))(x_t, 20, label)
        total, count = torch.zeros_like(x_t), torch.zeros_like(x_t)
        for row in (0, 2):
            for column in (0, 3, 5):
                crop = x_t[:, :, row : row + 8, column : column + 8]
                total[:, :, row : row + 8, column : column + 8] += plain(crop, 20, label).eps
                count[:, :, row : row + 8, column : column + 8] += 1
        torch.testing.assert_close(found.eps, total / count, rtol=1e-4, atol=1e-4)
        one = x_t[:, :, :8, :8]
        torch.testing.assert_close(Windows(plain, (8, 8), (4, 4))(one, 20, label).x0, plain(one, 20, label).x0)


# Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mask(torch.ones(2)), "keep must hold True and False"),
        (lambda: Mask(HOLE).forward(torch.zeros(1, 1, 4, 4)), "does not fit images of shape"),
        (lambda: Mask(torch.ones(2, 1, 8, 8, dtype=torch.bool)).forward(IMAGES[:1]), "does not fit images of shape"),
        (lambda: Downsample(0), "factor must be 1 or more"),
        (lambda: Downsample(3).forward(IMAGES), "multiples of 3"),
        (lambda: Grey((0, 0)), "not all 0"),
        (lambda: Grey().forward(IMAGES), "must have shape \\(B, 3, H, W\\)"),
        (lambda: Blur(0), "a deviation above 0"),
        (lambda: Blur(1).forward(torch.zeros(3, 3)), "must have shape \\(B, C, H, W\\)"),
        (lambda: NullSpace(network(), Mask(HOLE), IMAGES[:2])(IMAGES, 3), "one observation"),
        (lambda: PiGDM(network(), Mask(HOLE), IMAGES, -0.1), "deviation of the noise in y"),
        (lambda: PiGDM(network(), Mask(HOLE), IMAGES, 0.1, 0), "data_variance must be above 0"),
        (lambda: MMPS(network(), Mask(HOLE), IMAGES, 0.1, 0), "iterations must be 1 or more"),
        (lambda: repaint_path(100, 5, 6), "at most the whole walk of 5 steps; got 6"),
        (lambda: repaint(network()), "give the shape of the samples"),
        (lambda: Windows(network(), (8, 8), (9, 8)), "stride must lie in 1..size"),
        (lambda: Windows(network(), (8, 8), (8, 8))(torch.zeros(1, 1, 8, 7), 3), "at least one window"),
        (lambda: Windows(network(), (8, 8), (8, 8))(torch.zeros(8, 8), 3), "must have shape \\(B, C, H, W\\)"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dropout_is_off_while_repaint_walks():
    denoiser = tiny_denoiser(dropout=0.5).train()
    options = {"x_T": torch.randn(2, 1, 4, 4), "steps": 4, "jump": 2, "eta": 0.0, "clip": False}
    assert torch.equal(*(repaint(denoiser, **options, generator=seeded(0)) for _ in range(2)))
    assert denoiser.network.training


def test_a_ridge_for_each_image_is_its_own():
    y, ridge = torch.randn(2, 1, 6, 6), torch.tensor([0.01, 1.0]).view(2, 1, 1, 1)
    for degradation in (Blur(1.0), Downsample(2)):
        alone = [degradation.pseudo_inverse(y[i : i + 1], float(ridge[i])) for i in range(2)]
        torch.testing.assert_close(degradation.pseudo_inverse(y, ridge), torch.cat(alone))
