"""Four families of generative models: each objective against an independent computation, and the common interface."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from ddpm_lib import GaussianMixture, digits, sliced_wasserstein
from ddpm_lib.families import DDPM, GAN, VAE, Flow, dequantise, quantise

FAMILIES = {
    "GAN": lambda: GAN(2, latent=3, width=16),
    "VAE": lambda: VAE(2, latent=1, width=16),
    "Flow": lambda: Flow(2, layers=4, width=16),
    "DDPM": lambda: DDPM(2, T=30, width=32),
}
WORLD = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2])


def build(name: str):
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for parameter in model.parameters():  # no layer hides behind weights that start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def points(n: int = 200) -> torch.Tensor:
    return WORLD.sample(n, torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("name", FAMILIES)
def test_training_depends_on_its_seed_alone_and_disturbs_no_other_randomness(name):
    outcomes = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        model = build(name)
        torch.manual_seed(disturbance)
        losses = []
        for loss in model.fit(points(), 5, batch_size=16, seed=seed):
            losses.append(loss)
            torch.rand(disturbance)
        follows = torch.rand(1)
        torch.manual_seed(disturbance)
        for _ in range(5):
            torch.rand(disturbance)
        assert torch.equal(torch.rand(1), follows)
        outcomes.append((losses, model.sample(3, torch.Generator().manual_seed(3))))
    assert outcomes[0][0] == outcomes[1][0] != outcomes[2][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_brings_samples_closer(name):
    torch.manual_seed(0)
    model = FAMILIES[name]()
    before = model.sample(500, torch.Generator().manual_seed(1))
    assert before.shape == (500, 2)
    for _ in model.fit(points(2000), 300, batch_size=64):
        pass
    after = model.sample(500, torch.Generator().manual_seed(1))
    distances = [sliced_wasserstein(x, points(500)) for x in (before, after)]
    assert distances[1] < min(0.3, 0.5 * distances[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_its_likelihood_is_so(name):
    model = build(name)
    if model.likelihood == "none":
        with pytest.raises(ValueError, match="GAN has no likelihood"):
            model.log_likelihood(points())
    else:
        values = [model.log_likelihood(points(), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        assert values[0].shape == (200,)
        assert torch.equal(*values) == (model.likelihood == "exact")


@pytest.mark.parametrize("data", [torch.zeros(5, 3), torch.zeros(5)])
def test_points_of_another_shape_are_refused(data):
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        next(build("DDPM").fit(data, 1))


def test_a_flow_of_one_entry_is_refused():
    with pytest.raises(ValueError, match="got size = 1"):
        Flow(1)


def joint(model: VAE, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """log p(x, z) for one point x (size,) and many z (K, latent), by torch's own Gaussians."""
    decoded = Independent(Normal(model.decoder(z), model.log_sigma.exp()), 1)
    return decoded.log_prob(x) + Independent(Normal(torch.zeros_like(z), 1), 1).log_prob(z)


def test_the_bound_of_a_vae_is_below_its_likelihood_by_the_encoders_error():
    """The likelihood from a sum over a fine grid of z and from importance sampling, the gap from the grid, too."""
    with torch.no_grad():
        model = build("VAE").double()
        for x in points(5).double():
            mean, log_sigma = model.encode(x[None])
            encoder = Independent(Normal(mean[0], log_sigma[0].exp()), 1)
            noise = torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            bound = model.bound(x.expand(len(noise), 2), noise)
            z = mean + log_sigma.exp() * noise
            weights = joint(model, x, z) - encoder.log_prob(z)
            importance = weights.logsumexp(0) - math.log(len(noise))
            grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
            truth = (joint(model, x, grid) + math.log(1e-3)).logsumexp(0)
            assert float(importance) == pytest.approx(float(truth), abs=0.02)
            posterior = joint(model, x, grid) - truth
            gap = (encoder.log_prob(grid).exp() * (encoder.log_prob(grid) - posterior) * 1e-3).sum()
            error = float(bound.std()) / len(noise) ** 0.5
            assert float(bound.mean()) == pytest.approx(float(truth - gap), abs=5 * error + 1e-4)
            assert gap > 1e-3


def test_a_vae_draws_from_its_own_density():
    model = build("VAE")
    x = model.sample(20_000, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        grid = torch.linspace(-6, 6, 2001)[:, None]
        prior = torch.exp(-grid[:, 0].square() / 2) / (2 * math.pi) ** 0.5 * 12 / 2000
        decoded = model.decoder(grid).double()
        mean = (prior[:, None] * decoded).sum(0)
        variance = (prior[:, None] * (decoded - mean).square()).sum(0) + (2 * model.log_sigma).exp()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.var(0), variance, rtol=0.05, atol=0)


def test_a_flow_is_undone_and_its_density_is_that_of_its_jacobian():
    model = build("Flow")
    x = points()
    z, log_determinant = model.encode(x)
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-5)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda p: model.encode(p[None])[0][0], x[i])
        assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(
            float(log_determinant[i].detach()), abs=1e-4
        )


def test_the_density_of_a_flow_integrates_to_one():
    model = build("Flow").double()
    axis = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = sum(float(model.density(part).exp().sum()) for part in grid.split(100_000))
    assert total * (80 / 1600) ** 2 == pytest.approx(1, abs=1e-3)


def test_the_best_discriminator_tells_the_ratio_of_densities():
    """D = p / (p + q), and the value of the game is 2 JSD(p, q) - log 4."""
    torch.manual_seed(0)
    model = GAN(1, width=32)
    p, q = Normal(torch.tensor(0.0), 1.0), Normal(torch.tensor(1.0), 0.7)
    optimiser = torch.optim.Adam(model.discriminator.parameters(), lr=2e-3)
    for _ in range(600):
        loss = model.discriminator_loss(p.sample((512, 1)), q.sample((512, 1)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    grid = torch.linspace(-1.5, 2.5, 41)[:, None]
    with torch.no_grad():
        found = model.discriminator(grid).sigmoid()
        best = p.log_prob(grid).exp() / (p.log_prob(grid).exp() + q.log_prob(grid).exp())
        assert (found - best).abs().max() < 0.08
        axis = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
        a, b = p.log_prob(axis).exp(), q.log_prob(axis).exp()
        divergence = 0.5 * ((a * (2 * a / (a + b)).log() + b * (2 * b / (a + b)).log()) * 1e-3).sum()
        x, generated = p.sample((100_000, 1)), q.sample((100_000, 1))
        value = -float(model.discriminator_loss(x, generated))
    assert value == pytest.approx(float(2 * divergence) - math.log(4), abs=0.02)


def test_a_ddpm_learns_the_best_guess_of_an_analytic_world():
    torch.manual_seed(0)
    model = DDPM(2, T=30, width=64)
    for _ in model.fit(WORLD.sample(20_000).float(), 1500):
        pass
    best = WORLD.denoiser(model.denoiser.schedule)
    for t in (5, 15, 25):
        x0 = points(500)
        x_t = model.denoiser.schedule.q_sample(x0, t, torch.randn(x0.shape))
        with torch.no_grad():
            error = (model.denoiser(x_t, t).eps - best(x_t, t).eps).square().mean()
        assert error < 0.02


def test_images_come_back_from_their_points_and_fill_their_intervals_evenly():
    images = digits("test")[0]
    points = dequantise(images, torch.Generator().manual_seed(0))
    assert points.shape == (len(images), 64)
    assert (points.min() >= -1, points.max() < 1) == (True, True)
    assert torch.equal(quantise(points), images)
    assert torch.equal(quantise(torch.full((1, 64), 3.0)), torch.ones(1, 1, 8, 8))
    black = points[images.flatten(1) == -1]
    assert float(black.max()) == pytest.approx(-1 + 2 / 17, abs=1e-3)
    assert float(black.mean()) == pytest.approx(-1 + 1 / 17, abs=1e-3)


def test_a_density_of_points_bounds_the_probability_of_an_image():
    """With a density that is constant on each interval the bound is an equality: here, levels with known shares."""
    share = torch.arange(1, 18, dtype=torch.float64) / 153
    levels = torch.arange(17).view(17, 1, 1, 1)
    points = dequantise(levels / 8 - 1, torch.Generator().manual_seed(0))
    density = share[((points + 1) * 17 / 2).long()] / (2 / 17)
    torch.testing.assert_close(density.log().sum(1) + math.log(2 / 17), share.log())
