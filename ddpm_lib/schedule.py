"""Noise schedules: how much of the data and how much noise there is at step t.

Steps are counted 1..T as in the paper; entry 0 of every table is the data itself. Tables are float64, because
``1 - alpha_bar`` loses its first ten steps in half precision; values are cast once, when they meet a tensor.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

MOST_STEPS = 1_000_000  # in a file, a longer schedule is a damaged number, not a plan


class Schedule:
    """Tables of a forward process with T steps; each has shape (T + 1,) and dtype float64.

    Attributes:
        T: number of steps.
        beta: variance that step t adds, in (0, 1); ``beta[0] = 0``.
        alpha: ``1 - beta``.
        alpha_bar: product of alpha_1 .. alpha_t; ``alpha_bar[0] = 1``.
        signal, noise: ``sqrt(alpha_bar)`` and ``sqrt(1 - alpha_bar)``, the weights of x0 and eps in x_t.
        snr: signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)``; infinite at 0.
        beta_tilde: variance of q(x_{t-1} | x_t, x_0); 0 at t = 1.
        config: what ``Schedule.from_config`` needs to build the same schedule again.

    Source: Ho, Jain, Abbeel (2020), section 2.
    """

    def __init__(self, beta: Tensor, config: dict | None = None):
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
        if beta.ndim != 1 or len(beta) == 0:
            raise ValueError(f"beta must be a list of T >= 1 numbers, one per step; got shape {tuple(beta.shape)}.")
        bad = ~((beta > 0) & (beta < 1))
        if bad.any():
            t = int(bad.nonzero()[0, 0]) + 1
            raise ValueError(
                f"beta must lie strictly between 0 and 1 at every step; got {float(beta[t - 1])} at t = {t}. "
                "A step with beta = 1 would erase the data at once: use more steps or a smaller beta."
            )
        self.T = len(beta)
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.signal = self.alpha_bar.sqrt()
        self.noise = (1 - self.alpha_bar).sqrt()
        self.snr = self.alpha_bar / (1 - self.alpha_bar)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.beta_tilde = torch.zeros_like(self.beta)
        self.beta_tilde[1:] = ((1 - before) / (1 - self.alpha_bar) * self.beta)[1:]
        self.config = config or {"name": "custom", "beta": beta.tolist()}
        self._copies: dict = {}

    @classmethod
    def linear(cls, T: int = 1000, beta_1: float | None = None, beta_T: float | None = None) -> Schedule:
        """beta rises linearly from beta_1 to beta_T.

        The defaults are 0.1 / T and 20 / T: the paper's 1e-4 and 0.02 at T = 1000, where alpha_bar_T is 4.0e-5. With
        more steps it stays near that (at most 4.4e-5), with fewer it falls: 2.0e-5 at T = 100, 2.4e-7 at T = 25.

        Source: Ho, Jain, Abbeel (2020), section 4.
        """
        T = _positive_int("T", T)
        if beta_T is None and T <= 20:
            raise ValueError(
                f"the linear schedule scaled to T = {T} would end at beta = {20 / T:g}, which is not below 1. "
                "Use T > 20, or give beta_1 and beta_T yourself."
            )
        beta_1 = 0.1 / T if beta_1 is None else float(beta_1)
        beta_T = 20 / T if beta_T is None else float(beta_T)
        beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
        return cls(beta, {"name": "linear", "T": T, "beta_1": beta_1, "beta_T": beta_T})

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, beta_max: float = 0.999, snr_scale: float = 1.0) -> Schedule:
        """alpha_bar falls as a squared cosine; beta is clipped at beta_max.

        ``snr_scale`` multiplies every signal-to-noise ratio: below 1, images are covered earlier. Images with large
        even areas need that, since neighbouring pixels show the same colour, and their mean is seen through more noise.

        Source: Nichol and Dhariwal (2021), section 3.2; for snr_scale Hoogeboom, Heek, Salimans (2023), section 3.1.
        """
        T = _positive_int("T", T)
        if not s >= 0:
            raise ValueError(f"the offset s of the cosine schedule must be 0 or more; got {s}.")
        if not 0 < beta_max < 1:
            raise ValueError(f"beta_max must lie strictly between 0 and 1; got {beta_max}.")
        if not 0 < snr_scale < math.inf:
            raise ValueError(f"snr_scale must be above 0; got {snr_scale}.")
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
        if snr_scale != 1:
            f = f / f[0]
            f = snr_scale * f / (snr_scale * f + 1 - f)
        beta = (1 - f[1:] / f[:-1]).clamp(max=beta_max)
        return cls(beta, {"name": "cosine", "T": T, "s": s, "beta_max": beta_max, "snr_scale": snr_scale})

    @classmethod
    def from_config(cls, config: dict) -> Schedule:
        """The schedule that a checkpoint's ``config`` describes."""
        arguments = dict(config)
        if (T := arguments.get("T", 1)) > MOST_STEPS:
            raise ValueError(f"T must be at most {MOST_STEPS:,}; got {T}.")
        match arguments.pop("name", None):
            case "linear":
                return cls.linear(**arguments)
            case "cosine":
                return cls.cosine(**arguments)
            case "custom":
                return cls(torch.tensor(arguments["beta"], dtype=torch.float64))
            case name:
                raise ValueError(f"unknown schedule {name!r}; known are 'linear', 'cosine' and 'custom'.")

    def __repr__(self) -> str:
        return f"Schedule({self.config['name']}, T={self.T}, alpha_bar_T={float(self.alpha_bar[-1]):.3g})"

    def check(self, t: int | Tensor, low: int = 1) -> None:
        """Raise ValueError unless every t is a whole number in low..T.

        Tensors on an accelerator are not looked at: that would stall it at every step.
        """
        if isinstance(t, Tensor):
            if t.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"t must hold whole numbers (torch.int64); got {t.dtype}.")
            if t.device.type != "cpu" or t.numel() == 0:
                return
            first, last = int(t.min()), int(t.max())
        else:
            try:
                first = last = operator.index(t)
            except TypeError:
                raise ValueError(f"t must be a whole number in {low}..{self.T}; got {t!r}.") from None
        if first < low or last > self.T:
            wrong = first if first < low else last
            raise ValueError(f"t must lie in {low}..{self.T}, counted as in the paper; got {wrong}.")

    def at(self, table: str, t: int | Tensor, like: Tensor) -> Tensor:
        """Entries t of the named table, in the dtype and on the device of ``like``, shaped to multiply it.

        t is an int or an integer tensor of shape (B,); the result has shape () or (B, 1, ..., 1).
        """
        self.check(t, low=0)
        if not like.is_floating_point():
            raise ValueError(f"images and noise must be floating-point tensors; got {like.dtype}.")
        key = table, like.device, like.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # the copy must serve a gradient later, too
                self._copies[key] = getattr(self, table).to(like.dtype).to(like.device)
        values = self._copies[key][t]
        if values.ndim == 0:
            return values
        if values.shape != like.shape[:1]:
            raise ValueError(
                f"t must be one whole number or one per image: {like.shape[0]} images, t of shape {tuple(t.shape)}."
            )
        return values.view(-1, *[1] * (like.ndim - 1))

    def q_step(self, x_prev: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """One noising step: a draw of q(x_t | x_{t-1}), given standard normal eps of the shape of x_prev.

        Source: Ho, Jain, Abbeel (2020), equation 2.
        """
        self.check(t)
        _same_shape("x_prev", x_prev, "eps", eps)
        beta = self.at("beta", t, x_prev)
        return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps

    def q_sample(self, x0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """All t steps at once: a draw of q(x_t | x_0), given standard normal eps of the shape of x0.

        Source: Ho, Jain, Abbeel (2020), equation 4.
        """
        self.check(t)
        _same_shape("x0", x0, "eps", eps)
        return self.at("signal", t, x0) * x0 + self.at("noise", t, x0) * eps

    def between(self, t: int, s: int) -> tuple[float, float]:
        """beta and beta_tilde of the one long step between s and t, for 0 <= s < t <= T.

        For s = t - 1 they are beta_t and beta_tilde_t; in general the step s -> t multiplies the signal by
        ``sqrt(alpha_bar_t / alpha_bar_s)``, so its beta is one minus that ratio.
        """
        self.check(t)
        self.check(s, low=0)
        if not s < t:
            raise ValueError(f"a step goes from t to an earlier s < t; got t = {t}, s = {s}.")
        if s == t - 1:
            return float(self.beta[t]), float(self.beta_tilde[t])
        beta = 1 - float(self.alpha_bar[t] / self.alpha_bar[s])
        return beta, float((1 - self.alpha_bar[s]) / (1 - self.alpha_bar[t])) * beta

    def posterior_coefficients(self, t: int, s: int | None = None) -> tuple[float, float, float]:
        """(c0, ct, variance) of q(x_s | x_t, x_0), whose mean is ``c0 * x0 + ct * x_t``; s is t - 1 if not given.

        Source: Ho, Jain, Abbeel (2020), equation 7.
        """
        s = t - 1 if s is None else s
        beta, beta_tilde = self.between(t, s)
        alpha_bar_t, alpha_bar_s = float(self.alpha_bar[t]), float(self.alpha_bar[s])
        c0 = math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
        ct = math.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        return c0, ct, beta_tilde

    def posterior(self, x_t: Tensor, x0: Tensor, t: int, s: int | None = None) -> tuple[Tensor, float]:
        """Mean (shape of x_t) and variance of q(x_s | x_t, x_0); s is t - 1 if not given."""
        _same_shape("x_t", x_t, "x0", x0)
        c0, ct, variance = self.posterior_coefficients(t, s)
        return c0 * x0 + ct * x_t, variance

    @property
    def posterior_log_variance(self) -> Tensor:
        """log beta_tilde, shape (T + 1,); entry 1 repeats entry 2, since beta_tilde_1 = 0 has no logarithm.

        Entry 0 is not a step and is NaN. Source: the released code of Ho, Jain, Abbeel (2020).
        """
        if self.T < 2:
            raise ValueError("the posterior's log variance needs a schedule of at least 2 steps; this one has 1.")
        table = self.beta_tilde.log()
        table[0], table[1] = math.nan, table[2]
        return table


def _positive_int(name: str, value: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number; got {value!r}.") from None
    if whole < 1:
        raise ValueError(f"{name} must be 1 or more; got {whole}.")
    return whole


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
