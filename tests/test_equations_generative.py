"""The equations of the chapter on generative models, each against a computation of its own."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit
from scipy.stats import multivariate_normal, norm
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from ddpm_lib import Gaussian, GaussianMixture, Schedule, bound_terms, simple_loss
from ddpm_lib.families import DDPM, GAN, VAE, Coupling, Flow

TWO = GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.5]], [0.3, 0.1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_anew(model: nn.Module, std: float = 0.3) -> nn.Module:
    """All parameters at random, so that no layer hides behind weights that start at zero; in float64."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.double()


def square(side: float, points: int) -> tuple[torch.Tensor, float]:
    """A grid over a square, and the area of its cells."""
    axis = torch.linspace(-side, side, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


# Laws


@pytest.mark.equation("eq-generative-sampler")
def test_averages_over_a_law_are_averages_over_noise():
    """The sampler of a flow against an integral with its density, for a network with weights at random."""
    flow = drawn_anew(Flow(2, layers=4, width=8), std=0.2)
    grid, area = square(8, 801)
    z = torch.randn(400_000, 2, dtype=torch.float64, generator=generator())
    with torch.no_grad():
        density, x = torch.cat([flow.density(part).exp() for part in grid.split(100_000)]), flow.decode(z)
    for f in (lambda x: x[:, 0], lambda x: x.square().sum(1), lambda x: (x[:, 1] > 0.5).double()):
        values = f(x)
        error = float(values.std()) / len(z) ** 0.5
        assert float(values.mean()) == pytest.approx(float((f(grid) * density).sum()) * area, abs=5 * error + 1e-3)


@pytest.mark.equation("eq-generative-bayes")
@pytest.mark.parametrize("x", [-0.6, 0.1, 0.9])
def test_bayes_rule_by_counting_labels_near_a_point(x):
    weights, means, deviations = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 1.5]), np.array([0.5, 0.8, 0.4])
    rng = np.random.default_rng(0)
    label = rng.choice(3, 4_000_000, p=weights)
    near = np.abs(means[label] + deviations[label] * rng.standard_normal(len(label)) - x) < 0.02
    counted = np.bincount(label[near], minlength=3) / near.sum()
    law = GaussianMixture(weights, means[:, None], deviations**2)
    np.testing.assert_allclose(law.responsibilities(torch.tensor([[x]]))[0], counted, atol=0.012)


@pytest.mark.equation("eq-generative-gaussian")
def test_the_best_gaussian_by_a_search():
    x = TWO.sample(300, generator()).numpy()

    def loss(v):
        root = np.array([[np.exp(v[2]), 0], [v[3], np.exp(v[4])]])
        return -multivariate_normal(v[:2], root @ root.T).logpdf(x).mean()

    v = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    root = np.array([[np.exp(v[2]), 0], [v[3], np.exp(v[4])]])
    np.testing.assert_allclose(v[:2], x.sum(0) / 300, atol=1e-5)
    centred = x - x.sum(0) / 300
    np.testing.assert_allclose(root @ root.T, sum(np.outer(row, row) for row in centred) / 300, atol=1e-5)


@pytest.mark.equation("eq-generative-histogram")
@pytest.mark.parametrize(("K", "N"), [(20, 15), (64, 200), (1000, 30)])
def test_cells_that_points_fill(K, N):
    rng = np.random.default_rng(0)
    bound = 1 - (1 - 1 / K) ** N
    assert bound <= N / K

    def share_filled(p):
        filled = np.array([len(np.unique(rng.choice(K, N, p=p))) for _ in range(2000)]) / K
        return filled.mean(), 5 * filled.std() / 2000**0.5

    mean, error = share_filled(np.full(K, 1 / K))
    assert mean == pytest.approx(bound, abs=error)
    for concentration in (0.1, 1, 10):
        mean, error = share_filled(rng.dirichlet(np.full(K, concentration)))
        assert mean < bound + error


@pytest.mark.equation("eq-generative-likelihood-kl")
def test_mean_log_density_is_minus_entropy_minus_divergence():
    model = Gaussian([0.3, -0.2], [[1.2, 0.3], [0.3, 0.6]])
    x = TWO.sample(400_000, generator())
    seen = model.log_prob(x)
    grid, area = square(8, 801)
    p, q = TWO.log_prob(grid).numpy(), multivariate_normal([0.3, -0.2], [[1.2, 0.3], [0.3, 0.6]]).logpdf(grid)
    entropy, divergence = -(np.exp(p) * p).sum() * area, (np.exp(p) * (p - q)).sum() * area
    assert divergence > 0
    assert float(seen.mean()) == pytest.approx(-entropy - divergence, abs=5 * float(seen.std()) / len(x) ** 0.5)


# GAN


class Fixed(nn.Module):
    """A function in place of a network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


P, Q = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0), Normal(torch.tensor(1.0, dtype=torch.float64), 0.7)


def best_logit(x):
    return P.log_prob(x) - Q.log_prob(x)


@pytest.mark.equation("eq-generative-gan-value")
def test_the_value_of_the_game_in_numpy():
    gan = drawn_anew(GAN(2, latent=3, width=8), std=0.5)
    x, generated = TWO.sample(50, generator()), TWO.sample(70, generator(1))
    with torch.no_grad():
        real, fake = (1 / (1 + np.exp(-gan.discriminator(a).numpy())) for a in (x, generated))
        loss = float(gan.discriminator_loss(x, generated))
    assert loss == pytest.approx(-(np.log(real).mean() + np.log(1 - fake).mean()), abs=1e-12)


@pytest.mark.equation("eq-generative-gan-discriminator")
def test_no_discriminator_does_better_than_the_ratio():
    for x in np.linspace(-4, 5, 19):
        a, b = norm(0, 1).pdf(x), norm(1, 0.7).pdf(x)
        best = minimize_scalar(
            lambda d, a=a, b=b: -(a * np.log(d) + b * np.log(1 - d)),
            bounds=(1e-12, 1 - 1e-12),
            options={"xatol": 1e-12},
        )
        assert best.x == pytest.approx(expit(float(best_logit(torch.tensor(x)))), abs=1e-5)
    x, generated = P.sample((200_000, 1)), Q.sample((200_000, 1))
    for direction in (torch.sin, torch.square, torch.ones_like):  # the loss of ddpm_lib is flat there, in any direction
        c = torch.zeros((), dtype=torch.float64, requires_grad=True)
        gan = GAN(1, width=4)
        gan.discriminator = Fixed(lambda x, c=c, h=direction: best_logit(x) + c * h(x))
        slope = torch.autograd.grad(gan.discriminator_loss(x, generated), c)[0]
        assert abs(float(slope)) < 0.01


@pytest.mark.equation("eq-generative-gan-jsd")
def test_the_value_against_the_best_discriminator():
    torch.manual_seed(0)
    x, generated = P.sample((400_000, 1)), Q.sample((400_000, 1))
    gan = GAN(1, width=4)
    gan.discriminator = Fixed(best_logit)
    a, b = norm(0, 1).pdf, norm(1, 0.7).pdf
    divergences = [quad(lambda x, f=f: f(x) * np.log(2 * f(x) / (a(x) + b(x))), -9, 9, limit=200)[0] for f in (a, b)]
    assert -float(gan.discriminator_loss(x, generated)) == pytest.approx(sum(divergences) - math.log(4), abs=0.01)
    gan.discriminator = Fixed(torch.zeros_like)  # the best one if both laws are the same
    assert -float(gan.discriminator_loss(x, x)) == pytest.approx(-math.log(4))


@pytest.mark.equation("eq-generative-gan-gradient")
@pytest.mark.parametrize("logit", [-6.0, -1.0, 0.0, 2.0])
def test_slopes_of_the_two_losses_of_a_generator(logit):
    h = 1e-6
    saturating = (np.log(1 - expit(logit + h)) - np.log(1 - expit(logit - h))) / (2 * h)
    assert -expit(logit) == pytest.approx(saturating, abs=1e-8)
    bias = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    gan = GAN(2, width=4)
    gan.discriminator = Fixed(lambda x: bias.expand(len(x), 1))
    slope = torch.autograd.grad(gan.generator_loss(5), bias)[0]
    assert float(slope) == pytest.approx(-(1 - expit(logit)), abs=1e-12)


def linear_gan(size: int, penalty: float) -> GAN:
    """The discriminator is w . x + b; the generator gives one point."""
    gan = GAN(size, latent=1, width=4, penalty=penalty)
    gan.discriminator, gan.generator = nn.Linear(size, 1), nn.Linear(1, size)
    nn.init.zeros_(gan.generator.weight)
    return gan


@pytest.mark.equation("eq-generative-gan-r1")
def test_the_penalty_pulls_a_linear_discriminator_towards_level():
    """For l = w . x + b the penalty is gamma |w|^2 / 2 on any data, so one step of descent differs by gamma w."""
    x = TWO.sample(64, generator()).float()
    moved = []
    for penalty in (0.0, 0.4):
        torch.manual_seed(0)
        gan = linear_gan(2, penalty)
        start = gan.discriminator.weight.detach().clone()
        optimisers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (gan.discriminator, gan.generator)]
        gan._update(x, *optimisers)
        moved.append(gan.discriminator.weight.detach())
    torch.testing.assert_close(moved[0] - moved[1], 0.1 * 0.4 * start, rtol=1e-4, atol=1e-7)


@pytest.mark.equation("eq-generative-gan-dirac")
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.5])
def test_eigenvalues_of_the_smallest_game(gamma):
    """The field of both players' gradients by autograd from the losses of ddpm_lib; its Jacobian at the solution."""
    gan = GAN(1, latent=1, width=4)
    data = torch.zeros(1, 1, dtype=torch.float64)

    def field(state):
        theta, psi = state
        gan.generator = Fixed(lambda z: theta.expand(len(z), 1))
        gan.discriminator = Fixed(lambda x: psi * x)
        x = data.clone().requires_grad_()
        steepness = torch.autograd.grad(gan.discriminator(x).sum(), x, create_graph=True)[0].square().sum()
        judged = gan.discriminator_loss(x, theta.view(1, 1)) + gamma / 2 * steepness
        down_psi = torch.autograd.grad(judged, psi, create_graph=True)[0]
        down_theta = torch.autograd.grad(gan.generator_loss(1), theta, create_graph=True)[0]
        return -torch.stack([down_theta, down_psi])

    state = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(field, state)
    torch.testing.assert_close(jacobian, torch.tensor([[0, 0.5], [-0.5, -gamma]], dtype=torch.float64))
    root = np.emath.sqrt(gamma**2 - 1)
    formula = sorted([(-gamma - root) / 2, (-gamma + root) / 2], key=lambda v: (v.real, v.imag))
    found = sorted(np.linalg.eigvals(jacobian.numpy()), key=lambda v: (v.real, v.imag))
    np.testing.assert_allclose(found, formula, atol=1e-7)
    away = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    theta, psi = 0.7, -0.4
    by_hand = [expit(-psi * theta) * psi, -expit(psi * theta) * theta - gamma * psi]
    np.testing.assert_allclose(field(away).detach(), by_hand, atol=1e-12)


# VAE


def small_vae() -> VAE:
    return drawn_anew(VAE(2, latent=1, width=8))


def joint(vae: VAE, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """log p(x, z) for one point x (2,) and many z (K, 1), by torch's own Gaussians."""
    return decoded(vae, z).log_prob(x) + Independent(Normal(torch.zeros_like(z), 1), 1).log_prob(z)


def decoded(vae: VAE, z: torch.Tensor) -> Independent:
    return Independent(Normal(vae.decoder(z), vae.log_sigma.exp()), 1)


def encoded(vae: VAE, x: torch.Tensor) -> Independent:
    mean, log_sigma = vae.encode(x[None])
    return Independent(Normal(mean[0], log_sigma[0].exp()), 1)


GRID = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
POINTS = TWO.sample(4, generator(3))


@torch.no_grad()
@pytest.mark.equation("eq-generative-elbo")
def test_log_density_is_bound_plus_error_of_the_encoder():
    """All three terms by integration over z; the bound of ddpm_lib by averaging its draws."""
    vae = small_vae()
    for x in POINTS:
        truth = float((joint(vae, x, GRID) + math.log(1e-3)).logsumexp(0))
        guess, prior = encoded(vae, x).log_prob(GRID), Normal(0, 1).log_prob(GRID[:, 0])
        weight = guess.exp() * 1e-3
        explains = float((weight * decoded(vae, GRID).log_prob(x)).sum())
        to_prior = float((weight * (guess - prior)).sum())
        to_posterior = float((weight * (guess - joint(vae, x, GRID) + truth)).sum())
        assert to_posterior > 1e-3
        assert explains - to_prior + to_posterior == pytest.approx(truth, abs=1e-6)
        noise = torch.randn(100_000, 1, dtype=torch.float64, generator=generator())
        bounds = vae.bound(x.expand(len(noise), 2), noise)
        assert float(bounds.mean()) == pytest.approx(explains - to_prior, abs=5 * float(bounds.std()) / 300 + 1e-6)


@torch.no_grad()
@pytest.mark.equation("eq-generative-gaussian-kl")
def test_divergence_of_the_encoder_from_the_prior():
    vae = drawn_anew(VAE(2, latent=3, width=8), std=0.5)
    mean, log_s = vae.encode(POINTS)
    z = mean + log_s.exp() * 0.7
    inside = decoded(vae, z).log_prob(POINTS) - vae.bound(POINTS, torch.full_like(z, 0.7))
    prior = Normal(torch.zeros(3, dtype=torch.float64), 1)
    torch.testing.assert_close(inside, kl_divergence(Normal(mean, log_s.exp()), prior).sum(1))
    for m, s in ((0.0, 1.0), (1.2, 0.4), (-0.3, 2.0)):
        integral = quad(lambda z, m=m, s=s: norm(m, s).pdf(z) * (norm(m, s).logpdf(z) - norm.logpdf(z)), -15, 15)[0]
        assert integral == pytest.approx((m**2 + s**2 - 1 - math.log(s**2)) / 2, abs=1e-8)


@pytest.mark.equation("eq-generative-reparameterisation")
def test_gradients_through_a_draw():
    """E[z^3 + cos z] for z ~ N(m, s^2) is m^3 + 3 m s^2 + exp(-s^2 / 2) cos m; its gradient by hand."""
    m, s = torch.tensor(0.8, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    eps = torch.randn(2_000_000, generator=generator())
    z = m + s * eps
    found = torch.autograd.grad((z**3 + z.cos()).mean(), (m, s))
    damp = math.exp(-(0.6**2) / 2)
    by_m = 3 * 0.8**2 + 3 * 0.6**2 - damp * math.sin(0.8)
    by_s = 6 * 0.8 * 0.6 - 0.6 * damp * math.cos(0.8)
    assert float(found[0]) == pytest.approx(by_m, abs=0.015)
    assert float(found[1]) == pytest.approx(by_s, abs=0.03)


@torch.no_grad()
@pytest.mark.equation("eq-generative-importance")
def test_more_draws_of_the_encoder_tighten_the_bound():
    vae = small_vae()
    for x in POINTS:
        truth = float((joint(vae, x, GRID) + math.log(1e-3)).logsumexp(0))
        q = encoded(vae, x)
        noise = torch.randn(65_536, 1, dtype=torch.float64, generator=generator())
        z = q.base_dist.mean + q.base_dist.stddev * noise
        weights = joint(vae, x, z) - q.log_prob(z)
        L = {K: float((weights.view(-1, K).logsumexp(1) - math.log(K)).mean()) for K in (1, 4, 16, 65_536)}
        error = 5 * float(weights.std()) / 256
        assert L[1] == pytest.approx(float(vae.bound(x.expand(len(z), 2), noise).mean()), abs=error)
        assert L[1] < L[4] < L[16] < truth + error
        assert L[65_536] == pytest.approx(truth, abs=error + 1e-3)


# Flow


@torch.no_grad()
@pytest.mark.equation("eq-generative-change")
def test_density_of_a_flow_by_differences():
    flow = drawn_anew(Flow(2, layers=4, width=8))
    for x in POINTS.numpy():

        def f(x):
            return flow.encode(torch.from_numpy(x)[None])[0][0].numpy()

        columns = [(f(x + step) - f(x - step)) / 2e-6 for step in 1e-6 * np.eye(2)]
        expected = multivariate_normal(np.zeros(2), np.eye(2)).logpdf(f(x)) + np.log(abs(np.linalg.det(columns)))
        assert float(flow.density(torch.from_numpy(x)[None])) == pytest.approx(expected, abs=1e-6)
    a, b = norm(np.log(2), 0.5), 1.7  # z = (log x - log 2) / 0.5 of a log-normal x, counted near b
    x = np.exp(a.rvs(4_000_000, random_state=0))
    formula = norm.logpdf((np.log(b) - np.log(2)) / 0.5) + np.log(1 / (0.5 * b))
    assert np.log((np.abs(x - b) < 0.02).mean() / 0.04) == pytest.approx(formula, abs=0.02)


@pytest.mark.equation("eq-generative-coupling")
def test_a_coupling_layer_entry_by_entry():
    mask = torch.tensor([1.0, 0, 1, 0, 0])
    layer = drawn_anew(Coupling(mask, 8))
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator())
    y, log_determinant = (part.detach() for part in layer(x))
    kept, rest = [0, 2], [1, 3, 4]
    changed = x.clone()
    changed[:, rest] = 7.0  # the networks must not see these
    s, t = (part.detach() for part in layer.scale_and_shift(changed))
    for i in range(6):
        for j in kept:
            assert float(y[i, j]) == float(x[i, j])
        for j in rest:
            assert float(y[i, j]) == pytest.approx(float(x[i, j] * math.exp(s[i, j]) + t[i, j]), abs=1e-12)
        jacobian = torch.autograd.functional.jacobian(lambda p: layer(p[None])[0][0], x[i])
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_determinant[i]), abs=1e-10)
        assert float(log_determinant[i]) == pytest.approx(sum(float(s[i, j]) for j in rest), abs=1e-12)
    torch.testing.assert_close(layer.inverse(y), x, rtol=0, atol=1e-12)


# DDPM


@torch.no_grad()
@pytest.mark.equation("eq-generative-ddpm-loss")
@pytest.mark.parametrize("t", [1, 8, 25])
def test_loss_is_the_least_possible_plus_the_distance_to_the_best_guess(t):
    ddpm = drawn_anew(DDPM(2, T=25, width=8))
    x0 = TWO.sample(200_000, generator())
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator(1))
    schedule = ddpm.denoiser.schedule
    x_t = schedule.q_sample(x0, t, eps)
    best, guess = TWO.denoiser(schedule)(x_t, t).eps, ddpm.denoiser(x_t, t).eps
    steps = torch.full((len(x0),), t)
    loss = 2 * simple_loss(ddpm.denoiser, x0, steps, eps)  # its mean over two entries, here their sum
    left = loss - (eps - best).square().sum(1)
    right = (best - guess).square().sum(1)
    assert float(right.mean()) > 0.05
    assert float(left.mean()) == pytest.approx(float(right.mean()), abs=5 * float((left - right).std()) / 447)


@torch.no_grad()
@pytest.mark.equation("eq-generative-ddpm-bound")
def test_bound_of_a_chain_of_gaussians():
    """Drawn as it stands, against ddpm_lib's terms; and below the log density of the chain, known for one Gaussian."""
    schedule, law = Schedule.linear(T=25), Gaussian([0.7], [[0.3]])
    denoiser, n = law.denoiser(schedule), 100_000
    x0 = torch.full((n, 1), 0.2, dtype=torch.float64)
    beta = schedule.beta.double()
    torch.manual_seed(0)
    path = [x0]
    for t in range(1, 26):
        path.append(Normal((1 - beta[t]).sqrt() * path[-1], beta[t].sqrt()).sample())
    total = Normal(0.0, 1.0).log_prob(path[-1])
    mean, variance = 0.0, 1.0  # of the chain's own law, walking down
    for t in range(25, 0, -1):
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        at = [schedule.posterior(x, denoiser(x, t).x0, t)[0] for x in (path[t], ends)]
        total += Normal(at[0], beta[t].sqrt()).log_prob(path[t - 1])
        total -= Normal((1 - beta[t]).sqrt() * path[t - 1], beta[t].sqrt()).log_prob(path[t])
        slope = float(at[1][1] - at[1][0])
        mean, variance = float(at[1][0]) + slope * mean, slope**2 * variance + float(beta[t])
    bound = -bound_terms(denoiser, x0, generator=generator()).sum(0)
    error = 5 * float((total.var() + bound.var()) / n) ** 0.5
    assert float(bound.mean()) == pytest.approx(float(total.mean()), abs=error)
    truth = norm(mean, variance**0.5).logpdf(0.2)
    assert truth - 0.5 < float(total.mean()) < truth - error
