"""Wrong input is a ValueError that says what was given and what is allowed."""

import math
import re

import numpy as np
import pytest
import torch
from tiny_models import tiny_denoiser, tiny_images, tiny_unet
from torch import nn

from ddpm_lib import (
    Denoiser,
    Gaussian,
    GaussianMixture,
    Prediction,
    Schedule,
    Trainer,
    UNet,
    digits,
    frechet_distance,
    plots,
    pretrained,
    pretrained_classifier,
    sample,
    simple_loss,
    timesteps,
    transition,
)

SCHEDULE = Schedule.linear(30)
X = torch.zeros(2, 1, 4, 4)
POINTS = torch.zeros(3, 2, dtype=torch.float64)
GUESS = Prediction.of("eps", X, X, 5, SCHEDULE)
PLANE = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])


def noised(t):
    return SCHEDULE.q_sample(X, t, X)


def trained(images=None, labels=None, classes=None, **options):
    return Trainer(tiny_denoiser(classes=classes), tiny_images(4) if images is None else images, labels, **options)


def with_pixel(value: float) -> torch.Tensor:
    images = tiny_images(2)
    images[0, 0, 0, 0] = value
    return images


# What is tried, what was given as the message must show it, and what the message must say is allowed.
CASES = {
    # schedules
    "beta 0": (lambda: Schedule([0.1, 0.0]), "got 0.0 at t = 2", "strictly between 0 and 1"),
    "beta 1": (lambda: Schedule([0.1, 0.2, 1.0]), "got 1.0 at t = 3", "strictly between 0 and 1"),
    "beta below 0": (lambda: Schedule([-0.5]), "got -0.5 at t = 1", "strictly between 0 and 1"),
    "beta nan": (lambda: Schedule([0.1, math.nan]), "got nan at t = 2", "strictly between 0 and 1"),
    "no beta": (lambda: Schedule([]), "(0,)", "T >= 1 numbers"),
    "beta in a table": (lambda: Schedule([[0.1, 0.2]]), "(1, 2)", "T >= 1 numbers"),
    "linear with T = 20": (lambda: Schedule.linear(20), "T = 20", "T > 20"),
    "linear with T = 0": (lambda: Schedule.linear(0), "got 0", "1 or more"),
    "linear with half a step": (lambda: Schedule.linear(50.5), "50.5", "whole number"),
    "linear up to 1": (lambda: Schedule.linear(50, 0.1, 1.0), "got 1.0 at t = 50", "strictly between 0 and 1"),
    "linear from below 0": (lambda: Schedule.linear(50, beta_1=-1e-4), "got -0.0001 at t = 1", "between 0 and 1"),
    "cosine with T = -3": (lambda: Schedule.cosine(-3), "got -3", "1 or more"),
    "cosine with T in words": (lambda: Schedule.cosine("ten"), "'ten'", "whole number"),
    "cosine with s below 0": (lambda: Schedule.cosine(10, s=-0.1), "got -0.1", "0 or more"),
    "cosine with beta_max 1": (lambda: Schedule.cosine(10, beta_max=1.0), "got 1.0", "between 0 and 1"),
    "unknown schedule": (lambda: Schedule.from_config({"name": "sigmoid"}), "'sigmoid'", "'linear', 'cosine'"),
    "log variance of one step": (lambda: Schedule([0.1]).posterior_log_variance, "has 1", "at least 2 steps"),
    # steps t and images
    "t = 0": (lambda: noised(0), "got 0", "1..30"),
    "t above T": (lambda: noised(31), "got 31", "1..30"),
    "t below 0": (lambda: noised(-1), "got -1", "1..30"),
    "a fractional t": (lambda: noised(2.5), "2.5", "whole number in 1..30"),
    "one t of a batch above T": (lambda: noised(torch.tensor([30, 31])), "got 31", "1..30"),
    "one t of a batch is 0": (lambda: noised(torch.tensor([0, 30])), "got 0", "1..30"),
    "t as floats": (lambda: noised(torch.tensor([1.0, 2.0])), "torch.float32", "torch.int64"),
    "t for three of two images": (lambda: noised(torch.tensor([1, 2, 3])), "(3,)", "one per image"),
    "q_step at 0": (lambda: SCHEDULE.q_step(X, 0, X), "got 0", "1..30"),
    "noise of another shape": (lambda: SCHEDULE.q_sample(X, 3, X[:1]), "(1, 1, 4, 4)", "one shape"),
    "one step with noise of another shape": (lambda: SCHEDULE.q_step(X, 3, X[:1]), "(1, 1, 4, 4)", "one shape"),
    "whole-number images": (lambda: SCHEDULE.q_sample(X.int(), 3, X.int()), "torch.int32", "floating-point"),
    "posterior at t = 0": (lambda: SCHEDULE.posterior(X, X, 0), "got 0", "1..30"),
    "posterior forwards": (lambda: SCHEDULE.posterior(X, X, 5, 7), "t = 5, s = 7", "s < t"),
    "posterior to itself": (lambda: SCHEDULE.posterior(X, X, 5, 5), "t = 5, s = 5", "s < t"),
    "posterior before the data": (lambda: SCHEDULE.posterior(X, X, 5, -1), "got -1", "0..30"),
    "posterior of two shapes": (lambda: SCHEDULE.posterior(X, X[:1], 5), "(1, 1, 4, 4)", "one shape"),
    # predictions
    "unknown kind": (lambda: Prediction.of("mean", X, X, 5, SCHEDULE), "'mean'", "eps, x0, v, score"),
    "prediction of another shape": (
        lambda: Prediction.of("eps", X[:, :, :2], X, 5, SCHEDULE),
        "(2, 1, 2, 4)",
        "(2, 1, 4, 4)",
    ),
    "prediction at t = 0": (lambda: Prediction.of("eps", X, X, 0, SCHEDULE), "got 0", "1..30"),
    "clipping upside down": (lambda: GUESS.clip(1, -1), "[1, -1]", "low < high"),
    "denoiser of an unknown kind": (lambda: Denoiser(nn.Identity(), SCHEDULE, "noise"), "'noise'", "eps, x0, v, score"),
    "denoiser at t = 0": (lambda: tiny_denoiser()(X, 0), "got 0", "1..30"),
    "loss at t above T": (lambda: simple_loss(tiny_denoiser(), X, 31, X), "got 31", "1..30"),
    "loss with noise of another shape": (
        lambda: simple_loss(tiny_denoiser(), X, 3, X[:1]),
        "(1, 1, 4, 4)",
        "one shape",
    ),
    # sampling
    "eta above 1": (lambda: transition(GUESS, 5, 4, SCHEDULE, eta=1.5), "got 1.5", "[0, 1]"),
    "eta below 0": (lambda: sample(tiny_denoiser(), X.shape, eta=-0.1), "got -0.1", "[0, 1]"),
    "eta nan": (lambda: sample(tiny_denoiser(), X.shape, eta=math.nan), "got nan", "[0, 1]"),
    "unknown variance": (
        lambda: sample(tiny_denoiser(), X.shape, variance="small"),
        "'small'",
        "'beta' or 'beta_tilde'",
    ),
    "a transition forwards": (lambda: transition(GUESS, 4, 5, SCHEDULE), "t = 4, s = 5", "s < t"),
    "no steps": (lambda: timesteps(30, 0), "got 0", "1 or more"),
    "more steps than T": (lambda: timesteps(30, 31), "got 31", "at most 30"),
    "half a step": (lambda: timesteps(30, 2.5), "2.5", "whole number"),
    "sampling with half a step": (lambda: sample(tiny_denoiser(), X.shape, steps=2.5), "2.5", "whole number"),
    "a walk that starts below T": (lambda: sample(tiny_denoiser(), X.shape, steps=[29, 5, 0]), "[29, 5, 0]", "T = 30"),
    "a walk that stops short": (lambda: sample(tiny_denoiser(), X.shape, steps=[30, 5]), "[30, 5]", "to 0"),
    "a walk up and down": (lambda: sample(tiny_denoiser(), X.shape, steps=[30, 5, 6, 0]), "[30, 5, 6, 0]", "strictly"),
    "neither shape nor noise": (lambda: sample(tiny_denoiser()), "shape", "x_T"),
    # the network
    "channels that groups do not divide": (lambda: UNet(base_channels=48), "got 48", "multiple of groups = 32"),
    "an odd number of channels": (lambda: tiny_unet(base_channels=3, groups=3), "got 3", "even"),
    "no groups": (lambda: tiny_unet(groups=0), "got 0", "1 or more"),
    "a size that cannot be halved": (lambda: UNet(image_size=28), "28 x 28", "multiples of 8"),
    "a size that patches do not divide": (lambda: tiny_unet(image_size=8, patch_size=3), "8 x 8", "multiples of 6"),
    "no patches": (lambda: tiny_unet(patch_size=0), "got 0", "1 or more"),
    "no size": (lambda: tiny_unet(image_size=0), "got 0", "1 or more"),
    "no channels": (lambda: tiny_unet(in_channels=0), "got 0", "1 or more"),
    "no levels": (lambda: tiny_unet(channel_multipliers=()), "got ()", "whole numbers >= 1"),
    "multiplier 0": (lambda: tiny_unet(channel_multipliers=(1, 0)), "(1, 0)", "whole numbers >= 1"),
    "multiplier 1.5": (lambda: tiny_unet(channel_multipliers=(1, 1.5)), "1.5", "whole number"),
    "no blocks": (lambda: tiny_unet(blocks_per_level=0), "got 0", "1 or more"),
    "attention where no map is": (lambda: tiny_unet(attention_resolutions=(3, 2)), "got [3]", "[4, 2]"),
    "dropout 1": (lambda: tiny_unet(dropout=1.0), "got 1.0", "[0, 1)"),
    "no class": (lambda: tiny_unet(classes=0), "got 0", "1 or more"),
    "colour into a grey network": (lambda: tiny_denoiser()(torch.zeros(2, 3, 4, 4), 5), "(2, 3, 4, 4)", "(B, 1, H, W)"),
    "an image without batch": (lambda: tiny_denoiser()(torch.zeros(1, 4, 4), 5), "(1, 4, 4)", "(B, 1, H, W)"),
    "an odd image": (lambda: tiny_denoiser()(torch.zeros(2, 1, 4, 7), 5), "4 x 7", "multiples of 2"),
    "labels without classes": (lambda: tiny_denoiser()(X, 5, torch.tensor([0, 1])), "no classes", "classes=N"),
    "a label too large": (lambda: tiny_denoiser(classes=3)(X, 5, torch.tensor([0, 4])), "got 4", "0..3"),
    "a label below 0": (lambda: tiny_denoiser(classes=3)(X, 5, torch.tensor([0, -1])), "got -1", "0..3"),
    "labels as floats": (lambda: tiny_denoiser(classes=3)(X, 5, torch.zeros(2)), "torch.float32", "whole number"),
    "one label for two images": (lambda: tiny_denoiser(classes=3)(X, 5, torch.tensor([1])), "(1,)", "(2,)"),
    # training
    "whole numbers as images": (lambda: trained(tiny_images().short()), "torch.int16", "uint8, or floats in [-1, 1]"),
    "accumulation that does not divide": (lambda: trained(batch_size=4, accumulate=3), "got 4", "1 x 3"),
    "what to do with NaN": (lambda: trained(nonfinite="ignore"), "'ignore'", "'stop' or 'skip'"),
    "images up to 255": (lambda: trained(with_pixel(255.0)), "255", "[-1, 1]"),
    "images below -1": (lambda: trained(with_pixel(-1.5)), "-1.5", "[-1, 1]"),
    "images with nan": (lambda: trained(with_pixel(math.nan)), "nan", "[-1, 1]"),
    "images without channels": (lambda: trained(tiny_images()[:, 0]), "(10, 4, 4)", "(N, C, H, W)"),
    "no images": (lambda: trained(tiny_images()[:0]), "(0, 1, 4, 4)", "N > 0"),
    "batch_size 0": (lambda: trained(batch_size=0), "got 0", "1 or more"),
    "learning_rate 0": (lambda: trained(learning_rate=0.0), "got 0.0", "above 0"),
    "learning_rate nan": (lambda: trained(learning_rate=math.nan), "got nan", "above 0"),
    "weight_decay below 0": (lambda: trained(weight_decay=-0.1), "got -0.1", "0 or more"),
    "weight_decay nan": (lambda: trained(weight_decay=math.nan), "got nan", "0 or more"),
    "warmup below 0": (lambda: trained(warmup=-1), "warmup = -1", "0 <= warmup"),
    "decay before warm-up ends": (lambda: trained(warmup=9, decay_steps=9), "decay_steps = 9", "warmup < decay_steps"),
    "ema_decay 1": (lambda: trained(ema_decay=1.0), "got 1.0", "[0, 1)"),
    "clip_norm 0": (lambda: trained(clip_norm=0), "got 0", "above 0"),
    "weight_cap 0": (lambda: trained(weight_cap=0.0), "got 0.0", "above 0"),
    "condition_dropout 1": (lambda: trained(condition_dropout=1), "got 1", "[0, 1)"),
    "unknown precision": (lambda: trained(precision="float8"), "'float8'", "auto, float32, bfloat16, float16"),
    "seed below 0": (lambda: trained(seed=-1), "got -1", "0 or more"),
    "training no steps": (lambda: next(trained().run(0)), "got 0", "1 or more"),
    "training labels without classes": (lambda: trained(labels=torch.zeros(4).long()), "no classes", "classes=N"),
    "training labels too few": (lambda: trained(labels=torch.zeros(3).long(), classes=2), "(3,)", "(4,)"),
    "training labels as floats": (lambda: trained(labels=torch.zeros(4), classes=2), "torch.float32", "whole number"),
    "training labels too large": (lambda: trained(labels=torch.tensor([0, 1, 2, 2]), classes=2), "0 to 2", "0..1"),
    # worlds
    "a weight of 0": (lambda: GaussianMixture([0.0, 1.0], [[0.0], [1.0]], [1, 1]), "[0.0, 1.0]", "above 0"),
    "a weight too many": (lambda: GaussianMixture([1, 1, 1], [[0.0], [1.0]], [1, 1]), "(3,)", "weights (K,)"),
    "means in a row": (lambda: GaussianMixture([1, 1], [0.0, 1.0], [1, 1]), "(2,) and (2,)", "means (K, d)"),
    "a variance below 0": (lambda: GaussianMixture([1.0], [[0.0]], [-1.0]), "-1.0", "no negative eigenvalue"),
    "a covariance not symmetric": (lambda: Gaussian([0.0, 0.0], [[1, 0.5], [0, 1]]), "0.5", "symmetric"),
    "a covariance of another size": (lambda: Gaussian([0.0, 0.0], [[1.0]]), "(1, 1)", "(d, d)"),
    "covariances too few": (lambda: GaussianMixture([1, 1], [[0.0], [1.0]], [1.0]), "(1,)", "(2, 1, 1)"),
    "points of another space": (lambda: PLANE.log_prob(POINTS[:, :1]), "(3, 1)", "(N, 2)"),
    "a point for points": (lambda: PLANE.score(POINTS[0]), "(2,)", "(N, 2)"),
    "points for a point": (lambda: PLANE.reverse(POINTS, 5, 4, SCHEDULE), "(1, 3, 2)", "(N, 2)"),
    "alpha_bar above 1": (lambda: PLANE.noised(1.2), "got 1.2", "[0, 1]"),
    "guessing at alpha_bar below 0": (lambda: PLANE.denoise(POINTS, -0.5), "got -0.5", "[0, 1]"),
    "exact denoiser at t = 0": (lambda: PLANE.denoiser(SCHEDULE)(POINTS, 0), "got 0", "1..30"),
    "reverse law forwards": (lambda: PLANE.reverse(POINTS[0], 4, 5, SCHEDULE), "t = 4, s = 5", "s < t"),
    # metrics, data, pictures
    "features of two widths": (lambda: frechet_distance(POINTS, POINTS[:, :1]), "(3, 1)", "(N, D) and (M, D)"),
    "one row of features": (lambda: frechet_distance(POINTS, POINTS[:1]), "(1, 2)", "N, M >= 2"),
    "features with nan": (lambda: frechet_distance(POINTS, POINTS * math.nan), "nan", "finite"),
    "unknown split": (lambda: digits("validation"), "'validation'", "'train', 'test' or 'all'"),
    "unknown model": (lambda: pretrained("cats"), "'cats'", "digits-classifier"),
    "classifying other sizes": (lambda: pretrained_classifier()(X), "(2, 1, 4, 4)", "(B, 1, 8, 8)"),
    "pictures of two channels": (lambda: plots.tile(torch.zeros(2, 2, 4, 4), 2), "(2, 2, 4, 4)", "C 1 or 3"),
    "pictures in no columns": (lambda: plots.show_images(X, columns=0), "got 0", "1 or more"),
    "a slider of one frame": (lambda: plots.slider([np.zeros((2, 2))], ["a"], "x", "y"), "got 1 and 1", "two or more"),
    "a label too few": (lambda: plots.slider([np.zeros((2, 2))] * 3, ["a", "b"], "x", "y"), "got 3 and 2", "label"),
    "a start beyond the frames": (
        lambda: plots.slider([np.zeros((2, 2))] * 2, ["a", "b"], "x", "y", start=2),
        "got 2",
        "0..1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_named_and_what_is_right_is_said(name):
    attempt, given, allowed = CASES[name]
    with pytest.raises(ValueError, match=re.escape(given)) as caught:
        attempt()
    assert allowed in str(caught.value)


def test_the_table_is_long_enough():
    assert len(CASES) >= 45


@pytest.mark.parametrize(
    "t", [5, np.int64(5), np.array(5), torch.tensor(5), torch.tensor([5, 5], dtype=torch.int32)], ids=repr
)
def test_whole_numbers_of_any_library_are_right(t):
    assert torch.equal(noised(t), torch.zeros_like(X))


@pytest.mark.parametrize("steps", [3, np.int64(3), [30, 20, 10, 0], range(30, -1, -10), (30, 20, 10, 0)], ids=repr)
def test_steps_may_be_a_number_or_a_path(steps):
    x_T = torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
    found = sample(tiny_denoiser(), x_T=x_T, steps=steps, eta=0.0)
    assert torch.equal(found, sample(tiny_denoiser(), x_T=x_T, steps=3, eta=0.0))
