"""Models and images small enough to train in a blink."""

import torch
from torch import Tensor, nn

from ddpm_lib import Denoiser, Schedule, UNet


def draw_parameters(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Draw every parameter anew, so that no layer hides behind weights that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (fan_in**-0.5 if parameter.ndim > 1 else scale))
    return module


def tiny_unet(**options) -> UNet:
    """A U-Net of a few thousand parameters on 4 x 4 grey images, attention included."""
    settings = {
        "image_size": 4,
        "in_channels": 1,
        "base_channels": 4,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (2,),
        "dropout": 0.0,
        "groups": 2,
    }
    return UNet(**settings | options)


def tiny_denoiser(schedule: Schedule | None = None, predicts: str = "eps", **options) -> Denoiser:
    network = draw_parameters(tiny_unet(**options))
    return Denoiser(network, Schedule.linear(30) if schedule is None else schedule, predicts)


def tiny_images(n: int = 10) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
