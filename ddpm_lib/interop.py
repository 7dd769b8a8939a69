"""Models to and from other programs: diffusers' folders, the PyTorch port of the paper's weights, ONNX files.

Reading and writing diffusers' folders needs no diffusers. One module holds all three because they share what is hard
about them: other names for the same tensors, other words for the same settings, and files that are whole or not there.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import CheckpointError, denoiser_config, write_file
from .prediction import Denoiser
from .sampling import VARIANCES
from .schedule import Schedule
from .unet import EPS, Stage, UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.30.0"  # whose layout the written folders follow; later versions read it
MOST_STEPS = 1_000_000  # a longer schedule is a damaged number, not a plan

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES = {"beta": "fixed_large", "beta_tilde": "fixed_small"}

# What every UNet is, in the words of UNet2DModel.
UNET = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,  # one head
    "attn_norm_num_groups": None,  # as many as norm_num_groups
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,  # right and bottom only
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,  # frequencies over half - 1
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": EPS,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,  # four times the base channels
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
UNET_KEYS = {
    *UNET,
    "block_out_channels",
    "down_block_types",
    "dropout",
    "in_channels",
    "layers_per_block",
    "norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",  # of another time embedding
    "out_channels",
    "sample_size",
    "up_block_types",
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "clip_sample_range": 1.0,
    "predict_epsilon": True,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}

# What diffusers takes where a file is silent, if that is something else.
SILENT = {
    "_class_name": None,
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}

# Other names for the parts of a UNet. In a template, {level} counts from the finest, {turn} in order of running,
# {block} within its level, and {number} is block + 1.
DIFFUSERS_NAMES = {
    "stem": "conv_in",
    "time.linear_1": "time_embedding.linear_1",
    "time.linear_2": "time_embedding.linear_2",
    "label": "class_embedding",
    "down.residual": "down_blocks.{turn}.resnets.{block}",
    "down.attention": "down_blocks.{turn}.attentions.{block}",
    "down.conv": "down_blocks.{turn}.downsamplers.0.conv",
    "middle.residual": "mid_block.resnets.{block}",
    "middle.attention": "mid_block.attentions.{block}",
    "up.residual": "up_blocks.{turn}.resnets.{block}",
    "up.attention": "up_blocks.{turn}.attentions.{block}",
    "up.conv": "up_blocks.{turn}.upsamplers.0.conv",
    "norm": "conv_norm_out",
    "head": "conv_out",
    "residual.norm_1": "norm1",
    "residual.conv_1": "conv1",
    "residual.embedding": "time_emb_proj",
    "residual.norm_2": "norm2",
    "residual.conv_2": "conv2",
    "residual.shortcut": "conv_shortcut",
    "attention.norm": "group_norm",
    "attention.query": "to_q",
    "attention.key": "to_k",
    "attention.value": "to_v",
    "attention.out": "to_out.0",
}
DIFFUSERS_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PORT_NAMES = {
    "stem": "conv_in",
    "time.linear_1": "temb.dense.0",
    "time.linear_2": "temb.dense.1",
    "down.residual": "down.{level}.block.{block}",
    "down.attention": "down.{level}.attn.{block}",
    "down.conv": "down.{level}.downsample.conv",
    "middle.residual": "mid.block_{number}",
    "middle.attention": "mid.attn_{number}",
    "up.residual": "up.{level}.block.{block}",
    "up.attention": "up.{level}.attn.{block}",
    "up.conv": "up.{level}.upsample.conv",
    "norm": "norm_out",
    "head": "conv_out",
    "residual.norm_1": "norm1",
    "residual.conv_1": "conv1",
    "residual.embedding": "temb_proj",
    "residual.norm_2": "norm2",
    "residual.conv_2": "conv2",
    "residual.shortcut": "nin_shortcut",
    "attention.norm": "norm",
    "attention.query": "q",
    "attention.key": "k",
    "attention.value": "v",
    "attention.out": "proj_out",
}


# To diffusers


def to_diffusers(denoiser: Denoiser, folder: str | Path, *, variance: str = "beta", clip: bool = True) -> None:
    """Write a folder that ``diffusers.DDPMPipeline.from_pretrained(folder)`` runs.

    The folder is written beside its destination and renamed, so that nobody ever sees half of it. A network with
    classes becomes a UNet2DModel with classes + 1 ``class_labels``, the last for "no label"; DDPMPipeline itself
    passes no labels, so such a model is run by calling the UNet2DModel.

    Args:
        denoiser: with a UNet.
        folder: a new or empty folder.
        variance, clip: how the pipeline is to sample, as in ``sample``.

    Raises:
        ValueError: diffusers has no such model; the message says what it has.
        FileExistsError: something lies at ``folder``.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be 'beta' or 'beta_tilde'; got {variance!r}.")
    configs = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": _unet_config(denoiser_config(denoiser)["network"]),
        "scheduler/scheduler_config.json": _scheduler_config(denoiser, variance, clip),
    }
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: remove it, or choose another name.")
    with _whole_folder(folder.absolute()) as temporary:
        for name, config in configs.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"_diffusers_version": DIFFUSERS_VERSION} | config, indent=2, sort_keys=True)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
        save_file(_diffusers_state(denoiser.network), temporary / "unet" / WEIGHTS, {"format": "pt"})


def _unet_config(config: dict) -> dict:
    base, multipliers = config["base_channels"], config["channel_multipliers"]
    if multipliers[0] != 1:
        raise ValueError(
            f"diffusers' first level is as wide as its stem: the first channel multiplier must be 1; got {multipliers}."
        )
    if base == 2:
        raise ValueError("diffusers cannot embed the step in 2 channels: base_channels must be 4 or more.")
    attends = [config["image_size"] >> level in config["attention_resolutions"] for level in range(len(multipliers))]
    return UNET | {
        "sample_size": config["image_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "block_out_channels": [base * m for m in multipliers],
        "layers_per_block": config["blocks_per_level"],
        "down_block_types": _block_types("Down", attends),
        "up_block_types": _block_types("Up", attends[::-1]),
        "dropout": config["dropout"],
        "norm_num_groups": config["groups"],
        "num_class_embeds": None if config["classes"] is None else config["classes"] + 1,
    }


def _block_types(side: str, attends: list[bool]) -> list[str]:
    return [f"Attn{side}Block2D" if attend else f"{side}Block2D" for attend in attends]


def _scheduler_config(denoiser: Denoiser, variance: str, clip: bool) -> dict:
    if denoiser.predicts not in PREDICTION_TYPES:
        raise ValueError(
            f"diffusers' DDPMScheduler reads {', '.join(PREDICTION_TYPES)}; this network predicts {denoiser.predicts}."
        )
    schedule = denoiser.schedule
    if schedule.config["name"] == "linear":
        beta = {"beta_start": schedule.config["beta_1"], "beta_end": schedule.config["beta_T"]}
        beta |= {"beta_schedule": "linear", "trained_betas": None}
    elif schedule.config == Schedule.cosine(schedule.T).config:
        beta = {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    else:
        beta = {"trained_betas": schedule.beta[1:].tolist()}
    return beta | {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.T,
        "prediction_type": PREDICTION_TYPES[denoiser.predicts],
        "variance_type": VARIANCE_TYPES[variance],
        "clip_sample": bool(clip),
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",  # fewer steps than T still start at T
    }


def _diffusers_state(network: UNet) -> dict[str, Tensor]:
    """The network's tensors under diffusers' names; its 1x1 convolutions in attention are linear layers there."""
    names = _names(network, DIFFUSERS_NAMES)
    return {
        names[name]: (value[:, :, 0, 0] if _is_projection(name, value) else value).detach().cpu().contiguous()
        for name, value in network.state_dict().items()
    }


# From diffusers


def from_diffusers(folder: str | Path) -> Denoiser:
    """The denoiser in a diffusers folder, in evaluation mode, with float32 weights.

    Read are pipeline folders (``unet/`` and ``scheduler/``), flat ones as the paper's converted weights are published
    (``config.json``, ``scheduler_config.json`` and weights side by side), and a ``unet`` folder beside a ``scheduler``
    folder; attention weights under their old names too. How the folder's pipeline samples is not part of a denoiser:
    see ``diffusers_sampling``.

    The last of diffusers' ``num_class_embeds`` is read as "no label"; in a model trained elsewhere it may be one more
    class, and is then to be asked for by its number.

    Raises:
        CheckpointError: a file is missing or damaged, or describes something that a UNet is not; the message names
            the key, its value and what is supported.
    """
    schedule, predicts, _ = _read_scheduler(folder)
    path = _find(folder, "config.json", "unet", ".")
    options = _unet_options(_read_json(path), str(path))
    weights = path.with_name(WEIGHTS)
    if not weights.is_file() and weights.with_suffix(".bin").is_file():
        raise CheckpointError(
            f"{path.parent} holds its weights as a pickle only, which may run code and is not read. If you trust it, "
            f"convert it once with diffusers: UNet2DModel.from_pretrained({str(path.parent)!r}, "
            f"use_safetensors=False).save_pretrained({str(path.parent)!r})"
        )
    found = _read_tensors(weights)
    tensors = {_new_name(name): value for name, value in found.items()}
    if len(tensors) < len(found):
        raise CheckpointError(f"{weights} holds some attention weights twice, under their old and their new names.")
    return Denoiser(_network(options, tensors, DIFFUSERS_NAMES, str(weights)), schedule, predicts).eval()


def diffusers_sampling(folder: str | Path) -> dict:
    """How the pipeline in a diffusers folder samples, as options of ``sample``: its variance and its clipping.

    Raises:
        CheckpointError: as ``from_diffusers``.
    """
    return _read_scheduler(folder)[2]


def _unet_options(config: dict, where: str) -> dict:
    """The arguments of the UNet that a UNet2DModel's configuration describes."""
    settings = SILENT | {"dropout": 0.0, "num_class_embeds": None} | config

    def demand(key: str, supported: str, fits: Callable[[Any], bool]) -> Any:
        if key not in settings:
            raise CheckpointError(f"{where} lacks {key}.")
        if not fits(settings[key]):
            raise CheckpointError(_unsupported(where, {key: (settings[key], supported)}))
        return settings[key]

    _demand_fixed(settings, {"_class_name": UNET["_class_name"]}, where)
    whole = "a whole number, 1 or more"
    channels = demand("in_channels", whole, _is_whole)
    demand("out_channels", f"{channels}, as in_channels: no learned variance", lambda n: n == channels)
    size = demand("sample_size", f"{whole}, for square images", _is_side)
    widths = demand("block_out_channels", "whole multiples of the first", _are_multiples)
    blocks_of = f"DownBlock2D or AttnDownBlock2D for each of {len(widths)} levels"
    down = demand("down_block_types", blocks_of, lambda types: _are_down_blocks(types, len(widths)))
    attends = [kind == "AttnDownBlock2D" for kind in down]
    ups = _block_types("Up", attends[::-1])
    demand("up_block_types", f"{json.dumps(ups)}, the mirror image of down_block_types", lambda types: types == ups)
    groups = demand("norm_num_groups", whole, _is_whole)
    blocks = demand("layers_per_block", whole, _is_whole)
    embeds = demand("num_class_embeds", "null, 2 or more", lambda n: n is None or (_is_whole(n) and n > 1))
    dropout = demand("dropout", "a number in [0, 1)", lambda p: type(p) in (int, float) and 0 <= p < 1)

    # Defaults that are spelt out, and the other name of an activation.
    attending = {width for width, attend in zip(widths, attends) if attend} | {widths[-1]}
    same = {"attention_head_dim": attending, "attn_norm_num_groups": {groups}, "time_embedding_dim": {4 * widths[0]}}
    settings |= {key: None for key, values in same.items() if [settings.get(key)] == [*values]}
    settings |= {"act_fn": "silu"} if settings.get("act_fn") == "swish" else {}
    _demand_fixed(settings, UNET, where)
    unknown = {key: value for key, value in config.items() if key not in UNET_KEYS and not key.startswith("_")}
    if unknown:
        raise CheckpointError(_unsupported(where, {key: (value, "leaving it out") for key, value in unknown.items()}))
    side = size if _is_whole(size) else size[0]
    return {
        "image_size": side,
        "in_channels": channels,
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": blocks,
        "attention_resolutions": [side >> level for level, attend in enumerate(attends) if attend],
        "dropout": dropout,
        "groups": groups,
        "classes": None if embeds is None else embeds - 1,
    }


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_side(value: Any) -> bool:
    """n or [n, n]."""
    return _is_whole(value) or (
        isinstance(value, list) and len(value) == 2 and _is_whole(value[0]) and len({*value}) == 1
    )


def _are_multiples(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(_is_whole(width) and width % value[0] == 0 for width in value)
    )


def _are_down_blocks(value: Any, levels: int) -> bool:
    known = ("DownBlock2D", "AttnDownBlock2D")
    return isinstance(value, list) and len(value) == levels and all(kind in known for kind in value)


def _demand_fixed(settings: dict, fixed: dict, where: str) -> None:
    found = {key: settings.get(key, SILENT.get(key, value)) for key, value in fixed.items()}
    if wrong := {key: (found[key], json.dumps(value)) for key, value in fixed.items() if found[key] != value}:
        raise CheckpointError(_unsupported(where, wrong))


def _unsupported(where: str, wrong: dict[str, tuple[Any, str]]) -> str:
    items = (f"{key} = {json.dumps(value)[:200]} (supported: {good})" for key, (value, good) in wrong.items())
    return f"{where} describes a model that this library does not have: {'; '.join(items)}."


def _read_scheduler(folder: str | Path) -> tuple[Schedule, str, dict]:
    """The schedule, what the network predicts, and options of ``sample``, from a diffusers folder."""
    folder = Path(folder)
    index = folder / "model_index.json"
    if index.exists():
        _demand_fixed(_read_json(index), {"_class_name": "DDPMPipeline"}, str(index))
    path = _find(folder, "scheduler_config.json", "scheduler", ".", "../scheduler")
    config = {"clip_sample": True, "prediction_type": "epsilon", "variance_type": "fixed_small"} | _read_json(path)
    if config["clip_sample"] is False:
        config["clip_sample_range"] = SCHEDULER["clip_sample_range"]  # without effect
    _demand_fixed(config, SCHEDULER, str(path))
    variances = {other: ours for ours, other in VARIANCE_TYPES.items()} | {"fixed_small_log": "beta_tilde"}
    choices = {
        "prediction_type": {other: ours for ours, other in PREDICTION_TYPES.items()},
        "variance_type": variances,
        "clip_sample": {True: True, False: False},
    }
    chosen = []
    for key, known in choices.items():
        value = config[key]
        if not isinstance(value, str | bool) or value not in known:
            raise CheckpointError(_unsupported(str(path), {key: (value, ", ".join(map(json.dumps, known)))}))
        chosen.append(known[value])
    try:
        schedule = _read_schedule(config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} describes no schedule: {error}") from error
    predicts, variance, clip = chosen
    return schedule, predicts, {"variance": variance, "clip": clip}


def _read_schedule(config: dict) -> Schedule:
    T = config.get("num_train_timesteps", 1000)
    if not _is_whole(T) or T > MOST_STEPS:
        raise ValueError(f"num_train_timesteps must be a whole number in 1..{MOST_STEPS:,}; got {T!r}.")
    if (beta := config.get("trained_betas")) is not None:
        schedule = Schedule(torch.tensor(beta, dtype=torch.float64))
        if schedule.T != T:
            raise ValueError(f"trained_betas has {schedule.T} entries and num_train_timesteps = {T}.")
        return schedule
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if isinstance(start, str) or isinstance(end, str):
        raise TypeError(f"beta_start = {start!r} and beta_end = {end!r} must be numbers.")
    match config.get("beta_schedule", "linear"):
        case "linear":
            return Schedule.linear(T, start, end)
        case "scaled_linear":
            return Schedule(torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64).square())
        case "squaredcos_cap_v2":
            return Schedule.cosine(T)
        case other:
            raise ValueError(
                f"beta_schedule = {other!r} is not supported, only 'linear', 'scaled_linear' and 'squaredcos_cap_v2'; "
                "any other can be given as trained_betas."
            )


def _new_name(name: str) -> str:
    """diffusers' present name of a tensor: its attention layers had other names until version 0.17."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{DIFFUSERS_OLD_NAMES[match[2]]}.",
        name,
    )


# The PyTorch port of the paper's released weights


def from_pytorch_diffusion(path: str | Path, image_size: int | None = None) -> Denoiser:
    """The paper's own weights, as the PyTorch port ``pytorch_diffusion`` names them, in evaluation mode.

    The port publishes pickles; turn one into safetensors once, if you trust it:
    ``safetensors.torch.save_file(torch.load("model.ckpt", weights_only=True), "model.safetensors")``.

    The architecture is read off the shapes, except for two things that no shape shows: the 32 groups of every model
    of the port, and the size of the images.

    Args:
        path: a safetensors file.
        image_size: of the training images. If None, the size at which the one level with attention is 16 x 16, as in
            every model of the paper: 32 for CIFAR-10, 256 for CelebA-HQ and LSUN.

    Raises:
        CheckpointError: damaged, or not such a model.

    Source: github.com/pesser/pytorch_diffusion; Ho, Jain, Abbeel (2020), appendix B.
    """
    tensors = _read_tensors(path)
    try:
        base, channels = tensors["conv_in.weight"].shape[:2]
        level = max(int(match[1]) for name in tensors if (match := re.match(r"down\.(\d+)\.", name)))
        widths = [tensors[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(level + 1)]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the port's tensors: {error}.") from error
    attending = [level for level in range(len(widths)) if f"down.{level}.attn.0.q.weight" in tensors]
    if image_size is None:
        if len(attending) != 1:
            raise CheckpointError(f"{path} has attention at {len(attending)} levels, not one: give image_size.")
        image_size = 16 << attending[0]
    options = {
        "image_size": image_size,
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks_per_level": sum(
            re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in tensors
        ),
        "attention_resolutions": [image_size >> level for level in attending],
        "dropout": 0.0,
    }
    return Denoiser(_network(options, tensors, PORT_NAMES, str(path)), Schedule.linear(1000)).eval()


# What both readers share


def _names(network: UNet, words: dict[str, str]) -> dict[str, str]:
    """Other names of all the network's tensors: ours -> theirs."""
    places = {}
    for side in ("down", "middle", "up"):
        turn = block = 0
        for i, part in enumerate(getattr(network, side)):
            level = network.halvings - turn if side == "up" else turn
            places[side, str(i)] = {"level": level, "turn": turn, "block": block, "number": block + 1}
            turn, block = (turn, block + 1) if isinstance(part, Stage) else (turn + 1, 0)
    names = {}
    for name in network.state_dict():
        match name.split("."):
            case [("down" | "middle" | "up") as side, i, kind, *layer, parameter]:
                theirs = [words[f"{side}.{kind}"].format(**places[side, i])]
                theirs += [words[f"{kind}.{layer[0]}"]] if layer else []
            case [*layer, parameter]:
                theirs = [words[".".join(layer)]]
        names[name] = ".".join([*theirs, parameter])
    return names


def _network(options: dict, tensors: dict[str, Tensor], words: dict[str, str], where: str) -> UNet:
    """The UNet with these options, holding these tensors, which must have exactly its names (by words) and shapes."""
    try:
        blocks = len(options["channel_multipliers"]) * options["blocks_per_level"]
        if blocks > len(tensors):
            raise ValueError(f"{blocks} residual blocks on the way down need more than {len(tensors)} tensors.")
        with torch.device("meta"):  # shapes alone: a damaged number must not fill the memory
            plan = UNet(**options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} has a configuration that no network of this library has: {error}") from error
    names, state = _names(plan, words), {}
    for name, like in plan.state_dict().items():
        value = tensors.get(names[name])
        if value is not None and _is_projection(name, like) and value.ndim == 2:
            value = value[:, :, None, None]
        if value is None or value.shape != like.shape:
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise CheckpointError(
                f"{where} does not fit its configuration: {names[name]!r} {found}; needed is {tuple(like.shape)}."
            )
        if not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{where} is damaged: {names[name]!r} holds other things than finite numbers.")
        state[name] = value
    if unknown := sorted(tensors.keys() - names.values()):
        raise CheckpointError(
            f"{where} does not fit its configuration: it has no place for {len(unknown)} tensors, like {unknown[0]!r}."
        )
    network = UNet(**options)
    network.load_state_dict(state)
    return network


def _is_projection(name: str, value: Tensor) -> bool:
    """Whether this is a 1x1 convolution of attention, given our name for it."""
    return ".attention." in name and value.ndim == 4


def _find(folder: str | Path, name: str, *places: str) -> Path:
    paths = [Path(folder) / place / name for place in places]
    for path in paths:
        if path.is_file():
            return path
    raise CheckpointError(f"there is no {name} in {folder} or where else diffusers puts it ({', '.join(places)}).")


def _read_json(path: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not a value of JSON")

    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): damaged or cut short?") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(config).__name__}.")
    return config


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): damaged or cut short?") from error


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the destination, flushed and renamed to it at the end: whole there, or not there at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*.*"):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# To ONNX


class _Exported(nn.Module):
    """The network as an ONNX file holds it: steps counted from 1, labels not looked at."""

    def __init__(self, network: UNet):
        super().__init__()
        self.network = copy.deepcopy(network).cpu().float().eval()
        if network.label is not None:  # the check of the labels depends on their values, which no graph knows
            self.network._label_embedding = lambda label, x: self.network.label(label)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(x_t, t - 1, label)


def export_onnx(denoiser: Denoiser, path: str | Path) -> None:
    """Write the network to one ONNX file, opset 18, for images of its image_size and batches of any size.

    Its inputs are ``x_t`` (B, C, H, W) float32, ``t`` (B,) int64 counted from 1, and, if the network has classes,
    ``label`` (B,) int64 in 0..classes, where ``classes`` stands for no label. Its output is ``prediction`` (B, C, H, W)
    of the denoiser's own kind. The file's metadata holds what sampling needs besides: T, predicts, alpha_bar (T + 1
    numbers, JSON), schedule (JSON), value_range, classes, no_label. Weights are float32.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the denoiser's network is not a UNet.
    """
    config = denoiser_config(denoiser)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs two more packages: pip install onnx onnxscript") from error
    network, schedule = config["network"], denoiser.schedule
    B, C, size = 2, network["in_channels"], network["image_size"]
    inputs = {"x_t": torch.zeros(B, C, size, size), "t": torch.ones(B, dtype=torch.int64)}
    metadata = {
        "format": "ddpm_lib onnx 1",
        "T": str(schedule.T),
        "predicts": denoiser.predicts,
        "schedule": json.dumps(config["schedule"]),
        "alpha_bar": json.dumps(schedule.alpha_bar.tolist()),
        "value_range": "[-1, 1]",
    }
    if network["classes"] is not None:
        inputs["label"] = torch.zeros(B, dtype=torch.int64)
        metadata |= {"classes": str(network["classes"]), "no_label": str(network["classes"])}
    with _silence():
        program = torch.onnx.export(
            _Exported(denoiser.network).eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["prediction"],
            dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in inputs},
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props.update(metadata)
        write_file(Path(path), program.model_proto.SerializeToString())


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log lines of the exporter, whose deprecations are not the caller's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
