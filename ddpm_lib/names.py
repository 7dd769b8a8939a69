"""The tensors of a UNet under the names that other programs give them, and a UNet built from such a file."""

from __future__ import annotations

from torch import Tensor

from .checkpoint import CheckpointError, check_fit, plan_network
from .unet import UNet

# {level} counts from the finest, {turn} in the order of running, {block} within its level; {number} is block + 1.
TABLE = """
ours                diffusers                               port
stem                conv_in                                 conv_in
time.linear_1       time_embedding.linear_1                 temb.dense.0
time.linear_2       time_embedding.linear_2                 temb.dense.1
label               class_embedding                         -
down.residual       down_blocks.{turn}.resnets.{block}      down.{level}.block.{block}
down.attention      down_blocks.{turn}.attentions.{block}   down.{level}.attn.{block}
down.conv           down_blocks.{turn}.downsamplers.0.conv  down.{level}.downsample.conv
middle.residual     mid_block.resnets.{block}               mid.block_{number}
middle.attention    mid_block.attentions.{block}            mid.attn_{number}
up.residual         up_blocks.{turn}.resnets.{block}        up.{level}.block.{block}
up.attention        up_blocks.{turn}.attentions.{block}     up.{level}.attn.{block}
up.conv             up_blocks.{turn}.upsamplers.0.conv      up.{level}.upsample.conv
norm                conv_norm_out                           norm_out
head                conv_out                                conv_out
residual.norm_1     norm1                                   norm1
residual.conv_1     conv1                                   conv1
residual.embedding  time_emb_proj                           temb_proj
residual.norm_2     norm2                                   norm2
residual.conv_2     conv2                                   conv2
residual.shortcut   conv_shortcut                           nin_shortcut
attention.norm      group_norm                              norm
attention.query     to_q                                    q
attention.key       to_k                                    k
attention.value     to_v                                    v
attention.out       to_out.0                                proj_out
"""


def names(network: UNet, program: str) -> dict[str, str]:
    """What a program, 'diffusers' or 'port', calls each tensor of the network: ours -> theirs."""
    header, *rows = (line.split() for line in TABLE.strip().splitlines())
    words = {row[0]: row[header.index(program)] for row in rows}
    blocks = network.config["blocks_per_level"]
    parts = {"down": blocks + 1, "middle": 2, "up": blocks + 2}  # of each level, its down- or upsampling included
    found = {}
    for name in network.state_dict():
        match name.split("."):
            case [("down" | "middle" | "up") as side, i, kind, *layer, parameter]:
                turn, block = divmod(int(i), parts[side])
                level = network.halvings - turn if side == "up" else turn
                theirs = [words[f"{side}.{kind}"].format(level=level, turn=turn, block=block, number=block + 1)]
                theirs += [words[f"{kind}.{layer[0]}"]] if layer else []
            case [*layer, parameter]:
                theirs = [words[".".join(layer)]]
        found[name] = ".".join([*theirs, parameter])
    return found


def build(options: dict, tensors: dict[str, Tensor], program: str, where: str) -> UNet:
    """The UNet with these options that holds a program's tensors, which must be all of its own and no others.

    Raises:
        CheckpointError: there is no such network, or these are not its tensors.
    """
    try:
        plan = plan_network(options, len(tensors))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    theirs, ours = names(plan, program), plan.state_dict()
    tensors = {name: squeezed(value) for name, value in tensors.items()}
    check_fit({theirs[name]: squeezed(value) for name, value in ours.items()}, tensors, where)
    network = UNet(**plan.config)
    network.load_state_dict({name: tensors[theirs[name]].view(value.shape) for name, value in ours.items()})
    return network


def squeezed(weight: Tensor) -> Tensor:
    """The weight of a linear layer for that of a 1x1 convolution: what one program has as this, another has as that."""
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight
