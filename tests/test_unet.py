"""The U-Net: the paper's parameter counts, its parts against plain arithmetic, and its behaviour at the edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import draw_parameters, tiny_unet
from torch import nn

from ddpm_lib import UNet
from ddpm_lib.unet import Attention, Downsample, Heads, ResidualBlock, TimeEmbedding, Upsample, attend, coordinates


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_cifar10_model_of_the_paper_has_35_746_307_parameters():
    assert count(UNet()) == 35_746_307


def test_the_256_model_of_the_paper_has_113_673_219_parameters():
    assert count(UNet(image_size=256, channel_multipliers=(1, 1, 2, 2, 4, 4))) == 113_673_219


def test_classes_cost_one_embedding_each_and_one_for_none():
    assert count(tiny_unet(classes=10)) - count(tiny_unet()) == 11 * 16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 8, "channel_multipliers": (1, 3, 1), "attention_resolutions": (8, 2), "blocks_per_level": 2},
        {"image_size": 5, "channel_multipliers": (2,), "attention_resolutions": ()},
        {"in_channels": 3, "base_channels": 6, "groups": 3, "classes": 4, "dropout": 0.5},
        {"image_size": 12, "patch_size": 3, "in_channels": 2},
        {"image_size": 8, "patch_size": 2, "coordinates": True},
        {"heads": 2},
    ],
    ids=["tiny", "three levels", "one level", "classes", "patches", "coordinates", "heads"],
)
def test_output_has_the_shape_of_the_input(options):
    network = draw_parameters(tiny_unet(**options))
    size, channels = network.config["image_size"], network.config["in_channels"]
    x = torch.randn(2, channels, size, size)
    assert network(x, torch.tensor([0, 7])).shape == x.shape
    tall = torch.randn(1, channels, 2 * size, size)
    assert network(tall, torch.tensor([3])).shape == tall.shape


def test_a_network_on_patches_is_the_same_network_on_their_pixels_as_channels():
    """Channel (c, i, j) of the small image is pixel (i, j) of each patch of channel c, here by slices."""
    network = draw_parameters(tiny_unet(image_size=8, in_channels=3, patch_size=2))
    inner = tiny_unet(image_size=4, in_channels=12)
    inner.load_state_dict(network.state_dict())
    x, steps = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    places = [(c, i, j) for c in range(3) for i in range(2) for j in range(2)]
    answer = inner(torch.stack([x[:, c, i::2, j::2] for c, i, j in places], dim=1), steps)
    output = network(x, steps)
    for k, (c, i, j) in enumerate(places):
        torch.testing.assert_close(output[:, c, i::2, j::2], answer[:, k], rtol=0, atol=1e-6)


def test_coordinates_are_those_of_the_middles_of_the_places():
    across, down = [-0.75, -0.25, 0.25, 0.75], [-0.5, 0.5]
    told = coordinates(torch.zeros(3, 5, 2, 4))
    torch.testing.assert_close(told, torch.tensor([[[across, across], [[y] * 4 for y in down]]]), rtol=0, atol=0)


def test_a_network_with_coordinates_is_one_whose_first_convolution_sees_two_channels_more():
    network = draw_parameters(tiny_unet(image_size=8, patch_size=2, coordinates=True))
    inner = tiny_unet(image_size=4, in_channels=6)
    inner.load_state_dict(network.state_dict() | dict(zip(("head.weight", "head.bias"), inner.head.parameters())))
    with torch.no_grad():
        for own, given in zip(inner.head.parameters(), network.head.parameters()):
            own[:4] = given
    x, steps = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    middles = torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(2, 1, 4, 4)
    answer = inner(torch.cat([F.pixel_unshuffle(x, 2), middles, middles.mT], dim=1), steps)
    torch.testing.assert_close(network(x, steps), F.pixel_shuffle(answer[:, :4], 2), rtol=0, atol=1e-6)


def test_a_network_is_built_again_from_its_configuration():
    network = tiny_unet(classes=3, dropout=0.2)
    again = UNet(**network.config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


def test_images_of_a_batch_do_not_see_each_other():
    network = draw_parameters(tiny_unet(classes=3)).double().eval()
    x, steps, label = torch.randn(3, 1, 4, 4).double(), torch.tensor([0, 5, 29]), torch.tensor([0, 3, 1])
    together = network(x, steps, label)
    for i in range(3):
        alone = network(x[i : i + 1], steps[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_step_and_label_change_the_output():
    network = draw_parameters(tiny_unet(classes=3)).eval()
    x = torch.randn(1, 1, 4, 4)
    outputs = [network(x, torch.tensor([s]), torch.tensor([c])) for s, c in [(0, 0), (1, 0), (0, 1), (0, 3)]]
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-3 for b in outputs[:i])


def test_no_label_is_the_extra_class():
    network = draw_parameters(tiny_unet(classes=3)).eval()
    x, steps = torch.randn(2, 1, 4, 4), torch.tensor([3, 4])
    assert torch.equal(network(x, steps), network(x, steps, torch.tensor([3, 3])))


def test_dropout_acts_in_training_only():
    network = draw_parameters(tiny_unet(dropout=0.5))
    x, steps = torch.randn(1, 1, 4, 4), torch.tensor([3])
    assert not torch.equal(network(x, steps), network(x, steps))
    network.eval()
    assert torch.equal(network(x, steps), network(x, steps))


def test_a_fresh_network_answers_almost_zero():
    """The paper's code starts the last convolution, and the end of every block, at weights of almost zero."""
    output = UNet(image_size=16, base_channels=32)(torch.randn(2, 3, 16, 16), torch.tensor([0, 999]))
    assert output.abs().max() < 1e-3


def test_a_fresh_block_passes_its_input_on():
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    torch.testing.assert_close(ResidualBlock(8, 8, 16, 0.0, 4)(x, embedding), x, rtol=0, atol=1e-3)
    torch.testing.assert_close(Attention(8, 4)(x), x, rtol=0, atol=1e-3)


def test_fresh_weights_are_uniform_with_the_variance_of_glorot():
    network = UNet(image_size=8, base_channels=64, channel_multipliers=(1, 2), groups=32, attention_resolutions=())
    weight = network.stem.weight.detach()
    assert weight.abs().max() <= math.sqrt(6 / (9 * 3 + 9 * 64))
    assert float(weight.var()) == pytest.approx(2 / (9 * 3 + 9 * 64), rel=0.15)
    assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


# Parts, each in plain numpy


def test_time_embedding_is_sines_then_cosines():
    """Frequencies from 1 to 1/10,000 in geometric steps over half - 1, as in the paper's code."""
    part = TimeEmbedding(8, 8).double()
    with torch.no_grad():
        part.linear_1.weight.copy_(torch.eye(8))
        part.linear_2.weight.copy_(torch.eye(8))
    steps = torch.tensor([0, 1, 7, 999])
    frequency = 10_000.0 ** -(np.arange(4) / 3)
    angle = steps.numpy()[:, None] * frequency
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    expected = waves / (1 + np.exp(-waves))
    # The frequencies are stored in float32: at step 999 their rounding moves an angle by up to 6e-5.
    np.testing.assert_allclose(part(steps).detach(), expected, rtol=0, atol=1e-4)


def group_norm(x: np.ndarray, groups: int) -> np.ndarray:
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-6)).reshape(x.shape)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["ordinary input", "input so small that eps counts"])
def test_attention_in_numpy(scale):
    part = draw_parameters(Attention(6, 3)).double()
    x = scale * torch.randn(2, 6, 3, 2, dtype=torch.float64)
    h = group_norm(x.numpy(), 3) * part.norm.weight.detach().numpy()[:, None, None]
    h = (h + part.norm.bias.detach().numpy()[:, None, None]).reshape(2, 6, 6)

    def project(layer, h):
        return (
            np.einsum("oc,bcn->bon", layer.weight.detach().numpy()[:, :, 0, 0], h)
            + layer.bias.detach().numpy()[:, None]
        )

    q, k, v = (project(layer, h) for layer in (part.query, part.key, part.value))
    logits = np.einsum("bcn,bcm->bnm", q, k) / math.sqrt(6)
    weights = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    expected = x.numpy() + project(part.out, np.einsum("bnm,bcm->bcn", weights, v)).reshape(x.shape)
    np.testing.assert_allclose(part(x).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_heads_share_the_channels_and_normalise_queries_and_keys(number):
    """Against PyTorch's RMS norm and fused attention, head by head."""
    heads = draw_parameters(Heads(12, number, default=5)).double()
    q, k, v = torch.randn(2, 7, 12).double(), torch.randn(2, 5, 12).double(), torch.randn(2, 5, 12).double()
    expected, weights = [], []
    for a, b, c in zip(*(values.chunk(number, dim=2) for values in (q, k, v))):
        a = F.rms_norm(a, a.shape[2:], heads.norm_query.weight, 1e-6)
        b = F.rms_norm(b, b.shape[2:], heads.norm_key.weight, 1e-6)
        expected.append(F.scaled_dot_product_attention(a, b, c))
        weights.append(F.scaled_dot_product_attention(a, b, torch.eye(5).double().expand(2, 5, 5)))
    torch.testing.assert_close(heads(q, k, v), torch.cat(expected, dim=2), rtol=0, atol=1e-12)
    torch.testing.assert_close(heads.weights(q, k), torch.stack(weights, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(heads(1e3 * q, 1e3 * k, v), heads(q, k, v), rtol=0, atol=1e-5)


def test_without_a_number_of_heads_there_are_as_many_as_usual_and_no_norm():
    heads = Heads(12, None, default=3)
    assert not list(heads.parameters())
    q, k, v = torch.randn(2, 7, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    expected = [F.scaled_dot_product_attention(*parts) for parts in zip(*(x.chunk(3, dim=2) for x in (q, k, v)))]
    torch.testing.assert_close(heads(q, k, v), torch.cat(expected, dim=2), rtol=0, atol=1e-6)


def test_all_attention_of_a_network_has_its_heads():
    network = tiny_unet(heads=2, text_channels=5)
    found = [part.number for part in network.modules() if isinstance(part, Heads) and part.norm_key is not None]
    assert len(found) == 2 * sum(isinstance(part, Attention) for part in network.modules()) > 2
    assert set(found) == {2}


def test_heads_that_cannot_share_the_channels_are_refused():
    with pytest.raises(ValueError, match="8 channels cannot be shared by 3 heads"):
        tiny_unet(heads=3)


def test_attention_equals_the_fused_kernel():
    q, k, v = (torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, theirs = attend(q, k, v), F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v), retain_graph=True) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_attention_with_large_logits_does_not_overflow_in_half_precision():
    q = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
    assert attend(q, q, torch.ones_like(q)).isfinite().all()


def test_downsampling_pads_right_and_bottom():
    part = Downsample(1, 1)
    with torch.no_grad():
        part.conv.weight.copy_(torch.tensor([[[[1.0, 2, 4], [8, 16, 32], [64, 128, 256]]]]))
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = 1, 1
    # The window of output (0, 0) starts at pixel (0, 0); that of (1, 1) at (2, 2), its last row and column are padding.
    assert part(x, None)[0, 0].tolist() == [[1, 0], [0, 16]]


def test_upsampling_repeats_pixels():
    part = Upsample(1)
    with torch.no_grad():
        part.conv.weight.zero_()[0, 0, 1, 1] = 1
    x = torch.tensor([[[[1.0, 2], [3, 4]]]])
    assert part(x, None)[0, 0].tolist() == np.kron([[1, 2], [3, 4]], np.ones((2, 2))).tolist()


def test_residual_block_adds_the_embedding_between_its_convolutions():
    part = draw_parameters(ResidualBlock(4, 6, 5, 0.0, 2)).double()
    x, embedding = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def silu(a):
        return a * torch.sigmoid(a)

    def norm(layer, a):
        return torch.from_numpy(group_norm(a.numpy(), 2)) * layer.weight[:, None, None] + layer.bias[:, None, None]

    with torch.no_grad():
        h = F.conv2d(silu(norm(part.norm_1, x)), part.conv_1.weight, part.conv_1.bias, padding=1)
        h = h + (silu(embedding) @ part.embedding.weight.T + part.embedding.bias)[:, :, None, None]
        h = F.conv2d(silu(norm(part.norm_2, h)), part.conv_2.weight, part.conv_2.bias, padding=1)
        shortcut = torch.einsum("oc,bchw->bohw", part.shortcut.weight[:, :, 0, 0], x)
        expected = h + shortcut + part.shortcut.bias[:, None, None]
        torch.testing.assert_close(part(x, embedding), expected, rtol=0, atol=1e-12)


def test_a_lean_network_goes_down_and_up_in_as_many_blocks():
    """Each block on the way up gets what its twin on the way down gave, the last first; nothing else is kept."""
    torch.manual_seed(0)
    options = {"channel_multipliers": (1, 2, 3), "blocks_per_level": 2, "attention_resolutions": (), "dropout": 0.0}
    unet = UNet(image_size=8, in_channels=3, base_channels=4, groups=2, lean=True, **options)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 70])
    e, d, u = unet.time(t), list(unet.down), list(unet.up)
    h = unet.stem(x)
    h = a = d[0](h, e)
    h = b = d[1](h, e)
    h = F.conv2d(F.pad(h, (0, 1, 0, 1)), d[2].conv.weight, d[2].conv.bias, stride=2)
    h = c = d[3](h, e)
    h = f = d[4](h, e)
    h = F.conv2d(F.pad(h, (0, 1, 0, 1)), d[5].conv.weight, d[5].conv.bias, stride=2)
    h = g = d[6](h, e)
    h = k = d[7](h, e)
    h = unet.middle[1](unet.middle[0](h, e), e)
    h = u[1](torch.cat([u[0](torch.cat([h, k], 1), e), g], 1), e)
    h = F.conv2d(h, u[2].conv.weight, u[2].conv.bias).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = u[4](torch.cat([u[3](torch.cat([h, f], 1), e), c], 1), e)
    h = F.conv2d(h, u[5].conv.weight, u[5].conv.bias).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = u[7](torch.cat([u[6](torch.cat([h, b], 1), e), a], 1), e)
    expected = unet.head(F.silu(unet.norm(h)))
    assert (len(d), len(u)) == (8, 8)
    torch.testing.assert_close(unet(x, t), expected)


def test_an_adaptive_norm_is_that_of_diffusers():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    ours = ResidualBlock(4, 6, 5, 0.0, 2, adaptive_norm=True)
    theirs = ResnetBlock2D(
        in_channels=4, out_channels=6, temb_channels=5, groups=2, eps=1e-6, time_embedding_norm="scale_shift"
    )
    names = {"norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2", "conv_2": "conv2", "shortcut": "conv_shortcut"}
    names["embedding"] = "time_emb_proj"
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x, embedding = torch.randn(3, 4, 8, 8), torch.randn(3, 5)
    torch.testing.assert_close(ours(x, embedding), theirs(x, embedding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_waves_of_the_step_stay_exact(dtype):
    """Rounded frequencies would put the angles off by radians, and give many steps one embedding."""
    embedding = TimeEmbedding(64, 8)
    exact = embedding.frequency.clone()
    assert torch.equal(embedding.to(dtype).frequency, exact)
    assert embedding.linear_1.weight.dtype == embedding(torch.arange(3)).dtype == dtype
    assert embedding.double().frequency.dtype == torch.float64
