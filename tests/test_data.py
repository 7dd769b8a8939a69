"""The digits equal scikit-learn's; the spiral is centred and scaled; the shipped models load and are what they say."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddpm_lib import Gaussian, data, digits, pretrained, pretrained_classifier, spiral


def test_digits_are_those_of_scikit_learn():
    """The same images with the same labels, in another order."""
    images, labels = digits("all")
    bunch = load_digits()
    levels = (images[:, 0] * 8 + 8).numpy()
    assert np.array_equal(levels, levels.round())
    ours = sorted((*image.flatten().astype(int), label) for image, label in zip(levels, labels.tolist()))
    theirs = sorted((*image.astype(int), label) for image, label in zip(bunch.data, bunch.target.tolist()))
    assert ours == theirs


def test_shapes_types_and_range():
    for split, n in (("train", 1347), ("test", 450), ("all", 1797)):
        images, labels = digits(split)
        assert images.shape == (n, 1, 8, 8)
        assert labels.shape == (n,)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (images.min(), images.max()) == (-1, 1)
        assert labels.unique().tolist() == list(range(10))


def test_training_and_test_images_do_not_overlap():
    train, test, whole = (digits(split)[0] for split in ("train", "test", "all"))
    assert torch.equal(torch.cat([train, test]), whole)
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}


def test_digits_are_a_copy_each_time():
    digits("test")[0].zero_()
    assert digits("test")[0].abs().sum() > 0


def test_every_class_is_about_equally_frequent_in_both_parts():
    for split in ("train", "test"):
        counts = torch.bincount(digits(split)[1]).double()
        assert (counts / counts.mean() - 1).abs().max() < 0.25


def test_the_spiral_is_centred_with_unit_variances(generator):
    points = spiral(200_000, generator)
    assert points.shape == (200_000, 2)
    assert points.mean(0).abs().max() < 0.01
    assert (points.var(0) - 1).abs().max() < 0.01
    assert torch.equal(spiral(3, torch.Generator().manual_seed(1)), spiral(3, torch.Generator().manual_seed(1)))


def test_the_spiral_winds_once_and_a_half(generator):
    """Its radius is its angle, up to the noise of 0.3: points lie near r = angle + 2 pi k, with radius up to 3 pi."""
    points = spiral(20_000, generator) * data.SPIRAL_STD + data.SPIRAL_MEAN
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    off = (radius - angle + torch.pi) % (2 * torch.pi) - torch.pi
    far = radius > 3
    assert float(off[far].std()) == pytest.approx(0.3, abs=0.03)
    assert float(radius.max()) < 3 * torch.pi + 1.5


def test_the_shipped_classifier_reads_real_test_digits():
    images, labels = digits("test")
    classifier = pretrained_classifier()
    assert float((classifier(images).argmax(1) == labels).double().mean()) > 0.99
    assert classifier.features(images).shape == (450, 64)
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("t", [50, 100, 250])
def test_the_shipped_denoiser_beats_the_best_linear_guess_on_real_test_digits(t, generator):
    """Its guess of x0 is nearer to the truth than that of the Gaussian fitted to the training digits.

    At later steps a linear guess is almost the best there is: at t = 500 the two are level (0.264 and 0.269).
    """
    denoiser = pretrained("digits")
    schedule, images, train = denoiser.schedule, digits("test")[0], digits("train")[0].flatten(1).double()
    x_t = schedule.q_sample(images, t, torch.randn(images.shape, generator=generator))
    covariance = train.T.cov()
    gaussian = Gaussian(train.mean(0), (covariance + covariance.T) / 2)
    linear = gaussian.denoise(x_t.flatten(1), float(schedule.alpha_bar[t])).view_as(images)
    with torch.no_grad():
        guess = denoiser(x_t, t).x0
    ours, theirs = ((x0.clamp(-1, 1) - images).square().mean() for x0 in (guess, linear))
    assert ours < theirs


def test_the_shipped_denoiser_knows_its_labels(generator):
    """At a step where the digit can hardly be seen, the right label helps and a wrong one harms."""
    denoiser = pretrained("digits")
    images, labels = digits("test")
    x_t = denoiser.schedule.q_sample(images, 500, torch.randn(images.shape, generator=generator))
    with torch.no_grad():
        guesses = [denoiser(x_t, 500, label).x0 for label in (labels, None, (labels + 1) % 10)]
    right, none, wrong = ((x0.clamp(-1, 1) - images).square().mean() for x0 in guesses)
    assert right < none < wrong
