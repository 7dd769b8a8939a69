"""The equations of the chapter on text to image, each against a computation that shares no code with the formula."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

from ddpm_lib import Denoiser, GaussianMixture, Guided, Schedule, UNet, capped_loss
from ddpm_lib.checkpoint import read_tensors, shipped
from ddpm_lib.scenes import Item, Scene, draw_scene
from ddpm_lib.text import HEADS, TextEncoder, TextUNet
from ddpm_lib.unet import CrossAttention, attend
from scripts.scenes_results import RESULTS, SETTINGS, guided, rows

WORDS = ("a", "red", "blue", "circle", "square", "above", "below")


def encoder(layers: int, seed: int = 0) -> TextEncoder:
    """With weights large enough that nothing is small by its start."""
    torch.manual_seed(seed)
    reader = TextEncoder(WORDS, 8, width=8, layers=layers).double().eval().requires_grad_(False)
    for parameter in reader.parameters():
        nn.init.normal_(parameter, std=0.7)
    return reader


def placeless(layers: int) -> TextEncoder:
    reader = encoder(layers)
    reader.places.copy_(reader.places[:1].expand_as(reader.places))
    return reader


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax_rows(logits: np.ndarray) -> np.ndarray:
    return special.softmax(logits, axis=1)


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    scaled = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + norm.eps)
    return scaled * norm.weight.numpy() + norm.bias.numpy()


# The encoder


@pytest.mark.equation("eq-text-embedding")
def test_a_word_enters_as_its_own_vector_plus_that_of_its_place():
    reader = encoder(0)
    tokens = reader.tokenise(["a red circle above a square", "blue blue blue"])
    found = reader(tokens).numpy()
    for row, of_caption in zip(tokens.tolist(), found):
        entered = np.array([reader.words.weight[w].numpy() + reader.places[i].numpy() for i, w in enumerate(row)])
        np.testing.assert_allclose(of_caption, layer_norm(entered, reader.norm), atol=1e-12)


@pytest.mark.equation("eq-text-attention")
def test_attention_is_a_mean_of_values_weighted_by_exponentials_of_products():
    q, k, v = normal(1, 5, 6, seed=1), normal(1, 4, 6, seed=2), normal(1, 4, 3, seed=3)
    found = attend(q, k, v)[0]
    for i in range(5):
        weights = [math.exp(float(q[0, i] @ k[0, j]) / math.sqrt(6)) for j in range(4)]
        expected = sum(w * v[0, j] for j, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(found[i], expected)


@pytest.mark.equation("eq-text-layer")
def test_a_layer_of_the_encoder_is_attention_and_a_network_per_row_each_added_to_its_input():
    reader = encoder(1)
    layer, H = reader.layers[0], normal(1, 8, 8)
    h = layer_norm(H[0].numpy(), layer.norm1)
    QKV = h @ layer.self_attn.in_proj_weight.numpy().T + layer.self_attn.in_proj_bias.numpy()
    Q, K, V = np.split(QKV, 3, axis=1)
    heads = []
    for q, k, v in zip(*(np.split(part, HEADS, axis=1) for part in (Q, K, V))):
        heads.append(softmax_rows(q @ k.T / math.sqrt(8 / HEADS)) @ v)
    out = layer.self_attn.out_proj
    after = H[0].numpy() + np.concatenate(heads, axis=1) @ out.weight.numpy().T + out.bias.numpy()
    inner = layer_norm(after, layer.norm2) @ layer.linear1.weight.numpy().T + layer.linear1.bias.numpy()
    inner = inner * stats.norm.cdf(inner)  # GELU
    after = after + inner @ layer.linear2.weight.numpy().T + layer.linear2.bias.numpy()
    np.testing.assert_allclose(layer(H)[0].numpy(), after, atol=1e-10)


# Order


@pytest.mark.equation("eq-text-equivariant")
def test_without_places_permuted_words_give_permuted_features():
    tokens = torch.tensor([[1, 2, 4, 6, 1, 3, 5, 0]])
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    for layers in (0, 1, 3):
        reader = placeless(layers)
        torch.testing.assert_close(reader(tokens[:, order]), reader(tokens)[:, order], rtol=0, atol=1e-10)
    reader = encoder(2)
    assert (reader(tokens[:, order]) - reader(tokens)[:, order]).abs().max() > 0.1


@pytest.mark.equation("eq-text-invariant")
def test_without_places_a_unet_cannot_tell_which_of_two_objects_is_above():
    captions = ["a red circle above a blue square", "a blue square above a red circle"]

    def drawn(reader: TextEncoder) -> Tensor:
        torch.manual_seed(1)
        network = TextUNet(reader, UNet(8, 3, 8, (1, 2), 1, (4,), dropout=0.0, groups=4, text_channels=8)).double()
        for parameter in network.unet.parameters():
            nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            return network(normal(1, 3, 8, 8).repeat(2, 1, 1, 1), torch.tensor([5, 5]), reader.tokenise(captions))

    blind, seeing = drawn(placeless(2)), drawn(encoder(2))
    torch.testing.assert_close(blind[0], blind[1], rtol=0, atol=1e-10)
    assert (seeing[0] - seeing[1]).abs().max() > 1e-3


def scores(reader: TextEncoder, tokens: Tensor) -> Tensor:
    """A linear readout of the mean feature."""
    return reader(tokens).mean(1) @ normal(8, seed=4)


@pytest.mark.equation("eq-text-additive")
def test_without_layers_two_words_contribute_each_by_itself():
    """A sum over places has no interaction: the mixed difference of two changed words is 0."""
    plain, first, second = torch.tensor([[1, 2, 4, 6, 1, 3, 5, 0]]).repeat(3, 1)
    first[1], second[5] = 3, 2
    both = torch.where(first == plain, second, first)
    four = torch.stack([plain, first, second, both])
    for layers, is_sum in ((0, True), (1, False)):
        s = scores(encoder(layers), four)
        assert (abs(float(s[3] - s[1] - s[2] + s[0])) < 1e-12) is is_sum


@pytest.mark.equation("eq-text-four")
def test_a_sum_over_places_gets_at_most_three_of_the_four_captions():
    A, B = "a red circle", "a blue square"
    captions = [f"{A} above {B}", f"{B} below {A}", f"{B} above {A}", f"{A} below {B}"]
    a_is_upper = np.array([True, True, False, False])
    tokens = encoder(0).tokenise(captions)
    for layers, equal in ((0, True), (2, False)):
        s = scores(encoder(layers), tokens)
        assert (abs(float(s[0] + s[1] - s[2] - s[3])) < 1e-12) is equal

    rng, right = np.random.default_rng(0), set()
    for _ in range(2000):  # any table of contributions at all
        table, constant = rng.standard_normal((8, len(WORDS) + 1)), rng.standard_normal()
        s = np.array([constant + sum(table[i, w] for i, w in enumerate(row)) for row in tokens.tolist()])
        right.add(int(((s > 0) == a_is_upper).sum()))
    assert right == {1, 2, 3}


# Cross-attention


def by_pixel(layer: CrossAttention, x: Tensor, words: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Output and weights (heads, pixels, words) for one image, pixel by pixel and head by head."""
    X = layer.norm(x)[0].flatten(1).T.numpy()
    query, key, value = (part.weight.squeeze().numpy() for part in (layer.query, layer.key, layer.value))
    Q = X @ query.T + layer.query.bias.numpy()
    K, V = words[0].numpy() @ key.T + layer.key.bias.numpy(), words[0].numpy() @ value.T + layer.value.bias.numpy()
    number = layer.heads.number
    size = Q.shape[1] // number
    A, taken = np.zeros((number, len(X), len(K))), np.zeros_like(Q)
    shares = [slice(head * size, (head + 1) * size) for head in range(number)]
    if layer.heads.norm_query is not None:
        for rows, norm in ((Q, layer.heads.norm_query), (K, layer.heads.norm_key)):
            for mine in shares:  # to length sqrt(size), then scaled
                length = np.sqrt((rows[:, mine] ** 2).sum(1, keepdims=True) / size + 1e-6)
                rows[:, mine] *= norm.weight.numpy() / length
    for head, pixel in itertools.product(range(number), range(len(X))):
        mine = shares[head]
        e = np.array([math.exp(Q[pixel, mine] @ k[mine] / math.sqrt(size)) for k in K])
        A[head, pixel] = e / e.sum()
        taken[pixel, mine] = A[head, pixel] @ V[:, mine]
    out = taken @ layer.out.weight.squeeze().numpy().T + layer.out.bias.numpy()
    return x[0].numpy() + out.T.reshape(x.shape[1:]), A


@pytest.fixture(scope="module", params=[None, 2], ids=["four heads", "two heads with norms"])
def listening(request) -> tuple[CrossAttention, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = CrossAttention(8, 6, groups=4, heads=request.param).double().requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, normal(1, 8, 4, 3), normal(1, 5, 6, seed=1)


@pytest.mark.equation("eq-text-cross")
def test_pixels_take_from_the_words_what_their_weights_say(listening):
    layer, x, words = listening
    np.testing.assert_allclose(layer(x, words)[0].numpy(), by_pixel(*listening)[0], atol=1e-12)


@pytest.mark.equation("eq-text-map")
def test_a_map_is_the_mean_weight_over_heads_and_adds_up_to_1_over_words(listening):
    layer, x, words = listening
    maps = layer.weights(x, words)
    expected = by_pixel(*listening)[1].mean(0).reshape(4, 3, 5)
    np.testing.assert_allclose(maps[0].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(maps.sum(3).numpy(), 1, atol=1e-12)


# Shares and counts


@pytest.mark.equation("eq-text-wilson")
def test_the_interval_is_that_of_scipy_and_holds_the_share_in_95_of_100_cases():
    def interval(k: int, n: int) -> tuple[float, float]:
        p, z = k / n, 1.96
        middle, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return (middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n)

    for k, n in ((0, 40), (17, 40), (40, 40), (463, 500)):
        expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert interval(k, n) == pytest.approx(tuple(expected), abs=3e-5)
    for share in (0.5, 0.8, 0.95):
        chance = stats.binom.pmf(range(41), 40, share)
        held = sum(c for k, c in enumerate(chance) if interval(k, 40)[0] <= share <= interval(k, 40)[1])
        assert 0.92 < held < 0.98


@pytest.mark.equation("eq-text-product")
def test_independent_attributes_multiply_and_mistakes_in_clumps_do_not():
    rng, shares = np.random.default_rng(0), np.array([0.97, 0.9, 0.95, 0.8])
    apart = (rng.random((100_000, 4)) < shares).all(1).mean()
    together = (rng.random((100_000, 1)) < shares).all(1).mean()
    assert apart == pytest.approx(np.prod(shares), abs=0.006)
    assert together == pytest.approx(0.8, abs=0.006)


@pytest.mark.equation("eq-text-chi-square")
def test_the_statistic_is_that_of_scipy_with_the_mean_and_the_limits_of_the_text():
    def chi_square(counts: np.ndarray, p: np.ndarray) -> np.ndarray:
        n = counts.sum(-1, keepdims=True)
        return ((counts - n * p) ** 2 / (n * p)).sum(-1)

    p = np.array([0.1, 0.2, 0.3, 0.4])
    counts = np.random.default_rng(0).multinomial(64, p, size=20_000)
    found = chi_square(counts, p)
    assert found[:20] == pytest.approx([stats.chisquare(row, 64 * p).statistic for row in counts[:20]])
    assert found.mean() == pytest.approx(4 - 1, abs=0.06)
    for K, limit in ((2, 3.84), (4, 7.81)):
        even = np.full(K, 1 / K)
        beyond = chi_square(np.random.default_rng(1).multinomial(64, even, size=20_000), even) > limit
        assert beyond.mean() == pytest.approx(0.05, abs=0.012)


class OfClass(nn.Module):
    """The exact noise of one of several Gaussians."""

    def __init__(self, schedule: Schedule, worlds: list[GaussianMixture]):
        super().__init__()
        self.schedule, self.worlds = schedule, worlds

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        return self.worlds[int(condition[0])].denoiser(self.schedule)(x, int(steps[0]) + 1).eps


@pytest.mark.equation("eq-text-negative")
def test_a_negative_condition_divides_by_its_law():
    schedule, t, w = Schedule.linear(100), 40, 1.5
    means, deviations = torch.tensor([[-0.5, 0.2], [0.7, -0.1]], dtype=torch.float64), (0.3, 0.2)
    worlds = [GaussianMixture([1.0], means[i : i + 1], [deviations[i] ** 2]) for i in (0, 1)]
    guided = Guided(Denoiser(OfClass(schedule, worlds), schedule), w, negative=torch.tensor([0]))
    x = normal(6, 2).requires_grad_()
    signal, noise = float(schedule.signal[t]), float(schedule.noise[t])

    def log_normal(i: int) -> Tensor:
        return -(x - signal * means[i]).square().sum(1) / (2 * (signal**2 * deviations[i] ** 2 + noise**2))

    gradient = torch.autograd.grad(((1 + w) * log_normal(1) - w * log_normal(0)).sum(), x)[0]
    found = guided(x.detach(), t, torch.ones(6, dtype=torch.long)).eps
    torch.testing.assert_close(found, -noise * gradient, rtol=0, atol=1e-9)


@pytest.mark.equation("eq-text-early")
@pytest.mark.parametrize("snr_scale", [1.0, 0.25])
def test_the_weight_changes_where_the_noise_is_as_strong_as_the_signal(snr_scale):
    schedule = Schedule.cosine(snr_scale=snr_scale)

    class Told(nn.Module):
        nothing = torch.tensor(0)

        def forward(self, x: Tensor, steps: Tensor, condition: Tensor | None = None) -> Tensor:
            return torch.full_like(x, 0.0 if condition is None else 1.0)

    denoiser, x = guided(Denoiser(Told(), schedule), early=4.0, late=1.0), normal(1, 1, 2, 2)
    eps = [float(denoiser(x, t, torch.tensor([1])).eps.mean()) for t in range(1, 1001)]
    # The cosine of Nichol and Dhariwal, its ratio of signal to noise scaled: snr_scale / tan(angle)^2 = 1.
    angle = math.atan(math.sqrt(snr_scale))
    change = 1000 * ((1 + 0.008) * angle / (math.pi / 2) - 0.008)
    assert eps == [5.0 if t > change else 2.0 for t in range(1, 1001)]


# The stored table


def test_the_stored_results_are_those_of_the_shipped_model():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["model"] == read_tensors(shipped("scenes"))[0]["sha256"], "run python -m scripts.scenes_results"
    asked = [{name: row[name] for name in rows()[0]} for row in results["sampled"]]
    assert (results["settings"], asked) == (SETTINGS, rows()), "the script was stopped"
    assert all(row["all"] == 1 for row in results["real"]), "the reader refuses real scenes"
    for row in results["sampled"]:
        assert 0 <= row["all"] <= min(row["count"], row["clean"]) <= 1


@pytest.mark.equation("eq-text-weight")
@pytest.mark.parametrize("t", [1, 10, 40, 400, 999])
def test_the_weighted_error_of_x0_lies_half_way_to_that_of_the_noise_until_the_cap(t):
    schedule = Schedule.cosine(snr_scale=1 / 32)
    variance = 1 - float(schedule.alpha_bar[t])
    x0, eps, guess = np.random.default_rng(t).standard_normal((3, 50))
    x_t = math.sqrt(1 - variance) * x0 + math.sqrt(variance) * eps
    its_noise = (x_t - math.sqrt(1 - variance) * guess) / math.sqrt(variance)
    half_way = np.linalg.norm(guess - x0) * np.linalg.norm(its_noise - eps)
    weight = math.sqrt((1 - variance) / variance)
    assert weight * np.square(guess - x0).sum() == pytest.approx(half_way, rel=1e-9)

    class Fixed(nn.Module):
        def forward(self, x, steps):
            return torch.from_numpy(guess)[None]

    batch = (torch.from_numpy(x0)[None], torch.tensor([t]), torch.from_numpy(eps)[None])
    found = 50 * float(capped_loss(Denoiser(Fixed(), schedule, "x0"), *batch, cap=5))
    assert found == pytest.approx(min(1, 5 / weight) * half_way, rel=1e-6)
    assert (weight > 5) == (t <= 10)


@pytest.mark.equation("eq-text-blind")
@pytest.mark.parametrize("t", [300, 500, 700])
def test_two_scenes_are_mistaken_for_each_other_as_often_as_said(t):
    """Noise is added to the first; the guess is whichever, scaled, lies nearer."""
    schedule = Schedule.cosine(snr_scale=1 / 32)
    first, second = (draw_scene(Scene("grey", (Item("ring", c, "small", 16.0, 16.0),))) for c in ("pink", "white"))
    noise = torch.randn(4000, 3, 32, 32, generator=torch.Generator().manual_seed(t))
    a, x = math.sqrt(schedule.alpha_bar[t]), schedule.q_sample(first.expand(4000, -1, -1, -1), t, noise)
    wrong = (x - a * second).flatten(1).norm(dim=1) < (x - a * first).flatten(1).norm(dim=1)
    distance = math.sqrt(schedule.snr[t]) * float((first - second).norm())
    expected = stats.norm.cdf(-distance / 2)
    assert float(wrong.double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))
