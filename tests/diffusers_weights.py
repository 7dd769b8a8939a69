"""Weights of a ddpm_lib UNet in the names of diffusers' UNet2DModel, and the twin network they fit."""

from diffusers import UNet2DModel
from torch import Tensor

from ddpm_lib import UNet
from ddpm_lib.unet import Stage


def diffusers_twin(network: UNet) -> UNet2DModel:
    """An untrained UNet2DModel of the same architecture, set up as google/ddpm-cifar10-32 is.

    ``attention_head_dim=None`` means one head; the default, 8 channels per head, is another network. The first channel
    multiplier must be 1, since diffusers' stem is as wide as its first level.
    """
    config = network.config
    multipliers, resolutions = config["channel_multipliers"], config["attention_resolutions"]
    attends = [config["image_size"] >> level in resolutions for level in range(len(multipliers))]
    return UNet2DModel(
        sample_size=config["image_size"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"],
        block_out_channels=[config["base_channels"] * m for m in multipliers],
        layers_per_block=config["blocks_per_level"],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        attention_head_dim=None,
        norm_num_groups=config["groups"],
        norm_eps=1e-6,
        dropout=config["dropout"],
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
    )


def to_diffusers(network: UNet) -> dict[str, Tensor]:
    """The state of a UNet without classes under diffusers' names.

    diffusers counts its up blocks from the coarsest level, as this network does; its down blocks from the finest.
    """
    names = {
        "stem": "conv_in",
        "time.linear_1": "time_embedding.linear_1",
        "time.linear_2": "time_embedding.linear_2",
        "norm": "conv_norm_out",
        "head": "conv_out",
    }
    names |= _stage("middle.0", "mid_block", 0, attends=True) | _stage("middle.1", "mid_block", 1, attends=False)
    for side, sampler in (("down", "downsamplers"), ("up", "upsamplers")):
        level = block = 0
        for i, part in enumerate(getattr(network, side)):
            if isinstance(part, Stage):
                names |= _stage(f"{side}.{i}", f"{side}_blocks.{level}", block, hasattr(part.attention, "query"))
                block += 1
            else:
                names[f"{side}.{i}.conv"] = f"{side}_blocks.{level}.{sampler}.0.conv"
                level, block = level + 1, 0
    state = {}
    for name, value in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        is_projection = ".attention." in name and value.ndim == 4
        state[f"{names[module]}.{kind}"] = value[:, :, 0, 0] if is_projection else value
    return state


def _stage(ours: str, theirs: str, block: int, attends: bool) -> dict[str, str]:
    residual = {
        "norm_1": "norm1",
        "conv_1": "conv1",
        "embedding": "time_emb_proj",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "shortcut": "conv_shortcut",
    }
    names = {f"{ours}.residual.{a}": f"{theirs}.resnets.{block}.{b}" for a, b in residual.items()}
    if attends:
        attention = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
        names |= {f"{ours}.attention.{a}": f"{theirs}.attentions.{block}.{b}" for a, b in attention.items()}
    return names
