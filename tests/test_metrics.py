"""The Frechet distance against scipy's matrix root and closed forms."""

import numpy as np
import pytest
import torch
from scipy import linalg

from ddpm_lib import frechet_distance


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
