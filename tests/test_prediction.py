"""Predictions, their four readings, and the denoiser that makes them."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_denoiser, tiny_images
from torch import nn

from ddpm_lib import Denoiser, Prediction, Schedule, capped_loss, simple_loss

KINDS = ("eps", "x0", "v", "score")


def truth(schedule, t, shape=(3, 2)):
    """x0, eps, v, score and x_t in numpy, each from its definition."""
    rng = np.random.default_rng(t)
    x0, eps = rng.uniform(-1, 1, shape), rng.standard_normal(shape)
    alpha_bar = np.prod(1 - schedule.beta.numpy()[1 : t + 1])
    a, b = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return {"x0": x0, "eps": eps, "v": a * eps - b * x0, "score": -eps / b, "x_t": a * x0 + b * eps}


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 2, 500, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_any_reading_gives_the_other_three(name, t, kind, request):
    schedule = request.getfixturevalue(name)
    expected = truth(schedule, t)
    found = Prediction.of(kind, torch.from_numpy(expected[kind]), torch.from_numpy(expected["x_t"]), t, schedule)
    # Dividing by the signal (from eps) or the noise (from x0) magnifies rounding by its inverse.
    tolerance = 1e-14 * max(1 / float(schedule.signal[t]), 1 / float(schedule.noise[t])) ** 2
    for other in KINDS:
        np.testing.assert_allclose(getattr(found, other), expected[other], rtol=0, atol=tolerance)


def test_each_image_is_read_at_its_own_step(linear):
    t = torch.tensor([3, 400, 1000])
    x_t, value = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    together = Prediction.of("v", value, x_t, t, linear)
    for i in range(3):
        alone = Prediction.of("v", value[i : i + 1], x_t[i : i + 1], int(t[i]), linear)
        for kind in KINDS:
            assert torch.equal(getattr(together, kind)[i : i + 1], getattr(alone, kind))


@pytest.mark.parametrize("t", [1, 30, 1000])
def test_score_is_the_gradient_of_the_log_density(linear, t):
    """For one known x0, log q(x_t | x_0) differentiated by autograd."""
    x0 = torch.tensor([[0.4, -0.8]], dtype=torch.float64)
    x_t = torch.tensor([[1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    alpha_bar = float(linear.alpha_bar[t])
    normal = torch.distributions.Normal(math.sqrt(alpha_bar) * x0, math.sqrt(1 - alpha_bar))
    (gradient,) = torch.autograd.grad(normal.log_prob(x_t).sum(), x_t)
    found = Prediction.of("x0", x0, x_t.detach(), t, linear)
    torch.testing.assert_close(found.score, gradient, rtol=1e-9, atol=0)


def test_v_is_the_velocity_of_the_noising_angle():
    """With signal = cos(angle) and noise = sin(angle), v is the derivative of x_t by the angle."""
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0, eps = 0.3, -1.2
    x_t = angle.cos() * x0 + angle.sin() * eps
    (velocity,) = torch.autograd.grad(x_t, angle)
    schedule = Schedule([math.sin(0.7) ** 2])
    found = Prediction.of("x0", torch.tensor([x0], dtype=torch.float64), x_t.detach()[None], 1, schedule)
    assert float(found.v) == pytest.approx(float(velocity), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_moves_eps_with_x0(linear, kind):
    x_t = 3 * torch.randn(4, 5, dtype=torch.float64)
    whole = Prediction.of(kind, torch.randn(4, 5, dtype=torch.float64), x_t, 300, linear)
    clipped = whole.clip()
    assert clipped.x0.abs().max() == 1
    np.testing.assert_array_equal(clipped.x0, np.clip(whole.x0.numpy(), -1, 1))
    signal, noise = float(linear.signal[300]), float(linear.noise[300])
    torch.testing.assert_close(signal * clipped.x0 + noise * clipped.eps, x_t, rtol=0, atol=1e-12)
    inside = whole.x0.abs() <= 1
    torch.testing.assert_close(clipped.eps[inside], whole.eps[inside], rtol=0, atol=1e-12)
    assert torch.equal(whole.clip(-2, 0.5).x0, whole.x0.clamp(-2, 0.5))


class Recorder(nn.Module):
    """A network that notes how it was called and answers with zeros, or whatever it is told to."""

    def __init__(self, answer=None):
        super().__init__()
        self.calls, self.answer = [], answer

    def forward(self, *arguments):
        self.calls.append(arguments)
        return torch.zeros_like(arguments[0]) if self.answer is None else self.answer


@pytest.mark.parametrize("t", [1, 30, torch.tensor([1, 5, 30])], ids=str)
def test_the_network_counts_steps_from_0(t):
    network = Recorder()
    Denoiser(network, Schedule.linear(30))(torch.randn(3, 2), t)
    ((_, steps),) = network.calls
    assert steps.dtype == torch.int64
    assert steps.tolist() == (torch.as_tensor(t).expand(3) - 1).tolist()


def test_labels_reach_the_network_only_where_given():
    network = Recorder()
    denoiser = Denoiser(network, Schedule.linear(30))
    label = torch.tensor([2, 0, 1])
    denoiser(torch.randn(3, 2), 4, label)
    denoiser(torch.randn(3, 2), 4)
    assert [len(call) for call in network.calls] == [3, 2]
    assert network.calls[0][2] is label


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_reads_the_output_as_what_it_predicts(linear, kind):
    expected = truth(linear, 250)
    network = Recorder(torch.from_numpy(expected[kind]))
    found = Denoiser(network, linear, kind)(torch.from_numpy(expected["x_t"]), 250)
    for other in KINDS:
        np.testing.assert_allclose(getattr(found, other), expected[other], atol=1e-12)


def test_a_half_precision_output_is_combined_in_the_precision_of_the_image(linear):
    network = Recorder(torch.zeros(2, 3, dtype=torch.bfloat16))
    found = Denoiser(network, linear)(torch.ones(2, 3), 1)
    assert found.x0.dtype == found.eps.dtype == torch.float32
    assert found.x0.flatten().tolist() == pytest.approx([0.9999**-0.5] * 6, rel=1e-6)


# The simple loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_costs_nothing(linear, kind):
    expected = truth(linear, 600)
    network = Recorder(torch.from_numpy(expected[kind]))
    x0, eps = torch.from_numpy(expected["x0"]), torch.from_numpy(expected["eps"])
    assert simple_loss(Denoiser(network, linear, kind), x0, 600, eps).max() < 1e-24


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_error_costs_its_mean_square(linear, kind):
    expected = truth(linear, 600)
    error = np.random.default_rng(0).standard_normal((3, 2))
    network = Recorder(torch.from_numpy(expected[kind] + error))
    x0, eps = torch.from_numpy(expected["x0"]), torch.from_numpy(expected["eps"])
    losses = simple_loss(Denoiser(network, linear, kind), x0, 600, eps)
    np.testing.assert_allclose(losses, (error**2).mean(1), rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [0.5, 5, math.inf])
def test_the_capped_loss_weighs_the_error_of_x0(linear, kind, cap):
    t, x0, eps, output = torch.tensor([1, 100, 600, 1000]), *torch.randn(3, 4, 5, dtype=torch.float64)
    denoiser = Denoiser(Recorder(output), linear, kind)
    losses = capped_loss(denoiser, x0, t, eps, cap=cap)
    guessed = denoiser(linear.q_sample(x0, t, eps), t)
    both = guessed.x0, guessed.eps
    for i, step in enumerate(t.tolist()):
        alpha_bar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(step))
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_t = signal * x0[i] + noise * eps[i]
        guess = {
            "x0": output[i],
            "eps": (x_t - noise * output[i]) / signal,
            "v": signal * x_t - noise * output[i],
            "score": (x_t + noise**2 * output[i]) / signal,
        }[kind]
        expected = min(signal / noise, cap) * (guess - x0[i]).square().mean()
        assert float(losses[i]) == pytest.approx(float(expected), rel=1e-9)
    if cap == math.inf:  # the geometric mean of the losses of x0 and eps
        of = [
            simple_loss(Denoiser(Recorder(guess), linear, one), x0, t, eps) for one, guess in zip(("x0", "eps"), both)
        ]
        torch.testing.assert_close(losses, (of[0] * of[1]).sqrt())


def test_the_network_sees_the_noisy_image_at_each_step(linear):
    network = Recorder()
    x0, eps, t = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([1, 40, 1000])
    simple_loss(Denoiser(network, linear), x0, t, eps)
    ((x_t, steps),) = network.calls
    alpha_bar = linear.alpha_bar[t].view(3, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, rtol=0, atol=1e-6)
    assert steps.tolist() == [0, 39, 999]


def test_loss_has_the_gradient_of_its_finite_differences():
    denoiser = tiny_denoiser().double()
    images = tiny_images(2).double()
    eps, t = torch.randn_like(images), torch.tensor([3, 22])
    weight = denoiser.network.head.weight
    simple_loss(denoiser, images, t, eps).mean().backward()
    with torch.no_grad():
        values = []
        for h in (1e-5, -2e-5):
            weight[0, 1, 1, 2] += h
            values.append(float(simple_loss(denoiser, images, t, eps).mean()))
    assert float(weight.grad[0, 1, 1, 2]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
