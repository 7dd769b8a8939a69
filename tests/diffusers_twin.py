"""diffusers' own model of the architecture and the weights of a UNet, and the waves that make both exact."""

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import nn

from ddpm_lib import UNet, interop


def diffusers_twin(network: UNet) -> UNet2DModel:
    """The same network, built by diffusers."""
    theirs = UNet2DModel.from_config(interop._unet_config(network.config)).to(network.head.weight.dtype)
    theirs.load_state_dict(interop._diffusers_state(network))
    return theirs


class ExactWaves(nn.Module):
    """Sines, then cosines, in float64: diffusers' ``time_proj`` without its float32."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.frequency = torch.from_numpy(10_000.0 ** (-np.arange(half) / (half - 1)))

    def forward(self, steps):
        angle = steps[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def in_float64(ours: UNet, theirs: UNet2DModel | None = None):
    """Both networks in float64, with the same exact waves."""
    ours.double().time.frequency = ExactWaves(ours.config["base_channels"]).frequency
    if theirs is None:
        return ours
    theirs.double().time_proj = ExactWaves(ours.config["base_channels"])
    return ours, theirs
