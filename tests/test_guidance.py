"""Guidance in an analytic world, where the guided score is known, and around a network."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ddpm_lib import Denoiser, GaussianMixture, Guided, Schedule, UNet, sample

SCHEDULE = Schedule.linear(100)
WORLD = GaussianMixture([0.3, 0.7], [[-1.0], [2.0]], [0.2, 0.5])
CLASSES = [GaussianMixture([1.0], WORLD.means[k : k + 1], WORLD.covariances[k : k + 1]) for k in (0, 1)]


class Exact(nn.Module):
    """The optimal denoiser of WORLD, with or without the component's number as condition."""

    schedule = SCHEDULE

    def forward(self, x_t, t, condition=None):
        law = WORLD if condition is None else CLASSES[int(condition[0])]
        return law.denoiser(SCHEDULE)(x_t, t)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_score_is_that_of_the_label_to_a_power(weight):
    """The gradient of log q(x_t | label) + weight log q(label | x_t), by differences of Bayes' rule."""
    t, x = 40, torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    signal, variance = float(SCHEDULE.alpha_bar[t]) ** 0.5, 1 - float(SCHEDULE.alpha_bar[t])
    deviations = (signal**2 * torch.tensor([0.2, 0.5], dtype=torch.float64) + variance).sqrt()
    laws = Normal(signal * WORLD.means[:, 0], deviations)

    def log_density(x):
        joint = laws.log_prob(x) + WORLD.weights.log()
        return laws.log_prob(x)[:, 1] + weight * joint.log_softmax(1)[:, 1]

    expected = (log_density(x + 1e-5) - log_density(x - 1e-5)) / 2e-5
    found = Guided(Exact(), weight)(x, t, torch.ones(11, dtype=torch.long)).score[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def network() -> Denoiser:
    torch.manual_seed(0)
    unet = UNet(8, 1, 8, (1, 2), 1, (4,), dropout=0.5, groups=4, classes=3)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(unet, Schedule.linear(50))


def test_without_weight_it_is_the_denoiser_and_with_weight_another():
    plain, label = network(), torch.tensor([0, 2])
    draws = [
        sample(denoiser, (2, 1, 8, 8), steps=5, condition=label, generator=torch.Generator().manual_seed(1))
        for denoiser in (plain, Guided(plain, 0.0), Guided(plain, 2.0))
    ]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=1e-6)
    assert (draws[1] - draws[2]).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_denoisers_mode(training):
    plain = network().train(training)
    sample(Guided(plain, 1.0), (1, 1, 8, 8), steps=2, condition=torch.tensor([1]))
    assert plain.training == plain.network.training == training


def test_no_label_is_refused():
    with pytest.raises(ValueError, match="towards a condition; got none"):
        Guided(network(), 1.0)(torch.zeros(1, 1, 8, 8), 3)
