"""The variational bound on the log-likelihood, term by term."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Prediction
from .sampling import VARIANCES, _evaluating, _normal
from .schedule import Schedule


def bound_terms(
    denoiser: Callable[..., Prediction],
    x0: Tensor,
    *,
    variance: str = "beta",
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """The terms of the bound in nats, (T + 1, B): their sum over the first axis is at least -log p(x0) on average.

    Entry 0 is the prior's, KL(q(x_T | x_0) || N(0, I)); entry 1 is the decoder's, -log p(x_0 | x_1), for continuous
    data; entry t > 1 is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). Each is one draw of x_t per row of x0.

    Args:
        denoiser: called as ``denoiser(x_t, t)``.
        x0: data (B, ...).
        variance: of the reverse steps, 'beta' or 'beta_tilde'; for t = 1, where beta_tilde is 0, that of t = 2. Where
            the data have a smooth density, 'beta' is close to the best, and beta_tilde too small at small t.
        generator: source of all noise.
        schedule: the denoiser's own if None.

    Source: Ho, Jain, Abbeel (2020), equations 5 to 8.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be 'beta' or 'beta_tilde'; got {variance!r}.")
    schedule = denoiser.schedule if schedule is None else schedule
    log_variance = schedule.beta.log() if variance == "beta" else schedule.posterior_log_variance
    entries = x0.shape[1:].numel()
    signal, noise = float(schedule.alpha_bar[-1]), float(1 - schedule.alpha_bar[-1])
    terms = [(signal * _sum(x0.square()) + entries * (noise - 1 - math.log(noise))) / 2]
    for t in range(1, schedule.T + 1):
        x_t = schedule.q_sample(x0, t, _normal(x0.shape, x0, generator))
        with torch.no_grad(), _evaluating(denoiser):
            guess = denoiser(x_t, t).x0
        sigma2 = math.exp(log_variance[t])
        mean, true_variance = schedule.posterior(x_t, x0, t)
        error = _sum((mean - schedule.posterior(x_t, guess, t)[0]).square()) / sigma2
        if t == 1:  # the posterior is the point x0 itself
            terms.append((error + entries * math.log(2 * math.pi * sigma2)) / 2)
        else:
            ratio = true_variance / sigma2
            terms.append((error + entries * (ratio - 1 - math.log(ratio))) / 2)
    return torch.stack(terms)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
