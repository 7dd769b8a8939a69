"""Guidance in an analytic world, where the guided score is known, and around a network."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ddpm_lib import (
    DPS,
    ClassifierGuided,
    Denoiser,
    Downsample,
    GaussianMixture,
    Guided,
    Schedule,
    UNet,
    digits,
    label_gradient,
    pretrained_noisy_classifier,
    sample,
)

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


# Negative conditions, weights by step, guidance by a classifier


def points(n=9):
    return torch.linspace(-2, 3, n, dtype=torch.float64)[:, None]


def mixture_log_density(x, t, k=None):
    """log q(x_t), or of one component, as sums of normal densities."""
    signal, variance = float(SCHEDULE.alpha_bar[t]) ** 0.5, 1 - float(SCHEDULE.alpha_bar[t])
    deviations = (signal**2 * torch.tensor([0.2, 0.5], dtype=torch.float64) + variance).sqrt()
    parts = Normal(signal * WORLD.means[:, 0], deviations).log_prob(x)
    return (parts + WORLD.weights.log()).logsumexp(1) if k is None else parts[:, k]


def slope(f, x):
    return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5


def exact_classifier(x_t, t):
    return WORLD.noised(SCHEDULE.alpha_bar[int(t)]).responsibilities(x_t).log()


@pytest.mark.parametrize("one_each", [True, False])
def test_a_negative_condition_takes_the_place_of_none(one_each):
    t, x = 30, points()
    negative = torch.zeros(9 if one_each else 1, dtype=torch.long)
    expected = slope(lambda x: 3 * mixture_log_density(x, t, 1) - 2 * mixture_log_density(x, t, 0), x)
    found = Guided(Exact(), 2.0, negative=negative)(x, t, torch.ones(9, dtype=torch.long)).score[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_negatives_for_another_batch_are_refused():
    guided = Guided(network(), 1.0, negative=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"one for each of 3; got shape \(2,\)"):
        guided(torch.zeros(3, 1, 8, 8), 3, torch.tensor([0, 1, 2]))


def test_the_weight_may_depend_on_point_and_step_and_0_saves_a_pass():
    passes = []

    class Counting(Exact):
        def forward(self, x_t, t, condition=None):
            passes.append(condition is None)
            return super().forward(x_t, t, condition)

    x, label = points(), torch.ones(9, dtype=torch.long)
    guided = Guided(Counting(), lambda x_t, t: x_t.abs() if t > 50 else 0.0)
    torch.testing.assert_close(guided(x, 50, label).eps, Exact()(x, 50, label).eps, rtol=0, atol=0)
    assert passes == [False]
    torch.testing.assert_close(guided(x, 51, label).eps, Guided(Exact(), x.abs())(x, 51, label).eps)
    assert passes == [False, False, True]


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_an_exact_classifier_leads_by_bayes_rule(weight):
    t, x = 40, points()

    def log_density(x):
        label = mixture_log_density(x, t, 1) + math.log(0.7) - mixture_log_density(x, t)
        return mixture_log_density(x, t) + weight * label

    with torch.no_grad():
        found = ClassifierGuided(WORLD.denoiser(SCHEDULE), exact_classifier, weight)(x, t, torch.ones(9).long())
    torch.testing.assert_close(found.score[:, 0], slope(log_density, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_weight_1_it_samples_the_class(eta):
    x_T = torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = ClassifierGuided(WORLD.denoiser(SCHEDULE), exact_classifier)
    options = {"x_T": x_T, "clip": False, "eta": eta, "generator": torch.Generator().manual_seed(1)}
    x = sample(guided, condition=torch.ones(4000, dtype=torch.long), **options)
    torch.testing.assert_close(x.mean(), torch.tensor(2.0).double(), rtol=0, atol=0.06)
    torch.testing.assert_close(x.var(), torch.tensor(0.5).double(), rtol=0.08, atol=0)


def test_the_gradient_is_that_of_the_logarithm_for_each_image_alone():
    classifier = pretrained_noisy_classifier()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    label, step = torch.tensor([3, 0, 9]), 1e-2
    with torch.no_grad():
        gradient = label_gradient(classifier, x, 400, label)
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        up, down = (classifier(x + s * along, 400).double().log_softmax(1) for s in (step, -step))
    measured = (up - down)[range(3), label] / (2 * step)
    torch.testing.assert_close((gradient * along).sum((1, 2, 3)).double(), measured, rtol=0.01, atol=2e-3)
    assert not gradient.requires_grad


def test_the_noisy_classifier_knows_its_step_and_the_shipped_one_reads_noisy_digits():
    classifier, schedule = pretrained_noisy_classifier(), Schedule.linear()
    images, labels = digits("test")
    right = {}
    for t in (1, 200, 900):
        x_t = schedule.q_sample(images, t, torch.randn(images.shape, generator=torch.Generator().manual_seed(t)))
        right[t] = float((classifier(x_t, t).argmax(1) == labels).double().mean())
        one_each = classifier(x_t, torch.full((450,), t))
        torch.testing.assert_close(classifier(x_t, t), one_each)
        assert (classifier(x_t, t) - classifier(x_t, 500)).abs().max() > 0.1
    assert right[1] > 0.98
    assert right[200] > 0.88
    assert right[900] < 0.2
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_bad_input_to_classifier_guidance_says_what_is_wrong():
    x, classifier = torch.zeros(2, 1, 8, 8), pretrained_noisy_classifier()
    guided = ClassifierGuided(network(), classifier)
    with pytest.raises(ValueError, match="towards a class; got none"):
        guided(x, 3)
    with pytest.raises(ValueError, match=r"shape \(2,\); got torch.int64 of shape \(3,\)"):
        guided(x, 3, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"0..9; got \[1, 10\]"):
        guided(x, 3, torch.tensor([1, 10]))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\); got \(2, 1, 4, 4\)"):
        classifier(torch.zeros(2, 1, 4, 4), 3)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1, 1)])
def test_a_weight_that_would_multiply_along_a_side_of_the_image_is_refused(shape):
    x_t, label = torch.randn(3, 1, 8, 8), torch.arange(3)
    for guided in (
        Guided(network().eval(), torch.rand(shape)),
        Guided(network().eval(), lambda x_t, t: torch.rand(shape)),
        ClassifierGuided(network().eval(), lambda x, t: x.flatten(1)[:, :3], torch.rand(shape)),
        DPS(network().eval(), Downsample(2), torch.zeros(1, 1, 4, 4), torch.rand(shape)),
    ):
        with pytest.raises(ValueError, match=r"as many dimensions as x_t, shape \(3, 1, 1, 1\); got"):
            guided(x_t, 20, label)


def test_a_weight_for_each_sample_guides_each_by_its_own():
    x_t, label, weight = torch.randn(3, 1, 8, 8), torch.arange(3), torch.tensor([0.5, 1.0, 4.0]).double()
    together = Guided(network().eval(), weight.view(3, 1, 1, 1))(x_t, 20, label).x0
    alone = [Guided(network().eval(), float(w))(x_t[i : i + 1], 20, label[i : i + 1]).x0 for i, w in enumerate(weight)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_wrapper_changes_the_mode_of_nothing_that_it_wraps():
    denoiser, classifier = network(), nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    denoiser.network.eval()
    ClassifierGuided(Guided(denoiser, 1.0), classifier.eval())
    assert not denoiser.network.training
    assert not classifier.training
