"""The variational bound against whole trajectories drawn step by step, analytic worlds, and the paper's figures."""

import math

import pytest
import torch
from tiny_models import tiny_denoiser
from torch.distributions import Independent, Normal, kl_divergence

from ddpm_lib import GaussianMixture, Schedule, bound_terms

WORLD = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]])


def draws(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return WORLD.sample(n, generator), generator


def log_normal(x: torch.Tensor, mean: torch.Tensor | float, variance: float) -> torch.Tensor:
    return -((x - mean).square() / variance + math.log(2 * math.pi * variance)).sum(1) / 2


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_terms_add_up_to_the_log_ratio_of_whole_trajectories(variance):
    """-log p(x_0..x_T) / q(x_1..x_T | x_0), with chains drawn one noising step at a time and no term made a KL."""
    schedule = Schedule.linear(40)
    denoiser = WORLD.denoiser(schedule)
    n = 100_000
    x0, generator = draws(n)
    terms = bound_terms(denoiser, x0, variance=variance, generator=generator)
    assert terms.shape == (41, n)
    x, ratio = draws(n, seed=1)[0], torch.zeros(n, dtype=torch.float64)
    for t in range(1, 41):
        beta = float(schedule.beta[t])
        noisier = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ratio += log_normal(noisier, (1 - beta) ** 0.5 * x, beta)
        c0, ct, _ = schedule.posterior_coefficients(t)
        sigma2 = beta if variance == "beta" else float(schedule.beta_tilde[max(t, 2)])
        ratio -= log_normal(x, c0 * denoiser(noisier, t).x0 + ct * noisier, sigma2)
        x = noisier
    ratio -= log_normal(x, 0.0, 1.0)
    found = terms.sum(0)
    error = (found.var() / n + ratio.var() / n) ** 0.5
    assert abs(found.mean() - ratio.mean()) < 4 * error
    assert error < 0.03


def test_the_bound_lies_above_the_entropy_and_closes_with_more_steps():
    n = 20_000
    gaps, errors = [], []
    for T in (5, 20, 100):
        x0, generator = draws(n)
        gap = bound_terms(WORLD.denoiser(Schedule.cosine(T)), x0, generator=generator).sum(0) + WORLD.log_prob(x0)
        gaps.append(float(gap.mean()))
        errors.append(float(gap.std()) / n**0.5)
    assert gaps[0] - gaps[1] > 4 * errors[0]
    assert gaps[1] - gaps[2] > 4 * errors[1]
    assert -4 * errors[2] < gaps[2] < 0.06


def test_a_denoiser_that_knows_the_answer_pays_for_the_variance_only():
    schedule = Schedule.linear(30)
    x0, generator = draws(5)

    def oracle(x_t, t):
        return type("Guess", (), {"x0": x0})

    exact = bound_terms(oracle, x0, variance="beta_tilde", generator=generator, schedule=schedule)
    torch.testing.assert_close(exact[2:], torch.zeros(29, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    wider = bound_terms(oracle, x0, variance="beta", generator=generator, schedule=schedule)
    for t in (2, 7, 30):
        zero = torch.zeros(2, dtype=torch.float64)
        true, model = (Independent(Normal(zero, table[t].sqrt()), 1) for table in (schedule.beta_tilde, schedule.beta))
        torch.testing.assert_close(wider[t], kl_divergence(true, model).expand(5), rtol=1e-10, atol=1e-12)
    assert float(wider[1][0]) == pytest.approx(math.log(2 * math.pi * float(schedule.beta[1])))


def test_the_prior_costs_what_the_paper_says():
    """7.2787e-06 bits per dimension with E[x0^2] = 0.25."""
    schedule = Schedule.linear()
    x0 = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    prior = bound_terms(lambda x_t, t: type("Guess", (), {"x0": x0}), x0, schedule=schedule)[0]
    assert float(prior) / 12 / math.log(2) == pytest.approx(7.2787e-06, rel=1e-4)


def test_an_unknown_variance_is_named():
    with pytest.raises(ValueError, match="'learned'"):
        bound_terms(WORLD.denoiser(Schedule.linear(30)), draws(2)[0], variance="learned")


def test_dropout_is_off_while_the_bound_is_taken():
    denoiser = tiny_denoiser(dropout=0.5).train()
    first, again = (
        bound_terms(denoiser, torch.zeros(2, 1, 4, 4), generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert denoiser.network.training


def test_the_terms_of_no_data_are_none():
    assert bound_terms(tiny_denoiser(), torch.zeros(0, 1, 4, 4)).shape == (31, 0)
