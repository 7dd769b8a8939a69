"""What training makes small: the simple loss of the paper, and one in which all noise levels speak about as loudly."""

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


def capped_loss(
    denoiser: Denoiser, x0: Tensor, t: int | Tensor, eps: Tensor, condition: Tensor | None = None, *, cap: float
) -> Tensor:
    """Squared error of the network's x0 times min(sqrt(SNR), cap), one number per image: shape (B,), mean over entries.

    SNR is (signal / noise)^2. Weight 1 would be the loss of x0, SNR that of eps; this is half-way between, about one
    over the error itself, so that no level of noise outshouts the others.

    Source: Karras et al. (2024), Analyzing and improving the training dynamics of diffusion models, for weights that
    even the levels out, there learned; Hang et al. (2023), section 3.4, for a cap.
    """
    guess = denoiser(denoiser.schedule.q_sample(x0, t, eps), t, condition)
    weight = (guess.signal / guess.noise).clamp(max=cap)
    return (weight * (guess.x0 - x0).square()).flatten(1).mean(1)
