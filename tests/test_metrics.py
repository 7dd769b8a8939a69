"""Metrics against independent implementations (scipy, prdc, torchmetrics), closed forms, and what they must notice."""

import numpy as np
import pytest
import torch
from joblib import parallel_config
from prdc import compute_prdc
from scipy import linalg, stats
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from ddpm_lib import (
    digits,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    pretrained_classifier,
    sliced_wasserstein,
)


def reference(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as Heusel et al. write it, with the root of a product that is not symmetric."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


@pytest.mark.parametrize("size", [2, 5, 30])
def test_equals_the_matrix_root_of_scipy(size):
    rng = np.random.default_rng(size)
    a = rng.standard_normal((200, size)) @ rng.standard_normal((size, size))
    b = rng.standard_normal((150, size)) @ rng.standard_normal((size, size)) + 1
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(reference(a, b), rel=1e-8)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(found, rel=1e-8)


def test_in_one_dimension_it_is_known():
    """(difference of means)^2 + (difference of deviations)^2."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx(9 + (18**0.5 - 2**0.5) ** 2)


def test_a_set_is_at_zero_from_itself():
    a = torch.randn(50, 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-5)


def test_diagonal_covariances_add_up():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5000, 3, dtype=torch.float64, generator=rng)
    white = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert frechet_distance(white, white * scale) == pytest.approx(0 + 1 + 0.25, rel=1e-9)


def test_fewer_rows_than_columns_still_give_a_number():
    a, b = torch.randn(5, 20), torch.randn(6, 20)
    assert 0 < frechet_distance(a, b) < float("inf")
    assert frechet_distance(a, b) == pytest.approx(reference(a.double().numpy(), b.double().numpy()), rel=1e-4)


def sets(n: int = 120, m: int = 90, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(n, size, generator=generator, dtype=torch.float64)
    return a, 0.9 * torch.randn(m, size, generator=generator, dtype=torch.float64) + 0.6


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_prdc(k):
    real, generated = sets()
    with parallel_config(backend="sequential"):  # prdc asks for eight processes
        expected = compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    assert precision_recall(real, generated, k) == (expected["precision"], expected["recall"])
    assert 0 < expected["recall"] < expected["precision"] < 1


def test_a_lost_mode_is_seen_by_recall_and_noise_by_precision():
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=generator), 20 + torch.randn(200, 2, generator=generator)])
    fresh = torch.cat([torch.randn(200, 2, generator=generator), 20 + torch.randn(200, 2, generator=generator)])
    assert min(precision_recall(real, fresh)) > 0.9
    precision, recall = precision_recall(real, fresh[:200])
    assert (precision > 0.9, recall) == (True, pytest.approx(0.5, abs=0.05))
    precision, recall = precision_recall(real, torch.cat([fresh, 100 + 20 * fresh[:200]]))
    assert (precision, recall > 0.9) == (pytest.approx(2 / 3, abs=0.05), True)


def test_a_set_covers_itself_copies_included():
    a = sets()[0]
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(torch.cat([a, a]), a, k=1) == (1, 1)


def test_the_kernel_distance_is_the_mean_over_pairs():
    """Written out pair by pair, and as torchmetrics computes it."""
    a, b = sets(12, 9)
    kernel = [[[(x @ y / 6 + 1) ** 3 for y in v] for x in u] for u, v in ((a, a), (b, b), (a, b))]
    within = [
        sum(float(values[i][j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for values, n in ((kernel[0], 12), (kernel[1], 9))
    ]
    between = sum(float(value) for row in kernel[2] for value in row) / (12 * 9)
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    a, b = sets(50, 50)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_the_kernel_distance_of_equal_laws_is_zero_on_average():
    generator = torch.Generator().manual_seed(1)
    values = [kernel_distance(*torch.randn(2, 40, 3, generator=generator)) for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    assert min(values) < 0
    assert abs(np.mean(values)) < 0.02 * kernel_distance(*sets(40, 40))


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save:UserWarning", "ignore:std:UserWarning")
def test_the_inception_score_is_that_of_torchmetrics():
    logits = 3 * torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    judge = InceptionScore(feature=torch.nn.Identity(), splits=1)
    judge.update(logits)
    assert inception_score(logits) == pytest.approx(float(judge.compute()[0]), rel=1e-5)


def test_the_inception_score_counts_classes():
    certain = torch.eye(5).repeat(4, 1) * 100
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(certain[:1].repeat(8, 1)) == pytest.approx(1)
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1)
    assert inception_score(certain[[0, 1, 0, 1]]) == pytest.approx(2)


def test_sliced_wasserstein_is_the_mean_of_scipys_along_each_direction():
    a, b = sets(40, 40, 2)
    angles = np.linspace(0, np.pi, 400, endpoint=False)
    axes = [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]
    expected = np.mean([stats.wasserstein_distance(a.numpy() @ axis, b.numpy() @ axis) for axis in axes])
    assert sliced_wasserstein(a, b, directions=20_000) == pytest.approx(expected, rel=0.01)
    assert sliced_wasserstein(a, a.flip(0)) == 0
    assert sliced_wasserstein(a, a + torch.tensor([3.0, 4.0])) == pytest.approx(5 * 2 / np.pi, rel=0.1)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, sliced_wasserstein])
def test_distances_are_symmetric_turn_with_the_axes_and_grow_with_corruption(distance):
    a, b = sets(300, 300)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    assert distance(a @ turn, b @ turn) == pytest.approx(
        distance(a, b), rel=0.15 if distance is sliced_wasserstein else 1e-9
    )
    noise = torch.randn(300, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grown = [distance(a, a + strength * noise) for strength in (0.0, 0.5, 1.0, 2.0)]
    assert grown == sorted(grown)
    assert grown[1] > grown[0] + 1e-3


def test_spatial_features_see_where_a_thing_is():
    """Channels in their places: moving the image by two pixels moves them by one, and inner values stay."""
    judge = pretrained_classifier()
    images = digits("test")[0][:4]
    maps = judge.spatial_features(images).reshape(4, 7, 4, 4)
    moved = judge.spatial_features(images.roll(2, 3)).reshape(4, 7, 4, 4)
    assert maps.abs().max() > 0.1
    torch.testing.assert_close(moved[:, :, :, 2], maps[:, :, :, 1], rtol=0, atol=1e-5)
    assert (moved - maps).abs().max() > 0.1


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), ">= 4"),
        (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), k=0), "got 0"),
        (lambda: kernel_distance(torch.zeros(9, 2), torch.zeros(9, 3)), r"\(9, 3\)"),
        (lambda: kernel_distance(torch.zeros(9, 2), torch.full((9, 2), torch.nan)), "nan"),
        (lambda: sliced_wasserstein(torch.zeros(9, 2), torch.zeros(8, 2)), "9 and 8"),
        (lambda: inception_score(torch.zeros(9)), r"\(9,\)"),
        (lambda: inception_score(torch.full((2, 2), torch.nan)), "finite"),
    ],
)
def test_bad_input_is_named(attempt, told):
    with pytest.raises(ValueError, match=told):
        attempt()
