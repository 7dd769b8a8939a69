"""What a network is shown of an image: against numbers worked out by other means."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from ddpm_lib import Denoiser, Schedule, digits
from ddpm_lib.degradation import GIVEN, blurred, coarse, enlarge, grey
from ddpm_lib.evaluation import evaluate

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def keys(distance, a=-0.75):
    """The kernel of bicubic interpolation (Keys 1981), with the slope that PyTorch takes."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def weights(n, factor):
    """Row i: what pixel i of the enlarged line takes from each of n pixels; beyond the border the last one repeats."""
    table = np.zeros((n * factor, n))
    for i in range(n * factor):
        place = (i + 0.5) / factor - 0.5
        for k in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            table[i, min(max(k, 0), n - 1)] += keys(place - k)
    return table


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_is_bicubic_interpolation(factor):
    small = IMAGES[..., :4, :6]
    expected = np.einsum("ik,bckl,jl->bcij", weights(4, factor), small.numpy(), weights(6, factor))
    np.testing.assert_allclose(enlarge(small, factor).numpy(), expected, atol=1e-12)


def test_a_coarse_image_is_the_means_of_squares_enlarged():
    means = IMAGES.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    expected = np.einsum("ik,bckl,jl->bcij", weights(4, 4), means.numpy(), weights(6, 4))
    np.testing.assert_allclose(coarse(IMAGES).numpy(), expected, atol=1e-12)


def test_a_blurred_image_is_a_gaussian_filter_of_two_pixels():
    """scipy's kernel is sampled, ours exact: hence the tolerance."""
    expected = ndimage.gaussian_filter(IMAGES.numpy(), (0, 0, 2, 2), mode="reflect", truncate=8)
    np.testing.assert_allclose(blurred(IMAGES).numpy(), expected, atol=1e-3)


def test_a_grey_image_is_the_luma():
    red, green, blue = IMAGES.unbind(1)
    torch.testing.assert_close(grey(IMAGES)[:, 0], 0.299 * red + 0.587 * green + 0.114 * blue)


@pytest.mark.parametrize("name", GIVEN)
def test_a_white_image_stays_white(name):
    seen = GIVEN[name](torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(seen, torch.ones(1, 1 if name == "grey" else 3, 8, 8))


class Black(nn.Module):
    """A network that answers a black image to everything."""

    config = {"image_size": 8, "classes": None, "image_channels": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x, steps, condition):
        assert condition.shape == x.shape
        return torch.full_like(x, -1.0)


def test_the_psnr_of_black_answers_is_that_of_black():
    """Of each held-out image against black, in decibels; then the mean."""
    figures = evaluate(Denoiser(Black(), Schedule.cosine(20), "x0"), "digits", number=30, steps=2, given="coarse")
    errors = [np.sqrt(np.mean((image.numpy() + 1) ** 2)) for image in digits("test")[0][:30]]
    assert figures["PSNR, samples"] == pytest.approx(np.mean([20 * np.log10(2 / error) for error in errors]), abs=1e-4)
