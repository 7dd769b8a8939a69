"""The sampler: its one transition by hand, its manners, and its samples in worlds where the truth is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_denoiser
from torch import nn

from ddpm_lib import (
    Denoiser,
    Gaussian,
    GaussianMixture,
    Prediction,
    Schedule,
    sample,
    sample_steps,
    step,
    timesteps,
    transition,
)


def product(schedule: Schedule, s: int, t: int) -> float:
    """alpha_{s+1} ... alpha_t, multiplied one by one."""
    return math.prod((1 - schedule.beta[s + 1 : t + 1]).tolist())


def guess(schedule: Schedule, t: int, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    x_t, eps = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return Prediction.of("eps", eps, x_t, t, schedule)


# Time steps


def test_timesteps_start_at_T_and_end_at_0():
    assert timesteps(1000, 50) == list(range(1000, -1, -20))
    assert timesteps(10, 10) == list(range(10, -1, -1))
    assert timesteps(10, 4) == [10, 8, 5, 3, 0]
    assert timesteps(1000, 1) == [1000, 0]


@pytest.mark.parametrize(("T", "steps"), [(1000, 7), (1000, 999), (30, 29), (97, 13), (4000, 250)])
def test_timesteps_are_even_to_within_one(T, steps):
    path = timesteps(T, steps)
    assert len(path) == steps + 1
    assert (path[0], path[-1]) == (T, 0)
    strides = {t - s for t, s in itertools.pairwise(path)}
    assert strides <= {T // steps, T // steps + 1}


# One step


@pytest.mark.parametrize(("t", "s"), [(2, 1), (500, 499), (1000, 999), (1000, 400), (20, 1)])
def test_ancestral_step_is_the_posterior_at_the_guess(linear, t, s):
    """Equation 7 of the paper, from products of alpha."""
    prediction = guess(linear, t)
    bar_t, bar_s, alpha = product(linear, 0, t), product(linear, 0, s), product(linear, s, t)
    mean = math.sqrt(bar_s) * (1 - alpha) / (1 - bar_t) * prediction.x0
    mean = mean + math.sqrt(alpha) * (1 - bar_s) / (1 - bar_t) * prediction.x_t
    small = (1 - bar_s) / (1 - bar_t) * (1 - alpha)
    for variance, expected in (("beta", 1 - alpha), ("beta_tilde", small)):
        found, sigma = transition(prediction, t, s, linear, variance=variance)
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)
        assert sigma == pytest.approx(math.sqrt(expected), rel=1e-9)


def test_the_mean_in_the_form_of_algorithm_2(linear):
    """(x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), line 4 of the paper's algorithm 2."""
    for t in (1, 2, 600, 1000):
        prediction = guess(linear, t)
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / 999
        expected = prediction.x_t - beta / math.sqrt(1 - product(linear, 0, t)) * prediction.eps
        mean, _ = transition(prediction, t, t - 1, linear)
        torch.testing.assert_close(mean, expected / math.sqrt(1 - beta), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.25, 0.8, 1.0])
@pytest.mark.parametrize(("t", "s"), [(2, 1), (500, 499), (1000, 900), (40, 0)])
def test_ddim_step_is_equation_12_of_its_paper(cosine, eta, t, s):
    prediction = guess(cosine, t)
    bar_t, bar_s = product(cosine, 0, t), product(cosine, 0, s)
    sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    expected = math.sqrt(bar_s) * prediction.x0 + math.sqrt(1 - bar_s - sigma**2) * prediction.eps
    mean, found = transition(prediction, t, s, cosine, eta=eta, variance="beta_tilde")
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-11)
    assert found == pytest.approx(sigma, rel=1e-9)


def test_eta_scales_the_larger_variance_too(linear):
    _, sigma = transition(guess(linear, 50), 50, 40, linear, eta=0.5, variance="beta")
    assert sigma == pytest.approx(0.5 * math.sqrt(1 - product(linear, 40, 50)))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("t", [1, 2, 1000])
def test_the_last_step_adds_no_noise(linear, t, variance):
    prediction = guess(linear, t)
    mean, sigma = transition(prediction, t, 0, linear, variance=variance)
    assert sigma == 0
    torch.testing.assert_close(mean, prediction.x0, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert torch.equal(step(prediction, t, 0, linear, variance=variance, generator=generator), mean)
    assert torch.equal(generator.get_state(), before)


def test_a_step_is_the_mean_plus_sigma_times_normal_noise(linear):
    prediction = guess(linear, 300)
    mean, sigma = transition(prediction, 300, 299, linear)
    drawn = step(prediction, 300, 299, linear, generator=torch.Generator().manual_seed(3))
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, mean + sigma * z, rtol=0, atol=1e-14)


# The walk


class Constant(nn.Module):
    """A network that always answers with the same value."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x, steps):
        return torch.full_like(x, self.value)


def test_the_walk_goes_from_T_to_0_and_passes_its_states_on():
    walked = list(sample_steps(tiny_denoiser(), (2, 1, 4, 4), steps=6))
    assert [(state.t, state.s) for state in walked] == [(30, 25), (25, 20), (20, 15), (15, 10), (10, 5), (5, 0)]
    for before, after in itertools.pairwise(walked):
        assert after.x_t is before.x_s
    assert all(state.prediction.x0.abs().max() <= 1 for state in walked)


def test_sample_is_the_end_of_the_walk():
    denoiser, x_T = tiny_denoiser(), torch.randn(2, 1, 4, 4)
    for options in ({}, {"steps": [30, 7, 0]}, {"eta": 0.0, "clip": False}, {"variance": "beta_tilde", "steps": 3}):
        *_, last = sample_steps(denoiser, x_T=x_T, generator=torch.Generator().manual_seed(0), **options)
        found = sample(denoiser, x_T=x_T, generator=torch.Generator().manual_seed(0), **options)
        assert torch.equal(found, last.x_s)


def test_a_generator_repeats_the_samples_and_leaves_the_global_one_alone():
    denoiser = tiny_denoiser()
    before = torch.get_rng_state()
    a, b = (sample(denoiser, (3, 1, 4, 4), generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(sample(denoiser, (3, 1, 4, 4)), sample(denoiser, (3, 1, 4, 4)))


def test_ddim_draws_nothing_once_it_has_its_start():
    denoiser, x_T = tiny_denoiser(), torch.randn(2, 1, 4, 4)
    before = torch.get_rng_state()
    assert torch.equal(sample(denoiser, x_T=x_T, eta=0.0), sample(denoiser, x_T=x_T, eta=0.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_start_is_standard_normal():
    first = next(iter(sample_steps(Denoiser(Constant(0.0), Schedule.linear(30)), (40_000,))))
    assert stats.kstest(first.x_t.numpy(), "norm").pvalue > 0.01


def test_x0_is_clipped_before_the_mean_is_formed(linear):
    """With a network that finds no noise, x0 = x_t / signal is far outside; the mean must come from the clipped x0."""
    x_T = torch.tensor([[4.0], [-4.0]], dtype=torch.float64)
    state = next(iter(sample_steps(Denoiser(Constant(0.0), linear), x_T=x_T, eta=0.0)))
    bar_t, bar_s = product(linear, 0, 1000), product(linear, 0, 999)
    x0 = x_T.sign()
    expected = math.sqrt(bar_s) * x0 + math.sqrt((1 - bar_s) / (1 - bar_t)) * (x_T - math.sqrt(bar_t) * x0)
    torch.testing.assert_close(state.x_s, expected, rtol=1e-12, atol=0)
    free = next(iter(sample_steps(Denoiser(Constant(0.0), linear), x_T=x_T, eta=0.0, clip=False)))
    torch.testing.assert_close(free.x_s, math.sqrt(bar_s / bar_t) * x_T, rtol=1e-12, atol=0)


def test_dropout_is_off_while_sampling_and_on_again_after():
    denoiser, x_T = tiny_denoiser(dropout=0.5), torch.randn(1, 1, 4, 4)
    denoiser.train()
    walk = sample_steps(denoiser, x_T=x_T, eta=0.0)
    first = next(walk)
    assert denoiser.training
    assert denoiser.network.training
    assert torch.equal(first.x_s, next(sample_steps(denoiser, x_T=x_T, eta=0.0)).x_s)
    denoiser.eval()
    next(walk)
    assert not denoiser.training


def test_sampling_keeps_no_graph():
    assert not sample(tiny_denoiser(), (1, 1, 4, 4), steps=2).requires_grad


def test_labels_steer_the_samples():
    denoiser, options = tiny_denoiser(classes=3), {"x_T": torch.randn(1, 1, 4, 4), "eta": 0.0, "clip": False}
    outcomes = [sample(denoiser, condition=torch.tensor([c]), **options) for c in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(outcomes) for b in outcomes[:i])
    assert torch.equal(sample(denoiser, **options), outcomes[3])


def test_a_function_may_denoise_under_a_schedule_given_apart(linear):
    x_T = torch.randn(4, 2, dtype=torch.float64)
    world = Gaussian([0.0, 1.0], [[1.0, 0.2], [0.2, 0.5]])
    exact = world.denoiser(linear)
    found = sample(lambda x, t: exact(x, t), x_T=x_T, steps=5, eta=0.0, schedule=linear)
    assert torch.equal(found, sample(exact, x_T=x_T, steps=5, eta=0.0))


# Worlds where the truth is known


def gaussian_recursion(m: float, c: float, path: list[int], schedule: Schedule, eta: float, variance: str):
    """Mean and variance of the output when the data are N(m, c): each step is linear in x_t.

    E[x0 | x_t] = m + k (x_t - sqrt(bar_t) m), k = sqrt(bar_t) c / (bar_t c + 1 - bar_t), by the normal equations.
    """
    mean, spread = 0.0, 1.0
    for t, s in itertools.pairwise(path):
        bar_t, bar_s, alpha = product(schedule, 0, t), product(schedule, 0, s), product(schedule, s, t)
        k = math.sqrt(bar_t) * c / (bar_t * c + 1 - bar_t)
        small = (1 - bar_s) / (1 - bar_t) * (1 - alpha)
        # x_s = sqrt(bar_s) x0 + w (x_t - sqrt(bar_t) x0) / sqrt(1 - bar_t) + sigma z
        w = math.sqrt((1 - bar_s - eta**2 * small) / (1 - bar_t))
        by_x0 = math.sqrt(bar_s) - w * math.sqrt(bar_t)
        slope = by_x0 * k + w
        mean = slope * mean + by_x0 * (m - k * math.sqrt(bar_t) * m)
        noise = eta**2 * ((1 - alpha) if variance == "beta" else small)
        spread = slope**2 * spread + (noise if s > 0 else 0.0)
    return mean, spread


CHOICES = [(1.0, "beta"), (1.0, "beta_tilde"), (0.0, "beta_tilde"), (0.5, "beta")]


@pytest.mark.parametrize(("eta", "variance"), CHOICES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300])
def test_in_a_gaussian_world_each_step_follows_the_recursion(linear, steps, eta, variance):
    """The sampler is affine there: its slope and offset, read off at x_t = 0 and 1, carry mean and variance exactly."""
    path = timesteps(1000, steps)
    exact = Gaussian([0.3], [[0.04]]).denoiser(linear)
    mean, spread = 0.0, 1.0
    for t, s in itertools.pairwise(path):
        means, sigma = transition(
            exact(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t), t, s, linear, eta=eta, variance=variance
        )
        offset, slope = float(means[0]), float(means[1] - means[0])
        mean, spread = slope * mean + offset, slope**2 * spread + sigma**2
    expected = gaussian_recursion(0.3, 0.04, path, linear, eta, variance)
    assert (mean, spread) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("eta", "variance"), CHOICES)
@pytest.mark.parametrize("steps", [3, 10, 100])
def test_in_a_gaussian_world_samples_follow_the_recursion(linear, steps, eta, variance, generator):
    n = 20_000
    x_T = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    exact = Gaussian([0.3], [[0.04]]).denoiser(linear)
    x = sample(exact, x_T=x_T, steps=steps, eta=eta, variance=variance, clip=False, generator=generator)
    mean, spread = gaussian_recursion(0.3, 0.04, timesteps(1000, steps), linear, eta, variance)
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(spread / n))
    assert float(x.var()) == pytest.approx(spread, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize(("eta", "variance"), CHOICES)
def test_the_error_falls_at_first_order_in_the_number_of_steps(eta, variance):
    """Twice the steps, half the error of the variance, up to where a step of the schedule itself is in sight."""
    schedule = Schedule.linear(3200)
    exact = Gaussian([0.3], [[0.25]]).denoiser(schedule)
    errors = []
    for steps in (50, 100, 200, 400):
        spread = 1.0
        for t, s in zip(path := timesteps(3200, steps), path[1:]):
            means, sigma = transition(
                exact(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t), t, s, schedule, eta=eta, variance=variance
            )
            spread = float(means[1] - means[0]) ** 2 * spread + sigma**2
        errors.append(abs(spread - 0.25))
    ratios = np.divide(errors[:-1], errors[1:])
    assert (np.diff(errors) < 0).all()
    assert ((ratios > 1.6) & (ratios < 2.4)).all()


MIXTURE = GaussianMixture(
    [0.5, 0.3, 0.2],
    [[-1.0, -0.5], [1.0, 0.8], [0.9, -1.2]],
    [[[0.05, 0.02], [0.02, 0.04]], [[0.02, 0.0], [0.0, 0.1]], [[0.03, -0.02], [-0.02, 0.05]]],
)


def mixture_samples(schedule, steps, n=4000, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return sample(MIXTURE.denoiser(schedule), x_T=x_T, steps=steps, clip=False, generator=generator, **options)


def energy_distance(a, b) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def permutation_p_value(a, b, rounds: int = 200) -> float:
    """Share of random relabellings with an energy distance as large as that of a and b."""
    both = torch.cat([a, b])
    distances = torch.cdist(both, both)
    sign = torch.ones(len(both), rounds + 1, dtype=torch.float64)
    sign[len(a) :] = -1
    rng = torch.Generator().manual_seed(0)
    for i in range(1, rounds + 1):
        sign[:, i] = sign[torch.randperm(len(both), generator=rng), 0]
    energy = -(sign * (distances @ sign)).sum(0)
    return float((energy >= energy[0]).double().mean())


@pytest.fixture(scope="module")
def walked(linear):
    return mixture_samples(linear, None)


def test_samples_of_the_exact_denoiser_have_the_moments_of_the_data(walked):
    n = len(walked)
    deviation = MIXTURE.covariance.diagonal().sqrt()
    assert ((walked.mean(0) - MIXTURE.mean).abs() < 4 * deviation / math.sqrt(n)).all()
    assert ((walked.T.cov() - MIXTURE.covariance).abs() < 0.05 * MIXTURE.covariance.diagonal().mean()).all()
    share = MIXTURE.responsibilities(walked).mean(0)
    assert ((share - MIXTURE.weights).abs() < 4 * (MIXTURE.weights * (1 - MIXTURE.weights) / n).sqrt()).all()


def test_samples_of_the_exact_denoiser_pass_two_sample_tests(walked, generator):
    data = MIXTURE.sample(len(walked), generator)
    for angle in np.linspace(0, math.pi, 6, endpoint=False):
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        assert stats.ks_2samp((walked @ direction).numpy(), (data @ direction).numpy()).pvalue > 0.005
    assert permutation_p_value(walked[:1000], data[:1000]) > 0.02


def test_the_two_sample_test_sees_a_sampler_that_is_a_little_wrong(linear, generator):
    """Five steps are too few: the same test that accepts the full walk refuses them."""
    data = MIXTURE.sample(1000, generator)
    assert permutation_p_value(mixture_samples(linear, 5, 1000), data) <= 0.01


@pytest.mark.parametrize(("eta", "variance"), [(1.0, "beta"), (1.0, "beta_tilde"), (0.0, "beta_tilde")])
def test_fewer_steps_give_worse_samples(linear, generator, eta, variance):
    data = MIXTURE.sample(4000, generator)
    distances = [
        energy_distance(mixture_samples(linear, steps, eta=eta, variance=variance), data) for steps in (2, 5, 20, 200)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[3] < 0.5 * distances[2] + 1e-3
    assert distances[0] > 20 * distances[3]


def test_noise_after_the_last_step_would_be_seen(walked, generator):
    """The mistake of two widely read tutorials, at the size it has with 50 steps, against the likelihood of data."""

    def z_score(x):
        """How far the mean log density of x lies from that of data, in standard errors."""
        ours, theirs = MIXTURE.log_prob(x), MIXTURE.log_prob(MIXTURE.sample(len(x), generator))
        return float((ours.mean() - theirs.mean()) / ((ours.var() + theirs.var()) / len(x)).sqrt())

    noise = torch.randn(walked.shape, dtype=torch.float64, generator=generator)
    assert abs(z_score(walked)) < 4
    assert z_score(walked + math.sqrt(1 - product(Schedule.linear(1000), 0, 20)) * noise) < -4


def test_dropout_is_off_in_every_part_and_each_part_gets_its_own_mode_back():
    inner = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)))
    network = Told(inner)
    denoiser = Denoiser(network, Schedule.linear(30))
    denoiser.eval()
    inner.train()  # as a trainer does with what a wrapper holds
    x_T = torch.randn(2, 1, 4, 4)
    assert torch.equal(*(sample(denoiser, x_T=x_T, steps=5, eta=0.0) for _ in range(2)))
    assert (denoiser.training, network.training, inner.training) == (False, False, True)


class Told(nn.Module):
    """A network that is told the step and does not mind it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, steps):
        return self.inner(x)


def test_a_shape_that_contradicts_the_start_is_refused():
    with pytest.raises(ValueError, match=r"shape is \(16, 1, 4, 4\), but x_T has the shape \(4, 1, 4, 4\)"):
        sample(tiny_denoiser(), (16, 1, 4, 4), x_T=torch.randn(4, 1, 4, 4))


def test_an_empty_batch_is_an_empty_batch():
    assert sample(tiny_denoiser(classes=3), (0, 1, 4, 4), steps=2, condition=torch.arange(0)).shape == (0, 1, 4, 4)


def test_after_a_walk_in_inference_mode_gradients_can_be_taken():
    denoiser = tiny_denoiser().eval()
    x_t = torch.randn(2, 1, 4, 4)
    with torch.inference_mode():
        sample(denoiser, x_T=x_t, steps=2)
    x = x_t.clone().requires_grad_()
    denoiser(x, 20).x0.sum().backward()
    assert x.grad.isfinite().all()
