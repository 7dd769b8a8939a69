"""The equations of the chapter on the U-Net, each against a computation that shares no code with the formula."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.signal import correlate2d
from scipy.special import expit
from tiny_models import draw_parameters, tiny_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lib import Denoiser, Schedule
from ddpm_lib.unet import Attention, Downsample, ResidualBlock, TimeEmbedding, Upsample, attend


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def multiplications(module, *inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2


def values(parameter: Tensor) -> np.ndarray:
    return parameter.detach().double().numpy()


def convolve(layer: nn.Conv2d, x: np.ndarray) -> np.ndarray:
    """A convolution with zeros around, one channel (C, H, W) at a time, by scipy."""
    weight, bias = values(layer.weight), values(layer.bias)
    return (
        np.stack([sum(correlate2d(a, w, mode="same") for a, w in zip(x, row)) for row in weight]) + bias[:, None, None]
    )


def silu(a: np.ndarray) -> np.ndarray:
    return a * expit(a)


def group_norm(layer: nn.GroupNorm, x: np.ndarray) -> np.ndarray:
    """One image (C, H, W), by loops over groups and channels."""
    result, size = np.empty_like(x), len(x) // layer.num_groups
    for g in range(layer.num_groups):
        group = x[g * size : (g + 1) * size]
        mean = group.sum() / group.size
        variance = ((group - mean) ** 2).sum() / group.size
        for i in range(g * size, (g + 1) * size):
            standard = (x[i] - mean) / math.sqrt(variance + 1e-6)
            result[i] = values(layer.weight)[i] * standard + values(layer.bias)[i]
    return result


# Convolutions: cost, field of view, halving, doubling


@pytest.mark.equation("eq-unet-conv-cost")
@pytest.mark.parametrize(("c", "out", "k", "height", "width"), [(3, 8, 3, 6, 5), (4, 4, 1, 7, 2), (2, 5, 5, 4, 4)])
def test_cost_of_a_convolution(c, out, k, height, width):
    layer, x = nn.Conv2d(c, out, k, padding=k // 2), torch.zeros(1, c, height, width)
    assert count(layer) == out * (k**2 * c + 1)
    assert multiplications(layer, x) == height * width * out * k**2 * c


@pytest.mark.equation("eq-unet-receptive-field")
@pytest.mark.parametrize("seed", range(5))
def test_receptive_field_is_where_the_gradient_is_not_zero(seed):
    generator = np.random.default_rng(seed)
    layers = [(int(generator.choice([1, 3, 5])), int(generator.choice([1, 1, 2, 3]))) for _ in range(5)]
    x = torch.zeros(1, 1, 2500, requires_grad=True)
    y = x
    for k, s in layers:
        y = F.conv1d(y, torch.ones(1, 1, k), stride=s)
    y[0, 0, y.shape[2] // 2].backward()
    seen = x.grad[0, 0].nonzero()
    field = 1 + sum((k - 1) * math.prod(s for _, s in layers[:i]) for i, (k, _) in enumerate(layers))
    assert int(seen.max() - seen.min()) + 1 == field


@pytest.mark.equation("eq-unet-downsample")
def test_halving_reads_two_i_to_two_i_plus_two():
    part = draw_parameters(Downsample(1, 1)).double()
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    padded = np.zeros((7, 7))
    padded[:6, :6] = x[0, 0]
    weight, bias = values(part.conv.weight)[0, 0], values(part.conv.bias)[0]
    expected = [
        [bias + (weight * padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]).sum() for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(part(x, None).detach()[0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.equation("eq-unet-upsample")
def test_doubling_takes_the_pixel_at_half_the_place():
    part = draw_parameters(Upsample(1)).double()
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    repeated = np.array([[float(x[0, 0, i // 2, j // 2]) for j in range(8)] for i in range(6)])
    np.testing.assert_allclose(part(x, None).detach()[0], convolve(part.conv, repeated[None]), rtol=0, atol=1e-12)


@pytest.mark.equation("eq-unet-bottleneck")
@pytest.mark.parametrize("k", [1, 5, 11, 12])
def test_white_noise_loses_what_the_bottleneck_lacks(k):
    d, generator = 12, np.random.default_rng(k)
    bound = 1 - k / d
    eps = generator.standard_normal((200_000, d))
    encoder = generator.standard_normal((k, d))
    decoder = np.linalg.lstsq(eps @ encoder.T, eps, rcond=None)[0].T  # the best decoder of this encoder, from samples
    assert np.mean((eps - eps @ encoder.T @ decoder.T) ** 2) == pytest.approx(bound, abs=5e-3)
    for _ in range(200):  # no pair does better: the exact error of random pairs around the best
        D = decoder + 0.1 * generator.standard_normal((d, k))
        E = encoder + 0.1 * generator.standard_normal((k, d))
        assert np.sum((np.eye(d) - D @ E) ** 2) / d >= bound - 1e-12


# Blocks


@pytest.mark.equation("eq-unet-silu")
def test_silu_and_the_one_place_where_its_slope_vanishes():
    a = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    np.testing.assert_allclose(F.silu(a).detach(), a.detach().numpy() / (1 + np.exp(-a.detach().numpy())), atol=1e-14)
    slope = torch.autograd.grad(F.silu(a).sum(), a)[0]
    assert int((slope[1:].sign() != slope[:-1].sign()).sum()) == 1
    place = brentq(lambda x: expit(x) * (1 + x * (1 - expit(x))), -3, 0)
    crossing = a[int((slope < 0).sum())].item()
    assert crossing == pytest.approx(place, abs=0.02)


@pytest.mark.equation("eq-unet-residual-block")
@pytest.mark.parametrize("out", [4, 6])
def test_residual_block_by_scipy(out):
    part = draw_parameters(ResidualBlock(4, out, 5, dropout=0.3, groups=2)).double().eval()
    x, e = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    told = values(part.embedding.weight) @ silu(e.numpy()) + values(part.embedding.bias)
    h = convolve(part.conv_1, silu(group_norm(part.norm_1, x.numpy()))) + told[:, None, None]
    expected = convolve(part.conv_2, silu(group_norm(part.norm_2, h)))
    expected += x.numpy() if out == 4 else convolve(part.shortcut, x.numpy())
    np.testing.assert_allclose(part(x[None], e[None]).detach()[0], expected, rtol=0, atol=1e-11)


@pytest.mark.equation("eq-unet-group-norm")
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["ordinary input", "input so small that 1e-6 counts"])
def test_group_norm_by_loops(scale):
    block = draw_parameters(ResidualBlock(6, 6, 4, dropout=0.0, groups=3)).double()
    x = scale * torch.randn(2, 6, 3, 4, dtype=torch.float64)
    for image, normalised in zip(x, block.norm_1(x).detach()):
        np.testing.assert_allclose(normalised, group_norm(block.norm_1, image.numpy()), rtol=0, atol=1e-12)


# The clock


def waves(part: TimeEmbedding, call) -> Tensor:
    """What the first linear layer of a time embedding receives while ``call`` runs."""
    caught = []
    hook = part.linear_1.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    call()
    hook.remove()
    return caught[0].double()


@pytest.mark.equation("eq-unet-time-embedding")
def test_time_embedding_entry_by_entry():
    network = tiny_unet(base_channels=12, groups=2)
    t, h = [1, 2, 50, 1000], 6
    denoiser = Denoiser(network, Schedule.linear())
    got = waves(network.time, lambda: denoiser(torch.zeros(4, 1, 4, 4), torch.tensor(t)))
    for row, step in zip(got, t):
        for k in range(h):
            angle = (step - 1) * 10_000 ** (-k / (h - 1))
            # Frequencies are stored in float32, whose rounding moves an angle near 1000 by up to 6e-5.
            assert row[k].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert row[h + k].item() == pytest.approx(math.cos(angle), abs=1e-4)


@pytest.mark.equation("eq-unet-rotation")
@pytest.mark.parametrize("delta", [1, 7, 300])
def test_moving_on_is_a_rotation(delta):
    part, t = TimeEmbedding(8, 8), torch.tensor([1, 10, 123, 700])
    before, after = (waves(part, lambda s=s: part(s - 1)) for s in (t, t + delta))
    for k in range(4):
        turn = np.exp(-1j * delta * 10_000 ** (-k / 3))  # (sin, cos) as one complex number cos - i sin, turned
        start = before[:, 4 + k].numpy() - 1j * before[:, k].numpy()
        end = start * turn
        np.testing.assert_allclose(after[:, k], -end.imag, atol=2e-4)
        np.testing.assert_allclose(after[:, 4 + k], end.real, atol=2e-4)


@pytest.mark.equation("eq-unet-embedding")
@pytest.mark.parametrize("label", [2, None])
def test_every_block_is_told_step_and_label(label):
    network = draw_parameters(tiny_unet(classes=3)).double()
    told = []
    for part in network.modules():
        if isinstance(part, ResidualBlock):
            part.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    steps = torch.tensor([17])
    network(torch.zeros(1, 1, 4, 4).double(), steps, None if label is None else torch.tensor([label]))
    angle = 17 * np.array([1.0, 1e-4])
    hidden = values(network.time.linear_1.weight) @ np.concatenate([np.sin(angle), np.cos(angle)])
    hidden = silu(hidden + values(network.time.linear_1.bias))
    expected = values(network.time.linear_2.weight) @ hidden + values(network.time.linear_2.bias)
    expected = expected + values(network.label.weight)[3 if label is None else label]
    assert len(told) == 8
    for e in told:
        np.testing.assert_allclose(e[0].detach(), expected, rtol=0, atol=1e-6)


# Attention


@pytest.mark.equation("eq-unet-attention")
def test_attention_position_by_position():
    q, k, v = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = np.zeros((7, 5))
    for i in range(7):
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(5)) for j in range(7)]
        for j in range(7):
            expected[i] += weights[j] / sum(weights) * v[j].numpy()
    np.testing.assert_allclose(attend(q[None], k[None], v[None])[0], expected, rtol=0, atol=1e-13)


@pytest.mark.equation("eq-unet-dot-variance")
@pytest.mark.parametrize("law", ["normal", "coin"])
def test_variance_of_a_dot_product_is_the_number_of_channels(law):
    generator, d, n = np.random.default_rng(0), 24, 200_000
    draw = {"normal": generator.standard_normal, "coin": lambda shape: generator.choice([-1.0, 1.0], shape)}[law]
    assert np.var((draw((n, d)) * draw((n, d))).sum(1)) == pytest.approx(d, rel=0.02)


@pytest.mark.equation("eq-unet-permutation")
def test_attention_of_shuffled_positions_is_shuffled():
    q, k, v = torch.randn(3, 2, 9, 4, dtype=torch.float64)
    order = torch.randperm(9)
    assert order.tolist() != list(range(9))
    shuffled = attend(q[:, order], k[:, order], v[:, order])
    torch.testing.assert_close(shuffled, attend(q, k, v)[:, order], rtol=0, atol=1e-13)


@pytest.mark.equation("eq-unet-attention-cost")
@pytest.mark.parametrize(("d", "height", "width"), [(4, 3, 5), (8, 4, 4), (2, 8, 8)])
def test_cost_of_attention(d, height, width):
    N = height * width
    assert multiplications(Attention(d, 2), torch.zeros(1, d, height, width)) == 4 * N * d**2 + 2 * N**2 * d


# Counts


@pytest.mark.equation("eq-unet-block-parameters")
@pytest.mark.parametrize(("c", "out", "m"), [(4, 4, 7), (4, 6, 5), (12, 6, 16)])
def test_parameters_of_a_residual_block(c, out, m):
    norm_1, conv_1, told = 2 * c, 9 * c * out + out, (m + 1) * out
    norm_2, conv_2, shortcut = 2 * out, 9 * out**2 + out, (c + 1) * out if c != out else 0
    assert count(ResidualBlock(c, out, m, dropout=0.1, groups=2)) == norm_1 + conv_1 + told + norm_2 + conv_2 + shortcut


@pytest.mark.equation("eq-unet-attention-parameters")
@pytest.mark.parametrize("c", [2, 8, 30])
def test_parameters_of_attention(c):
    assert count(Attention(c, 2)) == 2 * c + 4 * (c**2 + c)


@pytest.mark.equation("eq-unet-block-macs")
@pytest.mark.parametrize(("c", "out", "m", "side"), [(4, 4, 7, 3), (4, 6, 5, 8), (12, 6, 16, 2)])
def test_multiplications_of_a_residual_block(c, out, m, side):
    expected = side**2 * (9 * c * out + 9 * out**2 + (c * out if c != out else 0)) + m * out
    block = ResidualBlock(c, out, m, dropout=0.0, groups=2)
    assert multiplications(block, torch.zeros(1, c, side, side), torch.zeros(1, m)) == expected
