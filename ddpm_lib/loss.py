"""The simple loss of the paper."""

from torch import Tensor

from .prediction import Denoiser, Prediction


def simple_loss(
    denoiser: Denoiser, x0: Tensor, t: int | Tensor, eps: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Squared error of what the network predicts, one number per image: shape (B,), mean over the image's entries.

    x0 and eps have shape (B, ...), t holds steps in 1..T. For a network that predicts eps this is L_simple.

    Source: Ho, Jain, Abbeel (2020), equation 14.
    """
    x_t = denoiser.schedule.q_sample(x0, t, eps)
    guess = denoiser(x_t, t, condition)
    truth = Prediction(x_t, x0, eps, guess.signal, guess.noise)
    error = getattr(guess, denoiser.predicts) - getattr(truth, denoiser.predicts)
    return error.square().flatten(1).mean(1)
