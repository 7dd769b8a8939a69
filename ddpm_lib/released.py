"""The paper's own weights, as converted to PyTorch by the port ``pytorch_diffusion``."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import CheckpointError, read_tensors
from .names import build
from .prediction import Denoiser
from .schedule import Schedule

PICKLES = (".ckpt", ".pt", ".pth")


def from_pytorch_diffusion(path: str | Path, image_size: int | None = None) -> Denoiser:
    """The denoiser in a file of weights under the port's names, in evaluation mode.

    The architecture is read off the shapes, except for two things that no shape shows: the 32 groups of every model
    of the port, and the size of the images.

    Args:
        path: a safetensors file, or the port's own .ckpt. That is a pickle, read by torch's loader for weights alone,
            which runs no code that a file names.
        image_size: of the training images. If None, the size at which the one level with attention is 16 x 16, as in
            every model of the paper: 32 for CIFAR-10, 256 for CelebA-HQ and LSUN.

    Raises:
        CheckpointError: damaged, or not such a model.

    Source: github.com/pesser/pytorch_diffusion; Ho, Jain, Abbeel (2020), appendix B.
    """
    tensors = _read_pickle(Path(path)) if Path(path).suffix in PICKLES else read_tensors(path)[1]
    try:
        base, channels = tensors["conv_in.weight"].shape[:2]
        levels = range(1 + max(int(match[1]) for name in tensors if (match := re.match(r"down\.(\d+)\.", name))))
        multipliers = [tensors[f"down.{level}.block.0.conv1.weight"].shape[0] // base for level in levels]
    except (ArithmeticError, LookupError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the port's tensors: {error}.") from error
    attending = [level for level in levels if f"down.{level}.attn.0.q.weight" in tensors]
    if image_size is None:
        if len(attending) != 1:
            raise CheckpointError(f"{path} has attention at {len(attending)} levels, not one: give image_size.")
        image_size = 16 << attending[0]
    first_level = [name for name in tensors if re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", name)]
    options = {
        "image_size": image_size,
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": multipliers,
        "blocks_per_level": len(first_level),
        "attention_resolutions": [image_size >> level for level in attending],
        "dropout": 0.0,
    }
    return Denoiser(build(options, tensors, "port", str(path)), Schedule.linear(1000)).eval()


def is_port(path: Path) -> bool:
    """Whether a file is the port's, or a safetensors file with its names."""
    return path.suffix in PICKLES or "temb.dense.0.weight" in read_tensors(path)[1]


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: no file has this name.")
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 6):
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} cannot read safely: take 2.6 or newer."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{path} holds no weights that torch reads without running code: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} must hold tensors by their names, and nothing else.")
    return tensors
