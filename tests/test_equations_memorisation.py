"""The equations of the chapter "Learned or memorised", each against an independent computation."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize

from ddpm_lib import Guided, Prediction, Schedule, digits, sample
from scripts import memorisation
from scripts.memorisation import copies, distances

SCHEDULE = Schedule.cosine()
RNG = np.random.default_rng(0)


def shares(x_t, pictures, alpha_bar):
    """The weights of the equation, one for each picture (N, d)."""
    exponents = -((x_t - math.sqrt(alpha_bar) * pictures) ** 2).sum(1) / (2 * (1 - alpha_bar))
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


def minimiser(x_t, pictures, alpha_bar):
    return shares(x_t, pictures, alpha_bar) @ pictures


# The best possible denoiser


@pytest.mark.equation("eq-memorisation-minimiser")
def test_the_minimiser_is_the_mean_of_the_pictures_that_gave_a_noisy_point():
    pictures, named_a, alpha_bar = np.array([-1.0, -0.2, 0.9]), np.array([True, False, True]), 0.6
    which = RNG.integers(0, 3, 4_000_000)
    x_t = math.sqrt(alpha_bar) * pictures[which] + math.sqrt(1 - alpha_bar) * RNG.standard_normal(len(which))
    for point in (-0.8, 0.1, 0.5):
        here = (abs(x_t - point) < 0.01) & named_a[which]
        expected = pictures[which[here]].mean()
        error = pictures[which[here]].std() / math.sqrt(here.sum())
        ours = minimiser(np.array([point]), pictures[named_a, None], alpha_bar)[0]
        assert ours == pytest.approx(expected, abs=4 * error + 2e-3)


@pytest.mark.equation("eq-memorisation-single")
def test_with_one_picture_of_a_name_the_noise_does_not_matter():
    """Least squares over all affine guesses of noisy versions of one picture finds the picture and no slope."""
    picture, alpha_bar = 0.7, 0.3
    x_t = math.sqrt(alpha_bar) * picture + math.sqrt(1 - alpha_bar) * RNG.standard_normal(1000)
    found = optimize.minimize(lambda p: np.mean((p[0] + p[1] * x_t - picture) ** 2), [0.0, 0.5], tol=1e-12).x
    np.testing.assert_allclose(found, [picture, 0], atol=1e-5)
    for point in x_t[:5]:
        assert minimiser(np.array([point]), np.array([[picture]]), alpha_bar)[0] == picture


@pytest.mark.equation("eq-memorisation-ends")
def test_the_guess_is_as_near_to_a_training_picture_as_promised():
    tightest = 0.0
    for alpha_bar in (0.5, 0.9, 0.99):
        for n in (2, 5, 40):
            pictures = RNG.uniform(-1, 1, (n, 6))
            x_t = math.sqrt(alpha_bar) * pictures[0] + math.sqrt(1 - alpha_bar) * RNG.standard_normal(6)
            away = ((x_t - math.sqrt(alpha_bar) * pictures) ** 2).sum(1)
            first, second = np.sort(away)[:2]
            nearest = pictures[away.argmin()]
            off = np.linalg.norm(minimiser(x_t, pictures, alpha_bar) - nearest)
            farthest = np.linalg.norm(pictures - nearest, axis=1).max()
            bound = (n - 1) * math.exp(-(second - first) / (2 * (1 - alpha_bar))) * farthest
            assert off <= bound * (1 + 1e-9) + 1e-15
            tightest = max(tightest, off / bound)
    assert tightest > 0.9


@pytest.mark.equation("eq-memorisation-ends")
def test_the_walk_of_the_memoriser_ends_on_training_pictures():
    pictures = torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 2)

    def memoriser(x_t, t):
        x0 = np.stack([minimiser(x.numpy(), pictures.numpy(), float(SCHEDULE.alpha_bar[t])) for x in x_t])
        return Prediction.of("x0", torch.from_numpy(x0), x_t, t, SCHEDULE)

    memoriser.schedule = SCHEDULE
    x_T = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = sample(memoriser, x_T=x_T, steps=50, generator=torch.Generator().manual_seed(2), variance="beta_tilde")
    nearest = torch.cdist(drawn, pictures).min(1)
    assert nearest.values.median() < 1e-6
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) > 15


@pytest.mark.equation("eq-memorisation-two")
@pytest.mark.equation("eq-memorisation-slope")
def test_between_two_pictures_the_guess_follows_a_tanh():
    pictures, alpha_bar = RNG.uniform(-1, 1, (2, 3)), 0.8
    delta, middle = pictures[0] - pictures[1], pictures.mean(0)
    for _ in range(5):
        x_t = RNG.standard_normal(3)
        u = math.sqrt(alpha_bar) * delta @ (x_t - math.sqrt(alpha_bar) * middle) / (2 * (1 - alpha_bar))
        np.testing.assert_allclose(middle + math.tanh(u) * delta / 2, minimiser(x_t, pictures, alpha_bar), atol=1e-12)
    h, direction = 1e-5, delta / np.linalg.norm(delta)
    either = [minimiser(math.sqrt(alpha_bar) * middle + s * h * direction, pictures, alpha_bar) for s in (1, -1)]
    slope = (either[0] - either[1]) @ direction / (2 * h)
    assert slope == pytest.approx(math.sqrt(alpha_bar) * (delta @ delta) / (4 * (1 - alpha_bar)), rel=1e-6)


# Copies


@pytest.mark.equation("eq-memorisation-copy")
def test_a_copy_is_less_than_a_third_as_far_from_the_nearest_as_from_the_second():
    seen = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    points = torch.tensor([[0.24, 0.0], [0.26, 0.0], [0.5, 0.0], [1.0, 0.1], [-0.6, 0.0]])
    assert [copies(point[None], seen) for point in points] == [1, 0, 0, 1, 0]
    assert copies(points, seen) == pytest.approx(0.4)


def test_distances_are_root_mean_squares():
    one, other = torch.rand(3, 1, 4, 4), torch.rand(2, 1, 4, 4)
    expected = [[(a - b).square().mean().sqrt() for b in other] for a in one]
    torch.testing.assert_close(distances(one, other), torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.equation("eq-memorisation-birthday")
def test_pairs_of_equal_samples():
    N, n, trials = 200, 30, 4000
    draws = np.sort(RNG.integers(0, N, (trials, n)), axis=1)
    pairs = np.array([sum(k * (k - 1) // 2 for k in np.unique(row, return_counts=True)[1]) for row in draws])
    assert pairs.mean() == pytest.approx(n * (n - 1) / (2 * N), abs=4 * pairs.std() / math.sqrt(trials))


@pytest.mark.equation("eq-memorisation-guided")
def test_guidance_of_the_memoriser_goes_beyond_the_picture():
    pictures = RNG.uniform(-1, 1, (4, 5))
    t, w = 400, 2.5

    class Memoriser(torch.nn.Module):
        schedule = SCHEDULE

        def forward(self, x_t, t, condition=None):
            alpha_bar = float(SCHEDULE.alpha_bar[t])
            known = pictures if condition is None else pictures[[int(condition)]]
            guess = np.stack([minimiser(x.numpy(), known, alpha_bar) for x in x_t])
            return Prediction.of("x0", torch.from_numpy(guess), x_t, t, SCHEDULE)

    x_t = torch.from_numpy(RNG.standard_normal((1, 5)))
    free = minimiser(x_t[0].numpy(), pictures, float(SCHEDULE.alpha_bar[t]))
    guided = Guided(Memoriser(), w)(x_t, t, torch.tensor([1])).x0[0].numpy()
    np.testing.assert_allclose(guided, pictures[1] + w * (pictures[1] - free), atol=1e-10)


# The stored results


def test_the_stored_results_are_of_these_settings():
    stored = json.loads(memorisation.RESULTS.read_text())
    assert stored["settings"] == memorisation.SETTINGS
    assert sorted(map(int, stored["rows"])) == memorisation.SETTINGS["sizes"]
    for row in stored["rows"].values():
        assert len(row["networks"]) == len(memorisation.SETTINGS["steps"])


def test_the_memorisers_and_gaussians_of_the_stored_results_can_be_had_again():
    images, fresh = digits("train")[0], digits("test")[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    stored, seen = json.loads(memorisation.RESULTS.read_text())["rows"]["80"], (images[:80], images[-80:])
    for name, make in {"memorisers": memorisation.memoriser, "gaussians": memorisation.gaussian}.items():
        drawn = tuple(memorisation.draw(make(pictures)) for pictures in seen)
        assert memorisation.measure(drawn, seen, fresh) == pytest.approx(stored[name], rel=0.01, abs=0.006)


def test_a_network_is_seen_after_each_number_of_steps(monkeypatch):
    monkeypatch.setitem(memorisation.SETTINGS, "steps", [50, 101])
    first, last = map(memorisation.draw, memorisation.train(digits("train")[0][:10]))
    assert first.shape == last.shape == (200, 1, 8, 8)
    assert not first.equal(last)
