"""The equations of the chapter on colourisation, each against an independent computation."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import linalg, optimize, stats

from ddpm_lib import Grey, NullSpace, Prediction, Schedule
from ddpm_lib.degradation import grey
from ddpm_lib.scene_posterior import colour_posterior, entropy, total_variation
from ddpm_lib.scenes import SHAPES, Item, Scene, captioned_scenes
from scripts import colourisation_table
from scripts.colourisation_table import fitted

W = np.array([0.299, 0.587, 0.114])
FOUR = ("red", "green", "blue", "purple")
SCHEDULE = Schedule.cosine()


def pixels(x):
    """Points (N, 3) as images (N, 3, 1, 1)."""
    return torch.as_tensor(x, dtype=torch.float64)[:, :, None, None]


def points(n, seed=0, reach=1.0):
    return np.random.default_rng(seed).uniform(-reach, reach, (n, 3))


# What grey keeps


@pytest.mark.equation("eq-colourisation-luma")
def test_the_luma_is_that_of_pillow():
    from PIL import Image

    bytes_ = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    seen = np.asarray(Image.fromarray(bytes_).convert("L")).astype(float)
    x = torch.from_numpy(bytes_).double().permute(2, 0, 1)[None] / 127.5 - 1
    ours = (grey(x)[0, 0].numpy() + 1) * 127.5
    np.testing.assert_allclose(ours, seen, atol=0.51)  # Pillow gives whole numbers


@pytest.mark.equation("eq-colourisation-split")
def test_a_pixel_is_its_luma_and_two_numbers_of_the_null_space():
    x = points(50)
    U = linalg.null_space(W[None])
    y = Grey().forward(pixels(x))
    smallest = Grey().pseudo_inverse(y)[..., 0, 0].numpy()
    np.testing.assert_allclose(smallest, x @ W[:, None] @ np.linalg.pinv(W[None]).T, atol=1e-12)
    np.testing.assert_allclose(x, smallest + x @ U @ U.T, atol=1e-12)
    least = optimize.minimize(
        lambda z: z @ z, np.zeros(3), constraints={"type": "eq", "fun": lambda z: W @ z - 1}, tol=1e-12
    ).x
    np.testing.assert_allclose(Grey().pseudo_inverse(torch.ones(1, 1, 1, 1))[0, :, 0, 0].numpy(), least, atol=1e-5)


@pytest.mark.equation("eq-colourisation-posterior")
@pytest.mark.equation("eq-colourisation-entropy")
def test_the_colourings_of_a_pair_are_equally_frequent_among_drawn_scenes():
    """Of all pairs of two given shapes, by counting; entropy from the counted shares."""
    counts = Counter()
    for scene, _ in captioned_scenes(12_000, "test", seed=9, family="pairs"):
        shapes, colours = zip(*((item.shape, item.colour) for item in scene.items))
        if set(colours) <= set(FOUR):
            counts[shapes, colours] += 1
    statistic, degrees, bits, expected_bits = 0.0, 0, 0.0, 0.0
    total = sum(counts.values())
    for shapes in itertools.product(SHAPES, repeat=2):
        found = np.array([counts[shapes, colours] for colours in itertools.product(FOUR, repeat=2)])
        scene = Scene("black", tuple(Item(shape, "purple", "large") for shape in shapes))
        law = colour_posterior(scene, "pairs")
        assert sum(found > 0) <= len(law)
        allowed = np.array([colours in law for colours in itertools.product(FOUR, repeat=2)])
        assert not found[~allowed].any()
        statistic += stats.chisquare(found[allowed]).statistic
        degrees += allowed.sum() - 1
        share = found[found > 0] / found.sum()
        # the entropy of observed shares is too small by about (cells - 1) / 2n (Miller and Madow)
        bits += (
            found.sum() / total * (stats.entropy(share, base=2) + (len(share) - 1) / (2 * found.sum() * math.log(2)))
        )
        expected_bits += found.sum() / total * entropy(law)
        assert entropy(law) == pytest.approx(math.log2(len(law)))
    assert stats.chi2(degrees).sf(statistic) > 1e-3
    assert bits == pytest.approx(expected_bits, abs=0.03)


@pytest.mark.equation("eq-colourisation-regression")
def test_the_mean_has_the_least_squared_error_and_the_rest_is_its_distance():
    rng = np.random.default_rng(1)
    y = rng.integers(3, size=60_000)
    x = np.sin(y)[:, None] + rng.standard_normal((len(y), 2)) * (1 + y[:, None])
    mean = np.array([x[y == k].mean(0) for k in range(3)])[y]
    answer = np.stack([y - 1.0, np.cos(y)], 1)
    left = ((x - answer) ** 2).sum(1).mean()
    assert left == pytest.approx(((x - mean) ** 2).sum(1).mean() + ((mean - answer) ** 2).sum(1).mean(), rel=1e-9)
    best = optimize.minimize(lambda a: ((x[y == 1] - a) ** 2).sum(), np.zeros(2)).x
    np.testing.assert_allclose(best, mean[y == 1][0], atol=1e-4)


# One pixel


@pytest.mark.equation("eq-colourisation-nullspace")
def test_the_null_space_keeps_chroma_and_sets_luma():
    guess = points(20, 2)
    y = np.random.default_rng(3).uniform(-1, 1, 20)

    def denoiser(x_t, t):
        return Prediction.of("x0", pixels(guess), x_t, t, SCHEDULE)

    denoiser.schedule = SCHEDULE
    way = NullSpace(denoiser, Grey(), torch.from_numpy(y)[:, None, None, None])
    found = way(torch.zeros(20, 3, 1, 1, dtype=torch.float64), 300).x0[..., 0, 0].numpy()
    U = linalg.null_space(W[None])
    np.testing.assert_allclose(found @ U, guess @ U, atol=1e-12)
    np.testing.assert_allclose(found @ W, y, atol=1e-12)
    np.testing.assert_allclose(found, guess + np.outer(y - guess @ W, W) / (W @ W), atol=1e-12)


@pytest.mark.equation("eq-colourisation-odds")
@pytest.mark.equation("eq-colourisation-decided")
def test_the_odds_of_two_candidates_are_those_of_two_normal_densities():
    rng = np.random.default_rng(4)
    j, k = rng.standard_normal((2, 5)) / 2
    t = 700
    a2 = float(SCHEDULE.alpha_bar[t])
    a, b = math.sqrt(a2), 1 - a2
    x_t = a * j + math.sqrt(b) * rng.standard_normal((100_000, 5))
    log_odds = stats.multivariate_normal(a * j, b).logpdf(x_t) - stats.multivariate_normal(a * k, b).logpdf(x_t)
    formula = a / b * x_t @ (j - k) - a2 / (2 * b) * (j @ j - k @ k)
    np.testing.assert_allclose(formula, log_odds, atol=1e-8)
    rho, d = a2 / b, np.linalg.norm(j - k)
    assert log_odds.mean() == pytest.approx(rho * d**2 / 2, abs=4 * log_odds.std() / 300)
    assert log_odds.std() == pytest.approx(math.sqrt(rho) * d, rel=0.02)
    wrong = (log_odds < 0).mean()
    assert 0.05 < wrong < 0.45
    assert wrong == pytest.approx(stats.norm.cdf(-0.5 * math.sqrt(rho) * d), abs=0.006)


# Luma inside the range


@pytest.mark.equation("eq-colourisation-clip")
def test_clipping_moves_the_luma_by_no_more_than_the_weighted_overshoot():
    x = points(5000, 5, reach=1.7)
    moved = np.abs(np.clip(x, -1, 1) @ W - x @ W)
    overshoot = np.maximum(np.abs(x) - 1, 0) @ W
    assert (moved <= overshoot + 1e-12).all()
    upwards = np.abs(np.minimum(x, 1) @ W - x @ W)
    np.testing.assert_allclose(upwards, np.maximum(x - 1, 0) @ W, atol=1e-12)  # reached where all overshoot one way


@pytest.mark.equation("eq-colourisation-fit")
def test_the_walk_to_grey_goes_as_far_as_it_must_and_no_farther():
    """The largest share by a linear program."""
    x, y = points(60, 6, reach=2.0), np.random.default_rng(7).uniform(-0.95, 0.95, 60)
    found = fitted(pixels(x), torch.from_numpy(y)[:, None, None, None])[..., 0, 0].numpy()
    np.testing.assert_allclose(found @ W, y, atol=1e-12)
    assert np.abs(found).max() <= 1 + 1e-12
    for point, level, inside in zip(x, y, found, strict=True):
        away = point + (level - point @ W) * W / (W @ W) - level
        rows = np.concatenate([away, -away])[:, None]
        limits = np.concatenate([np.full(3, 1 - level), np.full(3, 1 + level)])
        s = optimize.linprog([-1.0], A_ub=rows, b_ub=limits, bounds=(0, 1)).x[0]
        np.testing.assert_allclose(inside, level + s * away, atol=1e-8)


def test_a_picture_that_fits_stays_as_it_is():
    x = pixels(points(20, 8))
    torch.testing.assert_close(fitted(x, grey(x)), x)


# Calibration


@pytest.mark.equation("eq-colourisation-tv")
def test_the_distance_is_the_largest_error_of_an_event():
    rng = np.random.default_rng(9)
    p, q = rng.dirichlet(np.ones(6), 2)
    events = [list(e) for size in range(7) for e in itertools.combinations(range(6), size)]
    largest = max(abs(p[e].sum() - q[e].sum()) for e in events)
    assert total_variation(dict(enumerate(p)), dict(enumerate(q))) == pytest.approx(largest)
    assert 0.5 * np.abs(p - q).sum() == pytest.approx(largest)


@pytest.mark.equation("eq-colourisation-floor")
@pytest.mark.parametrize("p", [(0.25,) * 4, (1 / 3,) * 3, (0.6, 0.3, 0.1)])
def test_the_floor_is_the_mean_distance_of_exact_draws(p):
    """By the exact binomial law of each cell."""
    n = 60
    k = np.arange(n + 1)
    exact = 0.5 * sum(stats.binom(n, share).pmf(k) @ np.abs(k / n - share) for share in p)
    formula = 0.5 * sum(math.sqrt(2 * share * (1 - share) / (math.pi * n)) for share in p)
    assert formula == pytest.approx(exact, rel=0.02)


@pytest.mark.equation("eq-colourisation-coherence")
def test_objects_that_are_painted_for_themselves_agree_by_chance():
    p = np.array([0.5, 0.3, 0.2])
    painted = np.random.default_rng(10).choice(3, p=p, size=(200_000, 3))
    agree = (painted == painted[:, :1]).all(1).mean()
    assert agree == pytest.approx((p**3).sum(), abs=0.004)


# What is stored


def stored():
    return json.loads(colourisation_table.RESULTS.read_text())


def test_the_stored_table_is_that_of_the_script():
    results = stored()
    assert list(results["ways"]) == list(colourisation_table.WAYS)
    assert results["settings"] == colourisation_table.settings()
    assert results["models"] == colourisation_table.models(), "run python -m scripts.colourisation_table"
    assert list(results["words"]) == [str(weight) for weight in colourisation_table.WEIGHTS]
    for result in results["ways"].values():
        assert all(sum(found.values()) == colourisation_table.SINGLES for found in result["single"].values())


def test_the_true_pictures_have_possible_colours_and_the_distance_of_exact_draws():
    truth = stored()["ways"]["truth"]
    assert truth["luma"]["max"] == truth["stray"] == 0
    assert truth["fitted luma"]["max"] < 1e-3
    for kind in ("four", "pair"):
        assert truth[kind]["pictures"] == truth[kind]["read"] == truth[kind]["possible"]
    distances = []
    for shape, found in truth["single"].items():
        law = colour_posterior(Scene("black", (Item(shape, "purple", "large"),)), "counts")
        assert {(colour,) for colour in found} <= law.keys()
        shares = {(colour,): k / sum(found.values()) for colour, k in found.items()}
        distances.append(total_variation(shares, law))
    assert np.mean(distances) < 0.105  # exact draws: 0.062 on average, in 99.9% of cases below 0.104


def test_the_scenes_to_be_coloured_have_one_family_and_a_background_that_hides_nothing():
    scenes = colourisation_table.questions()
    settings = colourisation_table
    assert [len(some) for some in scenes.values()] == [settings.SINGLES * len(SHAPES), settings.FOURS, settings.PAIRS]
    for scene in itertools.chain(*scenes.values()):
        assert scene.background != "grey"
        assert {item.colour for item in scene.items} <= set(FOUR)
    assert all(len({(item.shape, item.size) for item in scene.items}) == 2 for scene in scenes["pair"])
