"""The equations of the chapter on training, each against a computation that shares no code with the formula."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_denoiser, tiny_images
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ddpm_lib import Denoiser, Gaussian, GaussianMixture, Prediction, Schedule, Trainer, digits, simple_loss, transition

NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()  # mean of f(z) for standard normal z: NODE_WEIGHTS @ f(NODES)


class Scaled(nn.Module):
    """A network that returns a multiple of its input and remembers the steps it was called with."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.steps: list[Tensor] = []

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        self.steps.append(steps)
        return self.factor * x


def scaled_loss(schedule: Schedule, factor: float, mean_square: float) -> np.ndarray:
    """Expected loss of ``Scaled`` at t = 1..T: eps and x0 are independent, and eps has mean 0."""
    alpha_bar = np.cumprod(1 - schedule.beta[1:].numpy())
    return (1 - factor * np.sqrt(1 - alpha_bar)) ** 2 + factor**2 * alpha_bar * mean_square


def trainer_of(denoiser: Denoiser, **options) -> Trainer:
    settings = {"batch_size": 4, "learning_rate": 1e-2, "warmup": 0, "precision": "float32"}
    return Trainer(denoiser, tiny_images(400), **settings | options)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


# The bound


def bound_and_evidence(off: float) -> tuple[float, float]:
    """Right side of the bound and -log p(x_0), for a model that is exact up to an error ``off`` in its means.

    Data are N(0.3, 0.6), where the exact reverse transitions are Gaussian: Bayes' rule for precisions, in numpy.
    """
    T, x0, m, v = 4, 1.1, 0.3, 0.6
    beta = np.array([0.1, 0.25, 0.2, 0.4])
    mean, variance = [m], [v]  # of x_t
    for b in beta:
        mean.append(math.sqrt(1 - b) * mean[-1])
        variance.append((1 - b) * variance[-1] + b)
    models = []  # p(x_{t-1} | x_t) is N(slope x_t + shift, width)
    for t in range(1, T + 1):
        width = 1 / (1 / variance[t - 1] + (1 - beta[t - 1]) / beta[t - 1])
        slope = width * math.sqrt(1 - beta[t - 1]) / beta[t - 1]
        models.append((slope, width * mean[t - 1] / variance[t - 1] + off, width))
    schedule = Schedule(torch.tensor(beta))
    last = Normal(mean[T], math.sqrt(variance[T]))

    def given_x0(t: int) -> Normal:
        alpha_bar = math.prod(1 - beta[:t])
        return Normal(math.sqrt(alpha_bar) * x0, math.sqrt(1 - alpha_bar))

    bound = float(kl_divergence(given_x0(T), last))
    for t in range(1, T + 1):
        x_t = given_x0(t).mean + given_x0(t).stddev * torch.tensor(NODES)
        slope, shift, width = models[t - 1]
        p = Normal(slope * x_t + shift, math.sqrt(width))
        if t == 1:
            terms = -p.log_prob(torch.tensor(x0))
        else:
            c0, ct, narrow = schedule.posterior_coefficients(t)
            terms = kl_divergence(Normal(c0 * x0 + ct * x_t, math.sqrt(narrow)), p)
        bound += float(terms.numpy() @ NODE_WEIGHTS)
    mean_p, variance_p = mean[T], variance[T]
    for slope, shift, width in reversed(models):
        mean_p, variance_p = slope * mean_p + shift, slope**2 * variance_p + width
    return bound, -stats.norm(mean_p, math.sqrt(variance_p)).logpdf(x0)


@pytest.mark.equation("eq-training-bound")
def test_bound_is_tight_for_the_exact_model_and_loose_for_others():
    bound, evidence = bound_and_evidence(off=0.0)
    assert bound == pytest.approx(evidence, abs=1e-6)
    for off in (-0.2, 0.1, 0.5):
        bound, evidence = bound_and_evidence(off)
        assert bound > evidence + 1e-3


@pytest.mark.equation("eq-training-kl-gaussians")
@pytest.mark.parametrize(("d", "v1", "v2"), [(1, 0.3, 0.7), (5, 2.0, 0.5), (3, 1.0, 1.0)])
def test_kl_of_round_gaussians(d, v1, v2, generator):
    m1, m2 = torch.randn(2, d, dtype=torch.float64, generator=generator)
    eye = torch.eye(d, dtype=torch.float64)
    truth = kl_divergence(MultivariateNormal(m1, v1 * eye), MultivariateNormal(m2, v2 * eye))
    formula = (m1 - m2).square().sum() / (2 * v2) + d / 2 * (v1 / v2 - 1 - math.log(v1 / v2))
    assert formula.item() == pytest.approx(truth.item(), rel=1e-12)


def step_kl(schedule: Schedule, x_t: Tensor, eps: Tensor, guess: Tensor, t: int, variance: str) -> Tensor:
    """KL of the library's posterior at the true image from its transition at the guess, summed over entries."""
    x0 = (x_t - schedule.noise[t] * eps) / schedule.signal[t]
    mean_q, v_q = schedule.posterior(x_t, x0, t)
    prediction = Prediction.of("eps", guess, x_t, t, schedule)
    mean_p, sigma = transition(prediction, t, t - 1, schedule, variance=variance)
    return kl_divergence(Normal(mean_q, math.sqrt(v_q)), Normal(mean_p, sigma)).sum()


@pytest.mark.equation("eq-training-step-kl")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("t", [2, 17, 400, 1000])
def test_each_term_is_a_weighted_error_of_the_noise(linear, generator, t, variance):
    x_t, eps, wrong, worse = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    kl = {guess: step_kl(linear, x_t, eps, eps + guess, t, variance) for guess in (wrong, worse)}
    none = step_kl(linear, x_t, eps, eps, t, variance)  # the constant
    beta, alpha_bar = float(linear.beta[t]), float(linear.alpha_bar[t])
    sigma2 = beta if variance == "beta" else beta * (1 - alpha_bar / (1 - beta)) / (1 - alpha_bar)
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - alpha_bar))
    ratio = float(linear.beta_tilde[t]) / sigma2
    assert none.item() == pytest.approx(3 * (ratio - 1 - math.log(ratio)), abs=1e-9)
    for guess, value in kl.items():
        assert (value - none).item() == pytest.approx(weight * guess.square().sum().item(), rel=1e-6)


@pytest.mark.equation("eq-training-weight")
@pytest.mark.parametrize("t", [2, 50, 999])
def test_weight_is_half_the_curvature_of_the_divergence(cosine, generator, t):
    x_t, eps, guess = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    hessian = torch.autograd.functional.hessian(lambda e: step_kl(cosine, x_t, eps, e, t, "beta"), guess)
    beta = float(cosine.beta[t])
    weight = beta**2 / (2 * beta * (1 - beta) * (1 - float(cosine.alpha_bar[t])))
    torch.testing.assert_close(hessian, 2 * weight * torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=1e-10)


# The simple loss


@pytest.mark.equation("eq-training-simple-loss")
def test_simple_loss_has_the_mean_that_the_formula_gives(generator):
    schedule, factor, n = Schedule.linear(40), 0.7, 50_000
    images = digits("test")[0].double()
    network = Scaled(factor)
    x0 = images[torch.randint(len(images), (n,), generator=generator)]
    t = torch.randint(1, schedule.T + 1, (n,), generator=generator)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        losses = simple_loss(Denoiser(network, schedule), x0, t, eps)
    expected = scaled_loss(schedule, factor, float(images.square().mean())).mean()
    assert torch.equal(network.steps[0], t - 1)
    assert losses.shape == (n,)
    assert abs(float(losses.mean()) - expected) < 4 * float(losses.std()) / n**0.5


@pytest.mark.equation("eq-training-unbiased")
def test_training_draws_steps_whose_mean_loss_is_that_of_all_steps():
    schedule, factor = Schedule(torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8])), 0.4
    trainer = trainer_of(Denoiser(Scaled(factor), schedule), batch_size=400, learning_rate=1e-12)
    logs = list(trainer.run(40))
    t, losses = torch.cat([log.t for log in logs]), torch.cat([log.losses for log in logs])
    counts = np.bincount(t.numpy(), minlength=schedule.T + 1)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    total = scaled_loss(schedule, factor, float(tiny_images(400).square().mean())).sum()
    error = schedule.T * float(losses.std()) / len(losses) ** 0.5
    assert abs(schedule.T * float(losses.mean()) - total) < 4 * error


@pytest.mark.equation("eq-training-total-noise")
@pytest.mark.parametrize("t", [1, 2, 37, 1000])
def test_total_noise_is_a_weighted_sum_of_the_noises_of_the_steps(linear, generator, t):
    x0 = torch.randn(5, dtype=torch.float64, generator=generator)
    single = torch.randn(t + 1, 5, dtype=torch.float64, generator=generator)
    x = x0
    for s in range(1, t + 1):
        x = linear.q_step(x, s, single[s])
    alpha_bar = float(linear.alpha_bar[t])
    weights = [math.sqrt(alpha_bar / linear.alpha_bar[s] * linear.beta[s] / (1 - alpha_bar)) for s in range(1, t + 1)]
    assert sum(w**2 for w in weights) == pytest.approx(1, rel=1e-10)
    total = sum(w * e for w, e in zip(weights, single[1:]))
    torch.testing.assert_close(total, (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear.q_sample(x0, t, total), x, rtol=1e-9, atol=1e-9)


# What is learned


@pytest.mark.equation("eq-training-decomposition")
@pytest.mark.parametrize("t", [100, 300, 600])
def test_loss_is_error_plus_floor(linear, t):
    """Data are -1 and 2 with chances 1/4 and 3/4; expectations over eps on a fine grid."""
    values, chances = np.array([-1.0, 2.0]), np.array([0.25, 0.75])
    a, b = float(linear.signal[t]), float(linear.noise[t])
    eps = np.tile(np.linspace(-9, 9, 4001), (2, 1))
    x_t = a * values[:, None] + b * eps
    measure = chances[:, None] * stats.norm.pdf(eps) * (18 / 4000)
    density = chances * stats.norm.pdf((x_t[..., None] - a * values) / b)  # of x_t and each value, up to a factor
    share = density / density.sum(-1, keepdims=True)
    possible = (x_t[..., None] - a * values) / b  # eps if x_0 was this value
    conditional_mean = (share * possible).sum(-1)
    conditional_variance = (share * possible**2).sum(-1) - conditional_mean**2
    world = GaussianMixture(chances, values[:, None], [0.0, 0.0])
    ours = world.denoiser(linear)(torch.tensor(x_t).view(-1, 1), t).eps.view(2, -1).numpy()
    np.testing.assert_allclose(ours, conditional_mean, atol=1e-8)
    for f in (np.sin(x_t), 0.3 * x_t + 1, conditional_mean):
        loss = (measure * (eps - f) ** 2).sum()
        error = (measure * (conditional_mean - f) ** 2).sum()
        assert loss == pytest.approx(error + (measure * conditional_variance).sum(), rel=1e-9)


@pytest.fixture
def world(generator) -> Gaussian:
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    return Gaussian([0.5, -1.0, 0.0, 2.0], root @ root.T)


@pytest.mark.equation("eq-training-gaussian-eps")
@pytest.mark.parametrize("t", [50, 300, 700])
def test_least_squares_finds_the_noise_of_the_gaussian_world(linear, world, generator, t):
    n = 200_000
    x0 = world.sample(n, generator)
    eps = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    x_t = linear.q_sample(x0, t, eps)
    ones = torch.ones(n, 1, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat([x_t, ones], dim=1), eps).solution
    alpha_bar = float(linear.alpha_bar[t])
    spread = alpha_bar * world.covariance + (1 - alpha_bar) * torch.eye(4, dtype=torch.float64)
    matrix = math.sqrt(1 - alpha_bar) * torch.linalg.inv(spread)
    torch.testing.assert_close(fit[:4].T, matrix, rtol=0, atol=0.03)
    torch.testing.assert_close(fit[4], -math.sqrt(alpha_bar) * matrix @ world.mean, rtol=0, atol=0.05)
    formula = (x_t[:100] - math.sqrt(alpha_bar) * world.mean) @ matrix.T
    torch.testing.assert_close(world.denoiser(linear)(x_t[:100], t).eps, formula, rtol=1e-8, atol=1e-8)


@pytest.mark.equation("eq-training-gaussian-floor")
@pytest.mark.parametrize("t", [1, 50, 300, 900])
def test_optimal_loss_of_the_gaussian_world(linear, world, generator, t):
    n = 100_000
    x0 = world.sample(n, generator)
    eps = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    losses = (world.denoiser(linear)(linear.q_sample(x0, t, eps), t).eps - eps).square().mean(1)
    signal = float(linear.alpha_bar[t]) * np.linalg.eigvalsh(world.covariance.numpy())
    floor = np.mean(signal / (signal + 1 - float(linear.alpha_bar[t])))
    assert abs(float(losses.mean()) - floor) < 4 * float(losses.std()) / n**0.5


# The clock


def heard(t: Tensor) -> np.ndarray:
    """What the layers behind the time embedding are given when a denoiser is called at t."""
    denoiser = tiny_denoiser(Schedule.linear(1000), base_channels=8)
    caught = []
    denoiser.network.time.linear_1.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0]))
    denoiser(torch.zeros(len(t), 1, 4, 4), t)
    return caught[0].double().numpy()


@pytest.mark.equation("eq-training-time-embedding")
def test_time_embedding_is_sines_then_cosines_of_t_minus_1():
    t = torch.tensor([1, 2, 30, 500, 1000])
    omega = [10_000 ** (-k / 3) for k in range(4)]
    expected = [[f((int(n) - 1) * w) for f in (math.sin, math.cos) for w in omega] for n in t]
    np.testing.assert_allclose(heard(t), expected, atol=2e-4)


@pytest.mark.equation("eq-training-embedding-kernel")
def test_embeddings_are_told_apart_by_their_distance_alone():
    t, s = torch.tensor([5, 105, 905, 1000]), torch.tensor([1, 101, 901, 400])
    products = (heard(t) * heard(s)).sum(1)
    kernel = sum(np.cos((t - s).numpy() * 10_000 ** (-k / 3)) for k in range(4))
    np.testing.assert_allclose(products, kernel, atol=5e-4)
    assert np.ptp(products[:3]) < 5e-4


# The average of the weights


def weights_along(trainer: Trainer, steps: int) -> list[Tensor]:
    """Weights of the network before the first step and after each."""
    along = [flat(trainer.denoiser)]
    for _ in trainer.run(steps):
        along.append(flat(trainer.denoiser))
    return along


@pytest.mark.equation("eq-training-ema")
def test_average_follows_its_recursion():
    trainer = trainer_of(tiny_denoiser(), ema_decay=0.7, ema_warmup=False)
    average, *rest = weights_along(trainer, 6)
    for weights in rest:
        average = 0.7 * average + 0.3 * weights
    assert (rest[-1] - average).abs().max() > 1e-3
    torch.testing.assert_close(flat(trainer.ema), average, rtol=1e-5, atol=1e-6)


@pytest.mark.equation("eq-training-ema-unrolled")
def test_average_is_a_sum_in_which_the_past_fades():
    trainer = trainer_of(tiny_denoiser(), ema_decay=0.8, ema_warmup=False)
    along, N = weights_along(trainer, 7), 7
    total = 0.8**N * along[0] + (1 - 0.8) * sum(0.8 ** (N - n) * along[n] for n in range(1, N + 1))
    torch.testing.assert_close(flat(trainer.ema), total, rtol=1e-5, atol=1e-6)


@pytest.mark.equation("eq-training-ema-warmup")
def test_average_warms_up():
    trainer = trainer_of(tiny_denoiser(), ema_decay=0.3)
    average, *rest = weights_along(trainer, 6)
    for decay, weights in zip([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3], rest):
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(flat(trainer.ema), average, rtol=1e-5, atol=1e-6)


@pytest.mark.equation("eq-training-ema-forgotten")
@pytest.mark.parametrize("N", [1, 5, 12])
def test_warm_up_forgets_the_random_start(N):
    """The average starts at 1, the network stays at 0: what is left of the 1 is the share."""
    trainer = trainer_of(Denoiser(Scaled(0.0), Schedule.linear(30)), learning_rate=1e-12, ema_decay=0.9999)
    with torch.no_grad():
        trainer.ema.network.factor.fill_(1.0)
    list(trainer.run(N))
    share = math.factorial(N) * math.factorial(9) / math.factorial(N + 9)
    assert trainer.ema.network.factor.item() == pytest.approx(share, rel=1e-4)


# The optimiser's settings


@pytest.mark.equation("eq-training-learning-rate")
def test_learning_rate_rises_and_falls_in_lines():
    trainer = trainer_of(Denoiser(Scaled(0.0), Schedule.linear(30)), learning_rate=0.5, warmup=10, decay_steps=40)
    rates = [log.learning_rate for log in trainer.run(60)]
    corners = np.interp(np.arange(60), [0, 9, 10, 40], [0.05, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(rates, np.maximum(corners, 0.02 * 0.5), rtol=1e-12)


@pytest.mark.equation("eq-training-clip")
@pytest.mark.parametrize("length", [1e-3, 0.05, 1e3])
def test_gradient_is_scaled_down_to_the_clipping_length(length):
    """After one step Adam's first moment is a tenth of the gradient that it was given."""
    free, clipped = trainer_of(tiny_denoiser(), clip_norm=1e9), trainer_of(tiny_denoiser(), clip_norm=length)
    (log,), _ = list(clipped.run(1)), list(free.run(1))

    def first_moment(trainer: Trainer) -> Tensor:
        return torch.cat([state["exp_avg"].flatten() for state in trainer.optimiser.state.values()]) * 10

    gradient = first_moment(free)
    norm = float(gradient.norm())
    assert float(log.grad_norm) == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(first_moment(clipped), gradient * min(1, length / norm), rtol=1e-3, atol=1e-8)
