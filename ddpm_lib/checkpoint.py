"""Models on disk: safetensors, with the configuration and a checksum in the same file. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .prediction import Denoiser
from .schedule import Schedule
from .text import PretrainedEncoder, TextEncoder, TextUNet
from .unet import UNet

FORMAT = "ddpm_lib 1"
MODELS = Path(str(resources.files(__package__) / "models"))


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint, or not one that fits."""


def write_checkpoint(path: str | Path, kind: str, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write tensors and their configuration to one file: whole under its final name, or not at all.

    The file is written beside its destination, flushed to disk and renamed, so that a reader or a killed process
    never sees half of it. One process at a time may write to a path.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "kind": kind, "config": json.dumps(config, sort_keys=True)}
    header["sha256"] = _digest(header, tensors)
    write_file(Path(path), to_bytes(tensors, header))


def write_file(path: Path, data: bytes) -> None:
    """Write beside the destination, flush to disk, rename: the file is whole or it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, whoever wrote it.

    Raises:
        CheckpointError: no such file, or not a whole one.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: no file has this name.")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): damaged or cut short?") from error


def read_checkpoint(path: str | Path, *kinds: str) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of a file of one of these kinds that ``write_checkpoint`` wrote.

    Raises:
        CheckpointError: no such file, not a checkpoint, of another kind, or damaged.
    """
    header, tensors = read_tensors(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library: format {header.get('format')!r}.")
    if header.get("sha256") != _digest(header, tensors):
        raise CheckpointError(f"{path} is damaged: its contents do not match their checksum. Take another copy.")
    if header.get("kind") not in kinds:
        needed = " or ".join(map(repr, kinds))
        raise CheckpointError(f"{path} holds a {header.get('kind')!r} checkpoint; a {needed} one is needed here.")
    try:
        config = dict(json.loads(header["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the configuration in {path} does not describe a {header['kind']}: {error}") from error
    return config, tensors


def _digest(header: dict, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{header.get('kind')}\n{header.get('config')}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless tensors have the names and shapes of the expected ones, and hold finite numbers."""
    shapes, found = ({name: tuple(value.shape) for name, value in part.items()} for part in (expected, tensors))
    if shapes != found:
        different = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        name = different[0]
        raise CheckpointError(
            f"{where} does not fit the model: {len(different)} tensors differ, the first is {name!r} with shape "
            f"{found.get(name, 'missing')} in the file and {shapes.get(name, 'missing')} in the model."
        )
    for name, value in tensors.items():
        if value.is_floating_point() != expected[name].is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{where} is damaged: {name!r} holds other things than finite numbers.")


def fit_state(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load tensors into a module that must have exactly these names and shapes."""
    check_fit(module.state_dict(), tensors, where)
    module.load_state_dict(tensors)


def plan_network(options: dict, tensors: int) -> UNet | TextUNet:
    """The network with these options and at most this many tensors, as shapes alone: a damaged number fills no memory.

    Raises:
        ValueError: there is no such network.
    """
    try:
        blocks = len(options["channel_multipliers"]) * options["blocks_per_level"]
        if blocks > tensors:
            raise ValueError(f"{blocks} residual blocks on the way down need more than {tensors} tensors.")
        if (layers := options.get("encoder", {}).get("layers", 0)) > tensors:
            raise ValueError(f"a text encoder of {layers} layers needs more than {tensors} tensors.")
        with torch.device("meta"):
            return _network(options)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no network of this library has this configuration: {error}") from error


def _network(config: dict) -> UNet | TextUNet:
    """The network with a configuration, untrained."""
    unet = UNet(**{name: value for name, value in config.items() if name != "encoder"})
    match config.get("encoder"):
        case None:
            return unet
        case {"name": _} as encoder:
            with torch.device("cpu"):
                return TextUNet(PretrainedEncoder(**encoder), unet)
        case encoder:
            return TextUNet(TextEncoder(**encoder), unet)


def build_network(plan: UNet | TextUNet, tensors: dict[str, Tensor], where: str) -> UNet | TextUNet:
    """The planned network with these tensors, which must be exactly its own."""
    check_fit(plan.state_dict(), tensors, where)
    network = _network(plan.config)
    network.load_state_dict(tensors)
    return network


def denoiser_config(denoiser: Denoiser) -> dict:
    """What ``load_denoiser`` needs to build the denoiser again."""
    if not isinstance(denoiser.network, UNet | TextUNet):
        raise ValueError(f"only denoisers with a UNet can be saved; this one has a {type(denoiser.network).__name__}.")
    return {
        "network": denoiser.network.config,
        "schedule": denoiser.schedule.config,
        "predicts": denoiser.predicts,
    }


def save_denoiser(denoiser: Denoiser, path: str | Path, *, bits: int = 32) -> None:
    """Write network weights, schedule and configuration to one safetensors file.

    Args:
        denoiser: with a UNet or a TextUNet.
        path: of the file.
        bits: 32, or fewer for a smaller file; ``load_denoiser`` gives all weights back in float32. With 16, each is
            rounded by at most one part in 2,048 (and by 3e-8, where it is close to 0). With 8, the weights of two or
            more dimensions are whole numbers in -127..127 times a scale for each row (of a layer, each output), so that
            each is rounded by at most 1/254 of the largest in its row; all others stay as they are.

    Raises:
        ValueError: the network is not a UNet, bits is another number, or a weight does not fit into float16.
    """
    if bits not in STORED:
        raise ValueError(f"bits must be one of {', '.join(map(str, STORED))}; got {bits!r}.")
    weights = STORED[bits](denoiser.network.state_dict())
    write_checkpoint(path, "denoiser", denoiser_config(denoiser), weights)


def _in_16_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {name: weight.half() for name, weight in weights.items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError("a weight is larger than float16 can hold (65,504): save with bits=32.")
    return weights


def _in_8_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    stored = {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            stored[name] = weight
            continue
        rows = weight.flatten(1).float()
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(weight.shape)
        stored[name + SCALE] = scale
    return stored


STORED = {32: dict, 16: _in_16_bits, 8: _in_8_bits}
SCALE = ".scale"  # ends the name of the scales of a tensor that is stored in 8 bits


def _from_8_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that ``_in_8_bits`` stored; all other tensors as they are."""
    weights = dict(tensors)
    for name, whole in tensors.items():
        scale = tensors.get(name + SCALE)
        if whole.dtype == torch.int8 and whole.ndim > 1 and scale is not None and scale.shape == whole.shape[:1]:
            weights[name] = whole * weights.pop(name + SCALE).view(-1, *[1] * (whole.ndim - 1))
    return weights


def load_denoiser(path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """The denoiser that ``save_denoiser`` wrote, in evaluation mode; of a training checkpoint, the averaged one.

    Raises:
        CheckpointError: no such file, damaged, or not of a denoiser.
    """
    config, tensors = read_checkpoint(path, "denoiser", "training")
    try:
        if "denoiser" in config:
            config = config["denoiser"]
            tensors = {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
        tensors = _from_8_bits(tensors)
        plan = plan_network(config["network"], len(tensors))
        denoiser = Denoiser(plan, Schedule.from_config(config["schedule"]), config["predicts"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the configuration in {path} does not describe a denoiser: {error}") from error
    denoiser.network = build_network(plan, tensors, str(path))
    return denoiser.to(device).eval()


def save_text_encoder(encoder: TextEncoder, path: str | Path) -> None:
    """Write a text encoder to one safetensors file."""
    write_checkpoint(path, "text encoder", encoder.config, encoder.state_dict())


def load_text_encoder(name: str | Path) -> TextEncoder:
    """The text encoder that the package ships under this name, or that ``save_text_encoder`` wrote to this path.

    Raises:
        CheckpointError: no such file, damaged, or not of a text encoder.
        ValueError: no shipped one of this name.
    """
    path = Path(name) if Path(name).suffix == ".safetensors" else shipped(str(name))
    config, tensors = read_checkpoint(path, "text encoder")
    try:
        if config["layers"] > len(tensors):
            raise ValueError(f"{config['layers']} layers need more than {len(tensors)} tensors.")
        with torch.device("meta"):
            plan = TextEncoder(**config)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the configuration in {path} does not describe a text encoder: {error}") from error
    check_fit(plan.state_dict(), tensors, str(path))
    encoder = TextEncoder(**plan.config)
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)


def shipped(name: str) -> Path:
    """Path of a file that the package ships in ``ddpm_lib/models``.

    Raises:
        ValueError: no such model; the message lists those there are.
    """
    if name not in shipped_names():
        raise ValueError(f"the package ships no model {name!r}; it ships {', '.join(shipped_names()) or 'none'}.")
    return MODELS / f"{name}.safetensors"


def shipped_names() -> list[str]:
    """Names of the models that the package ships."""
    return sorted(file.stem for file in MODELS.glob("*.safetensors"))


def pretrained(name: str = "digits", device: str | torch.device = "cpu") -> Denoiser:
    """A denoiser that the package ships; its model card lies beside it in ``ddpm_lib/models``.

    Raises:
        ValueError: no such model; the message lists those there are.
    """
    return load_denoiser(shipped(name), device)
