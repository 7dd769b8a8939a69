"""Models to and from diffusers' folders, which needs no diffusers: other names for the same tensors and settings.

What is written follows from the model (``_unet_config``, ``_scheduler_config``). What is read must be what would have
been written, up to the keys that diffusers lets be left out or spelt in two ways.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import CheckpointError, denoiser_config, read_tensors
from .names import build, names, squeezed
from .prediction import Denoiser
from .sampling import VARIANCES
from .schedule import MOST_STEPS, Schedule
from .unet import EPS, UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.30.0"  # whose layout the written folders follow; later versions read it

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES = {"beta": "fixed_large", "beta_tilde": "fixed_small"}

# What every UNet is, in the words of UNet2DModel, and every way of sampling, in those of DDPMScheduler.
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
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}

# What diffusers takes where a file is silent, if that is something else.
SILENT_UNET = {
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
}
SILENT_SCHEDULER = {"clip_sample": True, "prediction_type": "epsilon", "variance_type": "fixed_small"}
IGNORED = {"num_train_timesteps"}  # of another time embedding
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # until diffusers 0.17


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
    if config["patch_size"] != 1:
        raise ValueError(
            f"diffusers' UNet2DModel has no patches: patch_size must be 1; got {config['patch_size']}. Export to ONNX."
        )
    if config["text_channels"] is not None or config["image_channels"] is not None:
        raise ValueError("diffusers' UNet2DModel is told what to draw by a class only, not by a text or an image.")
    if config["lean"]:
        raise ValueError("diffusers' UNet2DModel is not lean: it has one block more on the way up than down.")
    if config["coordinates"]:
        raise ValueError("diffusers' UNet2DModel sees no coordinates.")
    if config["heads"]:
        raise ValueError("diffusers' UNet2DModel does not normalise queries and keys: heads must be None.")
    if config["adaptive_norm"]:
        raise ValueError("diffusers' UNet2DModel has no such network: its adaptive norm lacks one in the middle block.")
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
    choices = {
        "num_train_timesteps": schedule.T,
        "prediction_type": PREDICTION_TYPES[denoiser.predicts],
        "variance_type": VARIANCE_TYPES[variance],
        "clip_sample": bool(clip),
        "timestep_spacing": "trailing",  # fewer steps than T still start at T
    }
    return SCHEDULER | beta | choices


def _diffusers_state(network: UNet) -> dict[str, Tensor]:
    """The network's tensors under diffusers' names; its 1x1 convolutions in attention are linear layers there."""
    theirs = names(network, "diffusers")
    return {
        theirs[name]: (squeezed(value) if ".attention." in name else value).detach().cpu().contiguous()
        for name, value in network.state_dict().items()
    }


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
    schedule, predicts, _ = _read_scheduler(Path(folder))
    path = _find(folder, "config.json", "unet", ".")
    options = _unet_options(_read_config(path, UNET["_class_name"], SILENT_UNET), str(path))
    weights = path.with_name(WEIGHTS)
    if not weights.is_file() and weights.with_suffix(".bin").is_file():
        raise CheckpointError(
            f"{path.parent} holds its weights as a pickle only, which may run code and is not read. If you trust it, "
            f"convert it once with diffusers: UNet2DModel.from_pretrained({str(path.parent)!r}, "
            f"use_safetensors=False).save_pretrained({str(path.parent)!r})"
        )
    _, found = read_tensors(weights)
    tensors = {re.sub(rf"\b({'|'.join(OLD_NAMES)})\b", lambda m: OLD_NAMES[m[1]], k): v for k, v in found.items()}
    if len(tensors) < len(found):
        raise CheckpointError(f"{weights} holds some attention weights twice, under their old and their new names.")
    return Denoiser(build(options, tensors, "diffusers", str(weights)), schedule, predicts).eval()


def diffusers_sampling(folder: str | Path) -> dict:
    """How the pipeline in a diffusers folder samples, as options of ``sample``: its variance and its clipping.

    Raises:
        CheckpointError: as ``from_diffusers``.
    """
    return _read_scheduler(Path(folder))[2]


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are(fits: Callable[[Any], bool], value: Any) -> bool:
    """Whether this is a list, not empty, of values that all fit."""
    return isinstance(value, list) and bool(value) and all(map(fits, value))


# The keys of a UNet2DModel that make a choice: what is supported, in words and as a test.
WHOLE = "a whole number, 1 or more"
FREE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "in_channels": (WHOLE, _is_whole),
    "sample_size": (
        f"{WHOLE}, for square images",
        lambda n: _is_whole(n) or (_are(_is_whole, n) and len(n) == 2 and n[0] == n[1]),
    ),
    "block_out_channels": (
        "whole multiples of the first, which is 4 or more",
        lambda n: _are(_is_whole, n) and n[0] >= 4 and _are(lambda width: width % n[0] == 0, n),
    ),
    "down_block_types": (
        "DownBlock2D or AttnDownBlock2D for each level",
        lambda kinds: _are(lambda kind: kind in ("DownBlock2D", "AttnDownBlock2D"), kinds),
    ),
    "norm_num_groups": (WHOLE, _is_whole),
    "layers_per_block": (WHOLE, _is_whole),
    "num_class_embeds": ("null, 2 or more", lambda n: n is None or (_is_whole(n) and n > 1)),
    "dropout": ("a number in [0, 1)", lambda p: type(p) in (int, float) and 0 <= p < 1),
}
NOTES = {
    "out_channels": ", as in_channels: no learned variance",
    "up_block_types": ", the mirror image of down_block_types",
}


def _unet_options(config: dict, where: str) -> dict:
    """The arguments of the UNet that a UNet2DModel's configuration describes."""
    for key, (supported, fits) in FREE.items():
        if key not in config:
            raise CheckpointError(f"{where} lacks {key}.")
        if not fits(config[key]):
            raise _unsupported(where, {key: (config[key], supported)})
    widths, kinds, groups = (config[key] for key in ("block_out_channels", "down_block_types", "norm_num_groups"))
    if len(kinds) != len(widths):
        raise _unsupported(where, {"down_block_types": (kinds, f"one for each of {len(widths)} levels")})
    size, embeds = config["sample_size"], config["num_class_embeds"]
    side = size[0] if isinstance(size, list) else size
    attends = [kind == "AttnDownBlock2D" for kind in kinds]
    options = {
        "image_size": side,
        "in_channels": config["in_channels"],
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": config["layers_per_block"],
        "attention_resolutions": [side >> level for level, attend in enumerate(attends) if attend],
        "dropout": config["dropout"],
        "groups": groups,
        "classes": None if embeds is None else embeds - 1,
    }
    # Another spelling of the same: a default in full, two equal sides, the other name of an activation.
    attending = {width for width, attend in zip(widths, attends) if attend} | {widths[-1]}
    same = {"attn_norm_num_groups": groups, "time_embedding_dim": 4 * widths[0], "act_fn": "swish", "sample_size": size}
    same |= {"attention_head_dim": widths[-1]} if len(attending) == 1 else {}
    unused = ("text_channels", "image_channels", "adaptive_norm", "lean", "coordinates", "heads")
    written = _unet_config(options | dict.fromkeys(unused) | {"patch_size": 1})
    config = config | {key: written[key] for key, value in same.items() if config.get(key) == value}
    _demand(config, written, where)
    if unknown := {key: v for key, v in config.items() if not (key in written.keys() | IGNORED or key.startswith("_"))}:
        raise _unsupported(where, {key: (value, "leaving it out") for key, value in unknown.items()})
    return options


def _demand(found: dict, supported: dict, where: str) -> None:
    """Raise CheckpointError unless every key found has the one value that is supported; name all that have not."""
    wrong = {key: (found[key], value) for key, value in supported.items() if found.get(key, value) != value}
    if wrong:
        words = {key: (value, json.dumps(good) + NOTES.get(key, "")) for key, (value, good) in wrong.items()}
        raise _unsupported(where, words)


def _unsupported(where: str, wrong: dict[str, tuple[Any, str]]) -> CheckpointError:
    items = (f"{key} = {json.dumps(value)[:200]} (supported: {good})" for key, (value, good) in wrong.items())
    return CheckpointError(f"{where} describes a model that this library does not have: {'; '.join(items)}.")


def _read_scheduler(folder: Path) -> tuple[Schedule, str, dict]:
    """The schedule, what the network predicts, and options of ``sample``, from a diffusers folder."""
    if (index := folder / "model_index.json").exists():
        _read_config(index, "DDPMPipeline", {})
    path = _find(folder, "scheduler_config.json", "scheduler", ".", "../scheduler")
    config = _read_config(path, SCHEDULER["_class_name"], SILENT_SCHEDULER)
    unused = {"clip_sample_range"} if config["clip_sample"] is False else set()
    supported = SCHEDULER | {"predict_epsilon": True}  # a key of old folders
    _demand({key: value for key, value in config.items() if key not in unused}, supported, str(path))
    choices = {
        "prediction_type": {theirs: ours for ours, theirs in PREDICTION_TYPES.items()},
        "variance_type": {theirs: ours for ours, theirs in VARIANCE_TYPES.items()} | {"fixed_small_log": "beta_tilde"},
        "clip_sample": {True: True, False: False},
    }
    for key, known in choices.items():
        if not isinstance(config[key], str | bool) or config[key] not in known:
            raise _unsupported(str(path), {key: (config[key], ", ".join(map(json.dumps, known)))})
    predicts, variance, clip = (known[config[key]] for key, known in choices.items())
    try:
        schedule = _read_schedule(config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} describes no schedule: {error}") from error
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


def _find(folder: str | Path, name: str, *places: str) -> Path:
    paths = [Path(folder) / place / name for place in places]
    for path in paths:
        if path.is_file():
            return path
    hint = "" if Path(folder).is_dir() else " Models on the hub are not fetched: download the folder first."
    raise CheckpointError(
        f"there is no {name} in {folder} or where else diffusers puts it ({', '.join(places)}).{hint}"
    )


def _read_config(path: Path, kind: str, silent: dict) -> dict:
    """A JSON file of diffusers that describes a class of this kind, over what is taken where it is silent."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a value of JSON")

    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): damaged or cut short?") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(config).__name__}.")
    config = {"_class_name": None} | silent | config
    _demand(config, {"_class_name": kind}, str(path))
    return config
