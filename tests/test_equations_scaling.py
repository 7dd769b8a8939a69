"""The equations of the chapter on scaling, each against a computation that shares no code with the formula."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from tiny_models import tiny_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lib import Denoiser, Schedule, Trainer, UNet, simple_loss
from ddpm_lib.cost import cost, per_image
from ddpm_lib.recipe import Recipe

FORMATS = {torch.float32: (24, 8), torch.float16: (11, 5), torch.bfloat16: (8, 8)}


def by_hand(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of a forward pass, from the shapes that reach each layer; attention's two products are added by name."""
    found = []

    def note(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            found.append(2 * output.numel() * layer.in_channels * math.prod(layer.kernel_size))
        elif isinstance(layer, nn.Linear):
            found.append(2 * output.numel() * layer.in_features)
        elif type(layer).__name__ == "Attention":
            batch, channels, height, width = output.shape
            found.append(2 * 2 * batch * channels * (height * width) ** 2)

    handles = [part.register_forward_hook(note) for part in module.modules()]
    module(*inputs)
    for handle in handles:
        handle.remove()
    return sum(found)


# What a run costs


@pytest.mark.equation("eq-scaling-step-cost")
def test_a_training_step_is_three_forward_passes():
    with torch.device("meta"):
        network = UNet()
    x, t = torch.zeros(2, 3, 32, 32, device="meta"), torch.zeros(2, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, t).square().mean().backward()
    forward = by_hand(network, x[:1], t[:1])
    assert counter.get_total_flops() == pytest.approx(3 * 2 * forward, rel=0.01)


@pytest.mark.equation("eq-scaling-hours")
def test_hours_against_a_simulated_clock_and_the_paper():
    """A machine that does U of its peak, step by step; and the paper's 10.6 hours for 800,000 steps."""
    S, flops, P, U = 5_000, 3.0e11, 2.0e13, 0.25
    clock = sum((flops / (P * U) for _ in range(S)), 0.0)
    assert S * flops / (3600 * P * U) == pytest.approx(clock / 3600)

    with torch.device("meta"):
        network = UNet()
    step = 3 * 128 * by_hand(network, torch.zeros(1, 3, 32, 32, device="meta"), torch.zeros(1, device="meta"))
    assert step == pytest.approx(4.78e12, rel=1e-3)
    peak, used = 4 * 2 * 2 * 128**2 * 2 * 940e6, step * 21 / (4 * 2 * 2 * 128**2 * 2 * 940e6)
    assert used == pytest.approx(0.20, abs=0.01)
    assert 800_000 * step / (3600 * peak * used) == pytest.approx(10.6, abs=0.05)


@pytest.mark.equation("eq-scaling-memory")
def test_memory_of_a_trainer_is_twenty_bytes_a_weight_and_activations_per_image():
    torch.manual_seed(0)
    denoiser = Denoiser(tiny_unet(), Schedule.linear(T=50))
    shape = tuple(denoiser.network.config[name] for name in ("in_channels", "image_size", "image_size"))
    trainer = Trainer(denoiser, torch.zeros(8, *shape), batch_size=4, warmup=0, precision="float32")
    list(trainer.run(1))
    weights = list(denoiser.parameters())
    adam = [value for p in weights for value in trainer.optimiser.state[p].values() if value.shape == p.shape]
    held = [*weights, *(p.grad for p in weights), *trainer.ema.parameters(), *adam]
    n = sum(p.numel() for p in weights)
    assert sum(t.numel() * t.element_size() for t in held) == 20 * n

    def kept(size: int) -> int:
        storages = {}

        def keep(tensor):
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = simple_loss(denoiser, torch.zeros(size, *shape), 10, torch.zeros(size, *shape)).mean()
        assert output.grad_fn is not None
        return sum(storages.values())

    one, two, four = kept(2), kept(4), kept(8)
    assert (four - two) / 4 == pytest.approx((two - one) / 2, rel=0.01)  # linear in the number of images

    recipe = Recipe.load("digits")
    _, a = per_image(recipe)
    n = sum(p.numel() for p in recipe.denoiser().parameters())
    by_formula = (20 * n + a * recipe.training.batch_size) / 2**30
    assert cost(recipe, "cpu")["memory, about"].startswith(f"{by_formula:.2g} GiB")


# A batch in parts


@pytest.mark.equation("eq-scaling-parts")
@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 5, 2, 4)])
def test_the_gradient_of_a_mean_is_the_weighted_mean_of_gradients(sizes, generator):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)

    def gradient(part: Tensor) -> Tensor:
        grads = torch.autograd.grad(model(part).square().mean(), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    parts = sum(len(part) / len(x) * gradient(part) for part in x.split(sizes))
    weights = list(model.parameters())
    h, nudged = 1e-6, []  # the whole batch, by differences
    for p in weights:
        for i in range(p.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * h
                    values.append(float(model(x).square().mean()))
                    p.view(-1)[i] -= sign * h
            nudged.append((values[0] - values[1]) / (2 * h))
    torch.testing.assert_close(parts, torch.tensor(nudged, dtype=torch.float64), rtol=1e-6, atol=1e-8)


# The noise of gradients


def world(seed: int = 0, d: int = 6):
    """A gradient, a covariance and a Hessian with nothing special about them."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, d, d))
    return rng, rng.normal(size=d), a @ a.T, b @ b.T / d + 0.1 * np.eye(d)


def batches(rng, G, sigma, B: int, number: int) -> np.ndarray:
    root = np.linalg.cholesky(sigma)
    return G + rng.normal(size=(number, B, len(G))).mean(1) @ root.T


@pytest.mark.equation("eq-scaling-expected-norm")
@pytest.mark.parametrize("B", [1, 7])
def test_expected_length_of_a_batch_gradient(B):
    rng, G, sigma, _ = world()
    squared = (batches(rng, G, sigma, B, 60_000) ** 2).sum(1)
    assert G @ G + np.trace(sigma) / B == pytest.approx(squared.mean(), abs=4 * squared.std() / 60_000**0.5)


@pytest.mark.equation("eq-scaling-noise-estimator")
def test_the_two_estimators_are_unbiased():
    rng, G, sigma, _ = world(1)
    b, B, number = 3, 12, 40_000
    parts = np.stack([batches(rng, G, sigma, b, number) for _ in range(B // b)])
    small, large = (parts[0] ** 2).sum(1), (parts.mean(0) ** 2).sum(1)
    for estimate, truth in (
        ((B * large - b * small) / (B - b), G @ G),
        ((small - large) / (1 / b - 1 / B), np.trace(sigma)),
    ):
        assert estimate.mean() == pytest.approx(truth, abs=4 * estimate.std() / number**0.5)


def gain(theta: np.ndarray, H: np.ndarray, G: np.ndarray, sigma: np.ndarray, B: int, rng) -> float:
    """The largest mean fall of a quadratic loss in one noisy step: a search over the rate, draws held fixed."""
    g = batches(rng, G, sigma, B, 100_000)

    def fall(rate):
        before = 0.5 * theta @ H @ theta
        after = theta - rate * g
        return before - 0.5 * np.einsum("ni,ij,nj->n", after, H, after).mean()

    best = minimize_scalar(lambda rate: -fall(rate), bounds=(0, 10 / np.trace(H)), method="bounded")
    return -best.fun


@pytest.mark.equation("eq-scaling-gain")
@pytest.mark.parametrize("B", [1, 5, 40])
def test_gain_of_the_best_step(B):
    rng, theta, sigma, H = world(2)
    G = H @ theta
    largest = (G @ G) ** 2 / (2 * G @ H @ G)
    B_H = np.trace(H @ sigma) / (G @ H @ G)
    assert largest / (1 + B_H / B) == pytest.approx(gain(theta, H, G, sigma, B, rng), rel=0.04)


@pytest.mark.equation("eq-scaling-tradeoff")
def test_steps_and_examples_trade_off_along_a_hyperbola():
    """Steps for a given small gain, from simulated steps at each batch size; the limits from the extreme ones."""
    rng, theta, sigma, H = world(2)
    G, sigma = H @ theta, 15 * sigma
    steps = {B: 1 / gain(theta, H, G, sigma, B, rng) for B in (1, 2, 6, 20, 60)}
    exact = 1 / gain(theta, H, G, 1e-12 * sigma, 1, rng)
    B_H = np.trace(H @ sigma) / (G @ H @ G)
    assert 2 < B_H < 60  # otherwise the batch sizes show one end of the curve only
    for B, S in steps.items():
        assert (S / exact - 1) * (S * B / (exact * B_H) - 1) == pytest.approx(1, rel=0.2)


@pytest.mark.equation("eq-scaling-one-seed")
@pytest.mark.parametrize("k", [1, 2, 4, 16])
def test_what_remains_of_the_variance_when_k_processes_share_their_draws(k):
    """Simulated processes, in a world of 7 images and 5 draws whose gradients mix both; and the parts sum to it all."""
    rng = np.random.default_rng(3)
    images, draws = rng.normal(size=(7, 1, 4)), 1.5 * rng.normal(size=(1, 5, 4))
    g = 2 + 0.5 * images + draws + images * (draws - draws.mean(1))
    G, by_draw, by_image = g.mean((0, 1)), g.mean(0), g.mean(1)
    trace = ((g - G) ** 2).sum(2).mean()
    V_x, V_u = ((by_image - G) ** 2).sum(1).mean(), ((by_draw - G) ** 2).sum(1).mean()
    interaction = g - by_image[:, None] - by_draw + G
    assert V_x + V_u + (interaction**2).sum(2).mean() == pytest.approx(trace)
    rho = V_u / trace
    assert 0.2 < rho < 0.8
    assert V_x < 0.5 * (1 - rho) * trace  # the interaction is not a trifle

    u = rng.integers(5, size=(100_000, 1))
    averages = g[rng.integers(7, size=(100_000, k)), u].mean(1)
    assert rho + (1 - rho) / k == pytest.approx(averages.var(0).sum() / trace, rel=0.02)

    products = [g[x, u[:, 0]] for x in rng.integers(7, size=(2, 100_000))]  # how the chapter finds V_u
    assert G @ G + V_u == pytest.approx((products[0] * products[1]).sum(1).mean(), rel=0.02)


# Numbers with fewer bits


@pytest.mark.equation("eq-scaling-range")
@pytest.mark.parametrize("kind", FORMATS)
def test_range_of_the_formats(kind):
    p, e = FORMATS[kind]
    E = 2 ** (e - 1) - 1
    largest, smallest, tiny = (2 - 2.0 ** (1 - p)) * 2.0**E, 2.0 ** (1 - E), 2.0 ** (2 - E - p)

    def held(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).to(kind))

    assert held(largest) == largest
    assert math.isinf(held(largest * (1 + 2.0 ** (1 - p))))
    odd = 1 + 2.0 ** (1 - p)  # all digits in use
    assert held(smallest * odd) == smallest * odd
    assert held(smallest / 2 * odd) != smallest / 2 * odd
    assert held(tiny) == tiny
    assert held(tiny / 2) == 0


@pytest.mark.equation("eq-scaling-roundoff")
@pytest.mark.parametrize("kind", FORMATS)
def test_rounding_stays_within_the_unit_roundoff_and_comes_near_it(kind, generator):
    p, _ = FORMATS[kind]
    x = torch.randn(400_000, dtype=torch.float64, generator=generator) * 3
    x = x[x.abs() > 1e-3]
    worst = float(((x.to(kind).double() - x) / x).abs().max())
    assert 0.95 * 2.0**-p < worst <= 2.0**-p


@pytest.mark.equation("eq-scaling-lost")
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_lost_when_it_is_added(kind, generator):
    p, _ = FORMATS[kind]
    w = torch.randn(2_000, generator=generator).to(kind)
    w = w[w.abs() > 1e-2]
    w = torch.cat([w, 2.0 ** torch.arange(-6, 6, dtype=kind)])  # the closest neighbours lie below a power of 2
    for sign in (1, -1):
        for factor, changed in ((0.999, 0), (2.01, len(w))):
            delta = sign * factor * 2.0 ** (-p - 1) * w.double().abs()
            assert int(((w.double() + delta).to(kind) != w).sum()) == changed
    just_more = torch.tensor(1 - 1.001 * 2.0 ** (-p - 1), dtype=torch.float64)
    assert float(just_more.to(kind)) != 1  # below a power of 2 the bound is sharp


@pytest.mark.equation("eq-scaling-loss-scale")
@pytest.mark.parametrize("s", [1.0, 2.0**10, 2.0**17])
def test_a_loss_scale_moves_the_range_of_float16(s, generator):
    g = 2.0 ** (torch.rand(200_000, dtype=torch.float64, generator=generator) * 60 - 44)
    back = (g * s).to(torch.float16).double() / s
    good = ((back - g).abs() <= 2.0**-11 * g).numpy()
    inside = ((s * g >= 2.0**-14) & (s * g <= 65504)).numpy()
    assert inside.any()
    assert good[inside].all()
    assert not good[(s * g < 2.0**-25).numpy()].any()
    assert not good[(s * g > 65520).numpy()].any()
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    scaled = torch.autograd.grad(s * x.exp().mean(), x)[0] / s
    torch.testing.assert_close(scaled, x.detach().exp() / 20, rtol=1e-12, atol=0)
