"""Algorithm 1 of the paper as a loop that can stop anywhere and go on from the same bits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointError, denoiser_config, fit_state, read_checkpoint, write_checkpoint
from .loss import simple_loss
from .prediction import Denoiser
from .schedule import _positive_int

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainStep:
    """What one optimiser step saw. Tensors stay on the device: nothing waits for it until you look.

    Attributes:
        step: how many steps have been made, 1 for the first.
        t, losses: steps of the noising process and losses of the batch, (B,).
        grad_norm: norm of the gradient before clipping, ().
        learning_rate: used in this step.
    """

    step: int
    t: Tensor
    losses: Tensor
    grad_norm: Tensor
    learning_rate: float

    @property
    def loss(self) -> float:
        """Mean loss of the batch; reading it waits for the device."""
        return float(self.losses.mean())


class Trainer:
    """Trains a denoiser on images and keeps a moving average of its weights.

    The batch, the steps t, the noise and the dropout of a training step depend only on ``seed`` and on the number of
    that step. So ``run(n)``, save, resume, ``run(n)`` gives the bits of ``run(2 * n)``.

    Args:
        denoiser: trained in place, on ``device``.
        images: float tensor (N, C, H, W) in [-1, 1]; it moves to the device whole.
        labels: whole numbers (N,), for a class-conditional network.
        batch_size: images per step.
        learning_rate: of Adam.
        warmup: steps over which the learning rate rises linearly from 0.
        decay_steps: if given, the learning rate falls linearly to 2% at this step, and stays there.
        ema_decay: weight of the old average in the moving average of weights.
        ema_warmup: use min(ema_decay, (1 + n) / (10 + n)) after n steps, which forgets the random start; False for
            the paper's constant.
        clip_norm: the gradient is scaled down to this norm if it is longer.
        label_dropout: share of labels replaced by "no label", for classifier-free guidance.
        precision: of the forward pass: 'float32', 'bfloat16' (autocast), or 'auto' for bfloat16 where the hardware
            computes in it.
        seed: of all randomness in training.
        device: 'cpu', 'cuda' or 'mps'.

    The defaults are the paper's for CIFAR-10. Source: Ho, Jain, Abbeel (2020), algorithm 1 and appendix B.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        batch_size: int = 128,
        learning_rate: float = 2e-4,
        warmup: int = 5000,
        decay_steps: int | None = None,
        ema_decay: float = 0.9999,
        ema_warmup: bool = True,
        clip_norm: float = 1.0,
        label_dropout: float = 0.1,
        precision: str = "auto",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        check_images(images)
        _check_labels(denoiser, images, labels)
        _positive_int("batch_size", batch_size)
        if warmup < 0 or (decay_steps is not None and decay_steps <= warmup):
            raise ValueError(f"need 0 <= warmup < decay_steps; got warmup = {warmup}, decay_steps = {decay_steps}.")
        for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}.")
        for name, value in (("ema_decay", ema_decay), ("label_dropout", label_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {value}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more; got {seed!r}.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
        self.options = {
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup": warmup,
            "decay_steps": decay_steps,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "clip_norm": clip_norm,
            "label_dropout": label_dropout,
            "precision": precision,
            "seed": seed,
        }
        self.device = torch.device(device)
        self.data_sha256 = _fingerprint(images, labels)
        self.images = images.to(self.device, torch.float32)
        self.labels = None if labels is None else labels.to(self.device)
        self.denoiser = denoiser.to(self.device)
        self.ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.autocast = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=precision == "bfloat16" or (precision == "auto" and _has_bfloat16(self.device)),
        )
        self.parameters = list(denoiser.parameters())
        self.averages = list(self.ema.parameters())
        self.optimiser = torch.optim.Adam(self.parameters, lr=learning_rate, fused=self.device.type != "mps")
        self.step = 0

    def run(self, steps: int) -> Iterator[TrainStep]:
        """Make this many more optimiser steps, and yield after each."""
        for _ in range(_positive_int("steps", steps)):
            yield self._one_step()

    def _one_step(self) -> TrainStep:
        options = self.options
        learning_rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        index = self._batch()
        self.denoiser.train()
        with keyed_randomness(options["seed"], self.step, self.device):
            x0 = self.images[index]
            label = self._drop_labels(index)
            t = torch.randint(1, self.denoiser.schedule.T + 1, (len(index),), device=self.device)
            eps = torch.randn_like(x0)
            with self.autocast:
                losses = simple_loss(self.denoiser, x0, t, eps, label)
        self.optimiser.zero_grad()
        losses.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, options["clip_norm"])
        self.optimiser.step()
        self._average()
        self.step += 1
        return TrainStep(self.step, t, losses.detach(), grad_norm, learning_rate)

    def _learning_rate(self) -> float:
        rate, warmup, end = (self.options[name] for name in ("learning_rate", "warmup", "decay_steps"))
        if self.step < warmup:
            return rate * (self.step + 1) / warmup
        if end is None:
            return rate
        return rate * max(1 - (self.step - warmup) / (end - warmup), 0.02)

    def _batch(self) -> Tensor:
        """Indices of this step's images: each epoch is a new order of all images, keyed on seed and epoch."""
        size, total = self.options["batch_size"], len(self.images)
        place = np.arange(self.step * size, (self.step + 1) * size)
        index = np.array([_order(self.options["seed"], p // total, total)[p % total] for p in place])
        return torch.from_numpy(index).to(self.device, non_blocking=True)

    def _drop_labels(self, index: Tensor) -> Tensor | None:
        if self.labels is None:
            return None
        dropped = torch.rand(len(index), device=self.device) < self.options["label_dropout"]
        return self.labels[index].masked_fill(dropped, self.denoiser.network.config["classes"])

    def _average(self) -> None:
        decay = self.options["ema_decay"]
        if self.options["ema_warmup"]:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def save(self, path: str | Path) -> None:
        """Write everything that ``resume`` needs to one file, whole or not at all."""
        tensors = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.network.state_dict().items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        config = {
            "denoiser": denoiser_config(self.denoiser),
            "options": self.options,
            "data_sha256": self.data_sha256,
            "step": self.step,
        }
        write_checkpoint(path, "training", config, tensors)

    def resume(self, path: str | Path) -> None:
        """Go back to the state that ``save`` wrote.

        Raises:
            CheckpointError: the file is damaged, or was written for another model, other options or other data.
        """
        config, tensors = read_checkpoint(path, "training")
        ours = {"denoiser": denoiser_config(self.denoiser), "options": self.options, "data_sha256": self.data_sha256}
        for name, value in ours.items():
            if config.get(name) != value:
                raise CheckpointError(f"{path} does not fit this run: {_difference(name, config.get(name), value)}.")
        parts: dict[str, dict] = {"network": {}, "ema": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        fit_state(self.denoiser.network, parts["network"], str(path))
        fit_state(self.ema.network, parts["ema"], str(path))
        state: dict[int, dict] = {}
        for name, tensor in parts["adam"].items():
            i, _, entry = name.partition(".")
            state.setdefault(int(i), {})[entry] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step = config["step"]


@contextmanager
def keyed_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on (seed, step) alone; the caller's own stream is left as it was."""
    key = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(key)
        yield


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are float (N, C, H, W), N > 0, finite, in [-1, 1]."""
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1]; got {images.dtype}. For 0..255 use images / 127.5 - 1.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (N, C, H, W) with N > 0; got {tuple(images.shape)}.")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1]; got values from {low:g} to {high:g}.")


def best_device() -> torch.device:
    """CUDA if there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _fingerprint(images: Tensor, labels: Tensor | None) -> str:
    digest = hashlib.sha256(images.float().cpu().contiguous().numpy())
    if labels is not None:
        digest.update(labels.long().cpu().contiguous().numpy())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def _check_labels(denoiser: Denoiser, images: Tensor, labels: Tensor | None) -> None:
    if labels is None:
        return
    classes = getattr(denoiser.network, "config", {}).get("classes")
    if classes is None:
        raise ValueError("labels were given, but the network has no classes: build it with classes=N.")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must hold one whole number per image, shape ({len(images)},); "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}; got {int(labels.min())} to {int(labels.max())}.")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _difference(name: str, theirs: object, ours: object) -> str:
    """Where two nested settings first differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(k for k in theirs | ours if theirs.get(k) != ours.get(k))
        return _difference(f"{name}.{key}", theirs.get(key), ours.get(key))
    return f"{name} is {theirs!r} there and {ours!r} here"
