"""What a training run is made of, as data: the recipes in ``ddpm_lib/recipes`` are TOML files with these fields."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from .checkpoint import load_text_encoder
from .degradation import GIVEN
from .prediction import Denoiser
from .schedule import Schedule
from .text import TextUNet
from .unet import UNet


@dataclass(frozen=True)
class Data:
    dataset: Literal["digits", "emoji", "mnist", "fashion-mnist", "cifar10", "scenes", "image-folder"]
    """What to train on."""
    root: Path | None = None
    """Where the files lie; without it: $DDPM_DATA, then the cache, then a download."""
    flip: bool = False
    """Mirror images at random, half of the time."""
    text_encoder: str | None = None
    """What reads the captions, for a model that draws what they say: a shipped text encoder, or the file of one."""
    given: Literal["coarse", "blurred", "grey"] | None = None
    """What is seen of each image, for a model that draws images of which this is seen (``ddpm_lib.degradation``)."""


@dataclass(frozen=True)
class Network:
    image_size: int
    """Side of the images; those of an image folder are resized to it."""
    in_channels: int
    """1 for grey, 3 for colour."""
    base_channels: int
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...]
    """Channels of each level, as multiples of base_channels; each level halves the image."""
    blocks_per_level: int
    """Residual blocks per level on the way down."""
    attention_resolutions: tuple[int, ...]
    """Sides of the feature maps with self-attention."""
    dropout: float
    """In the residual blocks."""
    groups: int = 32
    """Of every group normalisation."""
    classes: int | None = None
    """Classes of a class-conditional model."""
    patch_size: int = 1
    """Side of the squares of pixels that the network works on as one place."""
    adaptive_norm: bool = False
    """Let the embedding scale and shift what each block has normalised."""
    lean: bool = False
    """A cheaper way down and up, for small networks on a CPU."""
    coordinates: bool = False
    """Show the network where in the image each place lies."""
    initial: Literal["paper", "torch"] = "paper"
    """Size of the first weights: the paper's, or PyTorch's own, which are smaller."""
    heads: int | None = None
    """Heads of all attention, with normalised queries and keys; unset, one (to words four), without a norm."""


@dataclass(frozen=True)
class Noise:
    schedule: Literal["linear", "cosine"] = "linear"
    """Schedule of the noise."""
    T: int = 1000
    """Steps of the noising process."""
    snr_scale: float = 1.0
    """Multiplies the signal-to-noise ratios of the cosine schedule."""
    predicts: Literal["eps", "x0", "v"] = "eps"
    """What the network learns to give."""


@dataclass(frozen=True)
class Training:
    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Images per step, over all processes."""
    learning_rate: float
    """Of Adam, or of Muon in Adam's measure."""
    warmup: int
    """Steps over which the learning rate rises from 0."""
    ema_decay: float
    """Of the moving average of the weights."""
    decay_steps: int | None = None
    """The learning rate falls linearly to 2% at this step."""
    optimiser: Literal["adam", "muon"] = "adam"
    """What turns gradients into steps."""
    ema_warmup: bool = True
    """Let the average forget the random start."""
    beta_2: float = 0.999
    """Of Adam: how slowly it forgets the size of gradients."""
    weight_decay: float = 0.0
    """Weights shrink by this times the learning rate in each step; with Muon, only matrices and convolutions do."""
    clip_norm: float = 1.0
    """Longest gradient."""
    condition_dropout: float = 0.1
    """Share of labels or captions hidden while training."""
    weight_cap: float | None = None
    """Weight the squared error of x0 by sqrt(SNR), or by this where it is less; without it, the paper's simple loss."""
    accumulate: int = 1
    """Parts in which a process works through its share of a batch."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network's arithmetic."""
    compile: bool = False
    """Let torch.compile fuse the network (for a GPU)."""
    channels_last: bool = False
    """Memory layout that a GPU's convolutions prefer."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about NaN: stop the run, or leave out that step."""
    weights_from: str | None = None
    """Weights to start from: MODEL as ``python -m ddpm_lib info`` takes it."""
    seed: int = 0
    """Of the first weights and of all randomness in training."""


@dataclass(frozen=True)
class Output:
    log_every: int = 50
    """Steps between two lines of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints; the last two are kept."""
    sample_every: int = 5000
    """Steps between two sheets of samples."""
    sample_steps: int = 50
    """Steps of the sampler for these sheets (DDIM)."""


@dataclass(frozen=True)
class Recipe:
    """A whole training run, from data to the sheets of samples."""

    data: Data
    network: Network
    training: Training
    noise: Noise = field(default_factory=Noise)
    output: Output = field(default_factory=Output)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """The recipe with this name in ``ddpm_lib/recipes``, or in the TOML file at this path."""
        path = RECIPES / f"{name}.toml"
        if not path.is_file():
            path = Path(name)
        if path.suffix != ".toml" or not path.is_file():
            raise ValueError(
                f"there is no recipe {name!r}; there are {', '.join(recipe_names())}, or give a .toml file."
            )
        try:
            parts = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls(**{section: _section(section, values) for section, values in parts.items()})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a recipe: {error}.") from error

    def denoiser(self) -> Denoiser:
        """The untrained denoiser; the caller has seeded torch."""
        config = {"name": self.noise.schedule, "T": self.noise.T}
        if self.noise.snr_scale != 1:
            if self.noise.schedule != "cosine":
                raise ValueError(f"snr_scale belongs to the cosine schedule; this recipe's is {self.noise.schedule}.")
            config["snr_scale"] = self.noise.snr_scale
        options = asdict(self.network)
        if self.data.given is not None:
            size = self.network.image_size
            seen = GIVEN[self.data.given](torch.zeros(1, self.network.in_channels, size, size))
            options["image_channels"] = seen.shape[1]
        if self.data.text_encoder is None:
            network = UNet(**options)
        else:
            encoder = load_text_encoder(self.data.text_encoder)
            network = TextUNet(encoder, UNet(**options, text_channels=encoder.width))
        return Denoiser(network, Schedule.from_config(config), self.noise.predicts)

    def trainer_options(self) -> dict:
        """Keyword arguments of ``Trainer``."""
        options = asdict(self.training) | {"flip": self.data.flip}
        for name in ("steps", "weights_from"):
            del options[name]
        return options


SECTIONS = {"data": Data, "network": Network, "noise": Noise, "training": Training, "output": Output}
RECIPES = Path(str(resources.files(__package__) / "recipes"))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _section(name: str, values: dict) -> Data | Network | Noise | Training | Output:
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be a section, [{name}]")
    return SECTIONS[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
