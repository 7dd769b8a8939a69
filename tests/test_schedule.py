"""Schedules and the forward process against golden numbers, exact arithmetic and numerical integration."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from ddpm_lib import Schedule

RANDOM_BETA = st.lists(st.floats(1e-4, 0.95), min_size=1, max_size=12)


def exact_alpha_bar(beta: list[float]) -> list[Decimal]:
    """The products of 1 - beta to 50 digits."""
    products = [Decimal(1)]
    with localcontext(prec=50):
        for b in beta:
            products.append(products[-1] * (1 - Decimal(b)))
    return products


# Golden numbers


@pytest.mark.parametrize(("t", "value"), [(1, 0.9999), (500, 0.07858724288), (1000, 4.0358297653756754e-05)])
def test_alpha_bar_of_the_paper(linear, t, value):
    assert float(linear.alpha_bar[t]) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(("t", "value"), [(2, 5.4531876613e-05), (3, 8.5489115e-05), (1000, 0.0199999835)])
def test_beta_tilde_of_the_paper(linear, t, value):
    assert float(linear.beta_tilde[t]) == pytest.approx(value, rel=5e-9)


def test_beta_tilde_is_zero_at_the_first_step(linear, cosine):
    assert linear.beta_tilde[1] == 0
    assert cosine.beta_tilde[1] == 0


def test_the_paper_schedule_runs_from_1e_4_to_2e_2(linear):
    assert linear.T == 1000
    assert float(linear.beta[1]) == 1e-4
    assert float(linear.beta[1000]) == 0.02
    assert torch.diff(linear.beta[1:]).sub(0.0199 / 999).abs().max() < 1e-16


def test_golden_numbers_of_the_cosine_schedule(linear, cosine):
    assert float(cosine.beta[1]) == pytest.approx(4.128422e-05, rel=1e-6)
    assert int((cosine.beta == 0.999).sum()) == 1
    assert float(cosine.alpha_bar[-1]) == pytest.approx(2.42877e-09, rel=1e-5)
    assert float(cosine.signal[-1]) ** -1 == pytest.approx(20_291, abs=0.5)
    assert float(linear.signal[-1]) ** -1 == pytest.approx(157.4, abs=0.05)


def test_prior_term_of_the_bound(linear):
    """KL(q(x_T | x_0) || N(0, 1)) per dimension, in bits, for data with mean square 0.25."""
    alpha_bar = float(linear.alpha_bar[-1])
    nats = 0.5 * (alpha_bar * 0.25 - alpha_bar - math.log1p(-alpha_bar))
    assert nats / math.log(2) == pytest.approx(7.2787e-06, rel=1e-5)


def test_decoder_cost_and_error_explain_the_paper(linear):
    """Bits to name a grey level when the last mean misses it by a normal error of the posterior's deviation."""
    sigma = math.exp(0.5 * float(linear.posterior_log_variance[1]))
    half_bin = 1 / 255

    def bits(miss):
        mass = stats.norm.cdf((half_bin - miss) / sigma) - stats.norm.cdf((-half_bin - miss) / sigma)
        return -np.log2(mass)

    average, _ = integrate.quad(lambda z: bits(sigma * z) * stats.norm.pdf(z), -8, 8)
    assert average == pytest.approx(1.9630, abs=5e-5)
    assert bits(0.0) == pytest.approx(1.3054, abs=5e-5)
    assert sigma * 127.5 == pytest.approx(0.9415, abs=5e-5)


# Tables


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_bar_equals_exact_arithmetic(name, request):
    schedule = request.getfixturevalue(name)
    exact = exact_alpha_bar(schedule.beta[1:].tolist())
    assert schedule.alpha_bar.tolist() == pytest.approx([float(f) for f in exact], rel=1e-12)
    steps = zip(exact, exact[1:], schedule.beta[1:].tolist())
    tilde = [0.0] + [float((1 - before) / (1 - after) * Decimal(beta)) for before, after, beta in steps]
    assert schedule.beta_tilde.tolist() == pytest.approx(tilde, rel=1e-11)


@pytest.mark.parametrize(
    "schedule", [Schedule.linear(40), Schedule.cosine(40), Schedule(torch.tensor([0.5]))], ids=repr
)
def test_tables_have_entry_0_for_the_data(schedule):
    for name in ("beta", "alpha", "alpha_bar", "signal", "noise", "snr", "beta_tilde"):
        table = getattr(schedule, name)
        assert table.shape == (schedule.T + 1,)
        assert table.dtype == torch.float64
    assert schedule.beta[0] == 0
    assert schedule.alpha[0] == schedule.alpha_bar[0] == schedule.signal[0] == 1
    assert schedule.noise[0] == 0
    assert schedule.snr[0] == math.inf
    assert (torch.diff(schedule.alpha_bar) < 0).all()


def test_signal_noise_and_snr_by_definition(cosine):
    alpha_bar = cosine.alpha_bar.numpy()
    np.testing.assert_allclose(cosine.signal.numpy() ** 2, alpha_bar, rtol=1e-14)
    np.testing.assert_allclose(cosine.noise.numpy() ** 2, 1 - alpha_bar, rtol=1e-14)
    np.testing.assert_allclose(cosine.snr.numpy()[1:], alpha_bar[1:] / (1 - alpha_bar[1:]), rtol=1e-14)


@pytest.mark.parametrize("T", [21, 50, 100, 400, 4000])
def test_linear_defaults_end_at_about_the_same_noise(T):
    """log alpha_bar_T is about minus the sum of beta, 10.05, for every T."""
    schedule = Schedule.linear(T)
    assert float(schedule.beta[1]) == pytest.approx(0.1 / T)
    assert float(schedule.beta[-1]) == pytest.approx(20 / T)
    assert float(schedule.beta.sum()) == pytest.approx(10.05)


@pytest.mark.parametrize(("T", "s"), [(10, 0.008), (1000, 0.008), (1000, 0.1), (50, 0.0)])
def test_cosine_follows_its_curve_until_beta_is_clipped(T, s):
    schedule = Schedule.cosine(T, s=s)
    curve = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    for t in range(T):
        assert float(schedule.alpha_bar[t]) == pytest.approx(curve[t] / curve[0], rel=1e-10)
    assert float(schedule.beta[T]) == 0.999


def test_log_variance_takes_its_first_entry_from_the_second_step(linear):
    table = linear.posterior_log_variance
    assert math.isnan(table[0])
    assert float(table[1]) == float(table[2]) == pytest.approx(math.log(5.4531876613e-05))
    np.testing.assert_allclose(table[2:].exp(), linear.beta_tilde[2:], rtol=1e-13)
    assert linear.beta_tilde[1] == 0


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.linear(100),
        Schedule.linear(9, 0.1, 0.5),
        Schedule.cosine(30, s=0.02, beta_max=0.9),
        Schedule([0.1, 0.7]),
    ],
    ids=repr,
)
def test_a_schedule_is_built_again_from_its_configuration(schedule):
    again = Schedule.from_config(schedule.config)
    assert torch.equal(again.alpha_bar, schedule.alpha_bar)
    assert again.config == schedule.config


# The forward process


@given(RANDOM_BETA)
@settings(max_examples=50, deadline=None)
def test_single_steps_compose_to_the_closed_form(beta):
    """Mean and variance of a chain of q_step, carried along by hand, are those of q_sample."""
    schedule = Schedule(torch.tensor(beta, dtype=torch.float64))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance = one, 0.0
    for t in range(1, schedule.T + 1):
        mean = schedule.q_step(mean, t, zero)
        gain, added = float(schedule.q_step(one, t, zero)), float(schedule.q_step(zero, t, one))
        variance = gain**2 * variance + added**2
        assert float(schedule.q_sample(one, t, zero)) == pytest.approx(float(mean), rel=1e-12)
        assert float(schedule.q_sample(zero, t, one)) ** 2 == pytest.approx(variance, rel=1e-12)


def test_q_step_by_hand():
    schedule = Schedule([0.19, 0.36])
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    eps = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    assert schedule.q_step(x, 2, eps).tolist() == [pytest.approx([0.8 * 2 + 0.6, -0.8 + 0.3])]
    alpha_bar = 0.81 * 0.64
    expected = [math.sqrt(alpha_bar) * a + math.sqrt(1 - alpha_bar) * b for a, b in [(2, 1), (-1, 0.5)]]
    assert schedule.q_sample(x, 2, eps).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 5, 5)])
@pytest.mark.parametrize("method", ["q_step", "q_sample"])
def test_each_image_may_have_its_own_step(linear, shape, method):
    x, eps = torch.randn(shape), torch.randn(shape)
    t = torch.tensor([1, 17, 500, 1000])
    together = getattr(linear, method)(x, t, eps)
    for i in range(4):
        alone = getattr(linear, method)(x[i : i + 1], int(t[i]), eps[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_many_draws_have_the_moments_of_the_closed_form(linear, generator):
    x0 = torch.full((200_000,), 0.7, dtype=torch.float64)
    x_t = linear.q_sample(x0, 300, torch.randn(x0.shape, generator=generator, dtype=torch.float64))
    alpha_bar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(300))
    assert float(x_t.mean()) == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=5 * math.sqrt((1 - alpha_bar) / 200_000))
    assert float(x_t.var()) == pytest.approx(1 - alpha_bar, rel=5 * math.sqrt(2 / 200_000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_step_loses_its_noise_in_any_precision(linear, dtype):
    """1 - alpha_bar formed in bfloat16 is 0 for ten steps; here every step keeps its noise."""
    like = torch.zeros(1, dtype=dtype)
    for t in range(1, 20):
        noise = linear.at("noise", t, like)
        assert noise.dtype == dtype
        exact = math.sqrt(1 - math.prod(1 - (1e-4 + 0.0199 * i / 999) for i in range(t)))
        assert float(noise) == pytest.approx(exact, rel=max(torch.finfo(dtype).eps, 1e-12))


def test_gradients_pass_through_the_noising(linear):
    x0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    linear.q_sample(x0, 400, torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    assert x0.grad.flatten().tolist() == pytest.approx([math.sqrt(float(linear.alpha_bar[400]))] * 6)


# The posterior


@pytest.mark.parametrize(("t", "s"), [(2, 1), (3, 2), (7, 3), (10, 9), (10, 1)])
def test_posterior_is_bayes_rule_on_a_grid(t, s):
    """q(x_s | x_t, x_0) in proportion to q(x_s | x_0) q(x_t | x_s), integrated numerically."""
    schedule = Schedule.linear(10, 0.05, 0.4)
    ratio = float(schedule.alpha[s + 1 : t + 1].prod())
    alpha_bar_s = float(schedule.alpha[1 : s + 1].prod())
    for x0, x_t in torch.tensor([(0.3, 1.2), (-1.0, 0.4), (0.9, -2.0)], dtype=torch.float64):
        grid = np.linspace(-8, 8, 20_001)
        density = stats.norm.pdf(grid, math.sqrt(alpha_bar_s) * float(x0), math.sqrt(1 - alpha_bar_s))
        density = density * stats.norm.pdf(float(x_t), math.sqrt(ratio) * grid, math.sqrt(1 - ratio))
        density /= density.sum()
        mean = (grid * density).sum()
        found, variance = schedule.posterior(x_t, x0, t, s)
        assert float(found) == pytest.approx(mean, abs=1e-9)
        assert variance == pytest.approx(((grid - mean) ** 2 * density).sum(), rel=1e-7)


@given(RANDOM_BETA, st.data())
@settings(max_examples=100, deadline=None)
def test_posterior_keeps_the_marginals(beta, data):
    """Averaged over q(x_t | x_0), q(x_s | x_t, x_0) must give back q(x_s | x_0), for every pair s < t."""
    schedule = Schedule(torch.tensor(beta, dtype=torch.float64))
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    exact = exact_alpha_bar(schedule.beta[1:].tolist())
    c0, ct, variance = schedule.posterior_coefficients(t, s)
    assert c0 + ct * math.sqrt(exact[t]) == pytest.approx(math.sqrt(exact[s]), rel=1e-10)
    assert ct**2 * float(1 - exact[t]) + variance == pytest.approx(float(1 - exact[s]), rel=1e-9, abs=1e-15)


def test_posterior_defaults_to_the_step_before(linear):
    assert linear.posterior_coefficients(400) == linear.posterior_coefficients(400, 399)
    c0, ct, variance = linear.posterior_coefficients(1)
    assert (c0, ct, variance) == (pytest.approx(1), 0, 0)


@given(RANDOM_BETA, st.data())
@settings(max_examples=50, deadline=None)
def test_long_steps_are_chains_of_short_ones(beta, data):
    schedule = Schedule(torch.tensor(beta, dtype=torch.float64))
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    found, found_tilde = schedule.between(t, s)
    exact = exact_alpha_bar(schedule.beta[1:].tolist())
    expected = 1 - exact[t] / exact[s]
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found_tilde == pytest.approx(float((1 - exact[s]) / (1 - exact[t]) * expected), rel=1e-9)


def test_the_tables_of_one_dtype_do_not_leak_into_another(linear):
    x = torch.ones(1)
    linear.q_sample(x.half(), 5, x.half())
    single = linear.q_sample(x, 5, x)
    double = linear.q_sample(x.double(), 5, x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert float(double) == pytest.approx(float(linear.signal[5] + linear.noise[5]), rel=1e-15)


def test_snr_scale_multiplies_every_signal_to_noise_ratio():
    """Where beta is not clipped; and the first entry stays the data."""
    plain, scaled = (Schedule.cosine(1000, snr_scale=scale) for scale in (1.0, 0.25))
    torch.testing.assert_close(scaled.snr[1:990], 0.25 * plain.snr[1:990], rtol=1e-9, atol=0)
    assert float(scaled.alpha_bar[0]) == 1
    assert Schedule.from_config(scaled.config).config == scaled.config
    with pytest.raises(ValueError, match="snr_scale must be above 0; got 0"):
        Schedule.cosine(snr_scale=0.0)
