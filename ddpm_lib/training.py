"""Algorithm 1 of the paper as a loop that can stop anywhere and go on from the same bits."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import CheckpointError, check_fit, denoiser_config, read_checkpoint, write_checkpoint
from .data import as_floats
from .loss import capped_loss, simple_loss
from .muon import Muon
from .prediction import Denoiser
from .schedule import _positive_int

OPTIMISERS = ("adam", "muon")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LOOK_EVERY = 100  # steps between two looks at whether the numbers are still finite: a look waits for the device


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite. The weights are those from before: such a step changes nothing."""


@dataclass(frozen=True)
class TrainStep:
    """What one optimiser step saw. Tensors stay on the device: nothing waits for it until you look.

    Attributes:
        step: how many steps have been made, 1 for the first.
        t, losses: steps of the noising process and losses of the whole batch, (B,), over all processes.
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

    Under ``torchrun``, after ``torch.distributed.init_process_group``, the processes share each batch, and all keep the
    same weights and the same average. Batch, steps and noise do not depend on how many processes share them, nor on
    ``accumulate``; dropout's masks do.

    A NaN or infinite gradient never reaches the weights: the optimiser leaves out that step.

    Args:
        denoiser: trained in place, on ``device``.
        images: (N, C, H, W), floats in [-1, 1] or uint8, which the device turns into floats batch by batch; they move
            to the device whole. (Floats in [0, 1], as torchvision's ToTensor gives them, want ``2 * images - 1``.)
        conditions: what each image shows, for a network that is told: labels (N,), tokens of captions (N, length), or
            images beside them (N, channels, H, W), floats, which ``flip`` mirrors with them; or a function that makes
            images of the latter kind from the images (B, C, H, W) of a batch (a resumed run knows it by its name).
        batch_size: images per step, over all processes.
        accumulate: parts in which a process works through its share of a batch, to save memory.
        optimiser: 'adam' or 'muon' (see ``Muon``).
        learning_rate, beta_2: of Adam; Muon's learning rate means the same.
        weight_decay: before each step, shrink the weights by this times the learning rate: with Muon, those that move
            by orthogonal steps; with Adam, all (AdamW, Loshchilov and Hutter 2019).
        warmup: steps over which the learning rate rises linearly from 0.
        decay_steps: if given, the learning rate falls linearly to 2% at this step, and stays there.
        ema_decay: weight of the old average in the moving average of weights (buffers stay as they were at first).
        ema_warmup: use min(ema_decay, (1 + n) / (10 + n)) after n steps, which forgets the random start; False for
            the paper's constant.
        clip_norm: the gradient is scaled down to this norm if it is longer.
        condition_dropout: share of labels or captions replaced by none, for classifier-free guidance.
        flip: mirror each image with probability one half.
        weight_cap: None for the paper's simple loss, else the cap of ``capped_loss``.
        precision: of the forward pass: 'float32', 'bfloat16' or 'float16' (autocast; the latter with a loss scale that
            adapts), or 'auto' for bfloat16 where the hardware computes in it.
        compile: let ``torch.compile`` fuse the network; worth its minutes on a GPU only.
        channels_last: lay the weights out with channels innermost, which the GPU's convolutions prefer.
        nonfinite: 'stop' raises NonFiniteError within 100 steps of a NaN or infinite gradient; 'skip' goes on.
        seed: of all randomness in training.
        device: 'cpu', 'cuda' or 'mps'.

    The defaults are the paper's for CIFAR-10. Source: Ho, Jain, Abbeel (2020), algorithm 1 and appendix B.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        conditions: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int = 128,
        accumulate: int = 1,
        optimiser: str = "adam",
        learning_rate: float = 2e-4,
        beta_2: float = 0.999,
        weight_decay: float = 0.0,
        warmup: int = 5000,
        decay_steps: int | None = None,
        ema_decay: float = 0.9999,
        ema_warmup: bool = True,
        clip_norm: float = 1.0,
        condition_dropout: float = 0.1,
        flip: bool = False,
        weight_cap: float | None = None,
        precision: str = "auto",
        compile: bool = False,  # noqa: A002
        channels_last: bool = False,
        nonfinite: str = "stop",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        check_images(images)
        _check_conditions(denoiser, images, conditions)
        world = dist.get_world_size() if dist.is_initialized() else 1
        parts = world * _positive_int("accumulate", accumulate)
        if _positive_int("batch_size", batch_size) % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate = {world} x {accumulate}; got {batch_size}."
            )
        if warmup < 0 or (decay_steps is not None and decay_steps <= warmup):
            raise ValueError(f"need 0 <= warmup < decay_steps; got warmup = {warmup}, decay_steps = {decay_steps}.")
        positive = {"learning_rate": learning_rate, "clip_norm": clip_norm, "weight_cap": weight_cap}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more; got {weight_decay}.")
        shares = {"beta_2": beta_2, "ema_decay": ema_decay, "condition_dropout": condition_dropout}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {value}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more; got {seed!r}.")
        if optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}; got {optimiser!r}.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite must be 'stop' or 'skip'; got {nonfinite!r}.")
        self.options = {
            "batch_size": batch_size,
            "optimiser": optimiser,
            "learning_rate": learning_rate,
            "beta_2": beta_2,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "decay_steps": decay_steps,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "clip_norm": clip_norm,
            "condition_dropout": condition_dropout,
            "flip": flip,
            "weight_cap": weight_cap,
            "precision": precision,
            "seed": seed,
        }
        self.accumulate, self.nonfinite = accumulate, nonfinite
        self.device = torch.device(device)
        if isinstance(conditions, Tensor):
            conditions = conditions.float() if conditions.is_floating_point() else conditions.long()
        self.data_sha256 = _fingerprint(images, conditions)
        self.images = images.contiguous().to(self.device)  # noise is drawn in the order of memory
        self.conditions = conditions.to(self.device) if isinstance(conditions, Tensor) else conditions
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.denoiser = denoiser.to(self.device, memory_format=layout)
        self.ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.autocast, self.scaler = _mixed_precision(precision, self.device)
        self.rank, self.world = (dist.get_rank(), world) if world > 1 else (0, 1)
        self.parallel = denoiser.network
        if world > 1:
            self.parallel = DistributedDataParallel(
                denoiser.network, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.loss = simple_loss if weight_cap is None else partial(capped_loss, cap=weight_cap)
        network = torch.compile(self.parallel) if compile else self.parallel
        self.model = Denoiser(network, denoiser.schedule, denoiser.predicts)  # the same weights, as a step calls them
        self.parameters, self.averages = zip(
            *((p, average) for p, average in zip(denoiser.parameters(), self.ema.parameters()) if p.requires_grad)
        )
        rates = {"lr": learning_rate, "betas": (0.9, beta_2), "weight_decay": weight_decay}
        if optimiser == "muon":
            tables = [part.weight for part in denoiser.modules() if isinstance(part, nn.Embedding)]
            self.optimiser = Muon(self.parameters, **rates, embeddings=tables)
        else:
            self.optimiser = torch.optim.AdamW(self.parameters, **rates, fused=self.device.type != "mps")
        self.step = 0
        self.first_bad = torch.zeros((), dtype=torch.long, device=self.device)  # the first non-finite step, or 0

    def run(self, steps: int) -> Iterator[TrainStep]:
        """Make this many more optimiser steps, and yield after each: no step is made before the loop asks for it.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite, and ``nonfinite`` is 'stop'.
        """
        for _ in range(_positive_int("steps", steps)):
            step = self._one_step()
            if self.step % LOOK_EVERY == 0:
                self.check_finite()
            yield step

    def _one_step(self) -> TrainStep:
        learning_rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.denoiser.train()
        self.optimiser.zero_grad()
        with flushed_denormals():
            with keyed_randomness(self.options["seed"], self.step, self.device):
                batch = self._batch()
                losses = self._gradient(batch)
            grad_norm = self._descend()
        self._note_nonfinite(losses, grad_norm)
        self._average()
        self.step += 1
        return TrainStep(self.step, batch[1], losses, grad_norm, learning_rate)

    def _gradient(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """Add up this process's share of the gradient; the losses of the whole batch."""
        share = self.options["batch_size"] // self.world
        size = share // self.accumulate
        starts = [self.rank * share + i * size for i in range(self.accumulate)]
        losses = []
        for start in starts:
            place = slice(start, start + size)
            if start > 0:  # dropout differs from part to part; the first part goes on with the stream of the batch
                _seed_everything(self.options["seed"], self.step, start)
            wait = self.world > 1 and start != starts[-1]  # the processes average their gradients at the last part
            with self.parallel.no_sync() if wait else nullcontext():
                with self.autocast:
                    mine = self.loss(self.model, *(None if part is None else part[place] for part in batch))
                self.scaler.scale(mine.mean() / self.accumulate).backward()
            losses.append(mine.detach())
        return self._gather(torch.cat(losses))

    def _gather(self, values: Tensor) -> Tensor:
        """The values of all processes, one after the other."""
        if self.world == 1:
            return values
        gathered = values.new_empty(self.world * len(values))
        dist.all_gather_into_tensor(gathered, values)
        return gathered

    def _descend(self) -> Tensor:
        """Clip the gradient and make the optimiser's step, unless the gradient is not finite; its norm before."""
        self.scaler.unscale_(self.optimiser)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options["clip_norm"])
        if self.scaler.is_enabled():  # it leaves out non-finite steps itself, and then lowers its scale
            self.scaler.step(self.optimiser)
            self.scaler.update()
        elif self.optimiser.defaults.get("fused"):
            self.optimiser.found_inf = (~grad_norm.isfinite()).float()  # Adam leaves out the step if this is 1
            self.optimiser.step()
        elif grad_norm.isfinite():
            self.optimiser.step()
        return grad_norm

    def _note_nonfinite(self, losses: Tensor, grad_norm: Tensor) -> None:
        bad = ~losses.isfinite().all()
        if not self.scaler.is_enabled():  # a scale that was too large makes infinite gradients, and is mended at once
            bad = bad | ~grad_norm.isfinite()
        self.first_bad = torch.where(bad & (self.first_bad == 0), self.step + 1, self.first_bad)

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient was not finite since the last look; waits for the device."""
        step, self.first_bad = int(self.first_bad), torch.zeros_like(self.first_bad)
        if step and self.nonfinite == "stop":
            raise NonFiniteError(
                f"the loss or its gradient was NaN or infinite at step {step}; that step did not touch the weights. "
                "Go on from the last checkpoint with a lower learning_rate, a longer warmup or precision='float32'; "
                "look for NaN in the images. nonfinite='skip' leaves out such steps and goes on."
            )

    def _learning_rate(self) -> float:
        rate, warmup, end = (self.options[name] for name in ("learning_rate", "warmup", "decay_steps"))
        if self.step < warmup:
            return rate * (self.step + 1) / warmup
        if end is None:
            return rate
        return rate * max(1 - (self.step - warmup) / (end - warmup), 0.02)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images, steps, noise and conditions of the whole batch, the same in every process.

        Each epoch is a new order of all images, keyed on seed and epoch.
        """
        size, total = self.options["batch_size"], len(self.images)
        place = np.arange(self.step * size, (self.step + 1) * size)
        index = np.array([_order(self.options["seed"], p // total, total)[p % total] for p in place])
        index = torch.from_numpy(index).to(self.device, non_blocking=True)
        x0 = as_floats(self.images[index])
        condition = self._drop_conditions(index)
        t = torch.randint(1, self.denoiser.schedule.T + 1, (size,), device=self.device)
        eps = torch.randn_like(x0)
        if self.options["flip"]:
            mirrored = torch.rand(size, 1, 1, 1, device=self.device) < 0.5
            x0 = torch.where(mirrored, x0.flip(3), x0)
            if condition is not None and condition.ndim == 4:
                condition = torch.where(mirrored, condition.flip(3), condition)
        if callable(self.conditions):
            condition = self.conditions(x0)
        return x0, t, eps, condition

    def _drop_conditions(self, index: Tensor) -> Tensor | None:
        if self.conditions is None or callable(self.conditions):
            return None
        conditions, nothing = self.conditions[index], self.denoiser.network.nothing
        if nothing is None:
            return conditions
        dropped = torch.rand(len(index), device=self.device) < self.options["condition_dropout"]
        dropped = dropped.view(-1, *[1] * nothing.ndim)
        return torch.where(dropped, nothing.to(conditions.device), conditions)

    def _average(self) -> None:
        decay = self.options["ema_decay"]
        if self.options["ema_warmup"]:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def save(self, path: str | Path) -> None:
        """Write everything that ``resume`` needs to one file, whole or not at all; under torchrun in one process only.

        Raises:
            NonFiniteError: as ``run`` does; then nothing is written.
        """
        self.check_finite()
        config = {
            "denoiser": denoiser_config(self.denoiser),
            "options": self.options,
            "data_sha256": self.data_sha256,
            "step": self.step,
        }
        write_checkpoint(path, "training", config, self._tensors(self.optimiser.state_dict()["state"]))

    def _tensors(self, state: dict[int, dict]) -> dict[str, Tensor]:
        """What a checkpoint holds, by the names there, with this state of the optimiser."""
        tensors = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.network.state_dict().items()}
        tensors |= {f"optimiser.{i}.{k}": v for i, values in state.items() for k, v in values.items()}
        return tensors | {f"scaler.{k}": torch.tensor(v) for k, v in self.scaler.state_dict().items()}

    def _state_like(self, p: Tensor) -> dict[str, Tensor]:
        """What the optimiser keeps for a parameter, in shape."""
        if isinstance(self.optimiser, Muon) and self.optimiser.is_map(p):
            return {"momentum": p}
        return {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}

    def resume(self, path: str | Path) -> None:
        """Go back to the state that ``save`` wrote.

        Raises:
            CheckpointError: the file is damaged, or was written for another model, other options or other data; the
                trainer is as it was.
        """
        config, tensors = read_checkpoint(path, "training")
        ours = {"denoiser": denoiser_config(self.denoiser), "options": self.options, "data_sha256": self.data_sha256}
        for name, value in ours.items():
            if config.get(name) != value:
                raise CheckpointError(f"{path} does not fit this run: {_difference(name, config.get(name), value)}.")
        step = config.get("step")
        if type(step) is not int or step < 0:
            raise CheckpointError(f"{path} is damaged: its step is {step!r}.")
        has_state = any(name.startswith("optimiser.") for name in tensors)  # there is none before the first step
        expected = {i: self._state_like(p) for i, p in enumerate(self.parameters)} if has_state else {}
        check_fit(self._tensors(expected), tensors, str(path))
        parts: dict[str, dict] = {"network": {}, "ema": {}, "optimiser": {}, "scaler": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.denoiser.network.load_state_dict(parts["network"])
        self.ema.network.load_state_dict(parts["ema"])
        state: dict[int, dict] = {}
        for name, tensor in parts["optimiser"].items():
            i, _, entry = name.partition(".")
            like = self.parameters[int(i)]
            if tensor.shape == like.shape:  # Adam's fused kernel wants its memory laid out as the weights are
                tensor = torch.empty_like(like).copy_(tensor)
            state.setdefault(int(i), {})[entry] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.scaler.load_state_dict({name: value.item() for name, value in parts["scaler"].items()})
        self.step = step
        self.first_bad.zero_()


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Results below 1e-38 in size become 0. A trained softmax makes many, and a CPU is slow at computing with them.

    ``benchmarks/denormals.py`` measures how slow.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def keyed_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on (seed, step) alone; the caller's own, on CPU and device, are left as they were."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        _seed_everything(seed, step)
        yield


def _seed_everything(*key: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are (N, C, H, W), N > 0, of uint8 or of finite floats in [-1, 1]."""
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, or floats in [-1, 1]; got {images.dtype}.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (N, C, H, W) with N > 0; got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1]; got values from {low:g} to {high:g}.")


def best_device() -> torch.device:
    """CUDA if there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _fingerprint(images: Tensor, conditions: Tensor | Callable | None) -> str:
    images = images if images.dtype == torch.uint8 else images.float()
    digest = hashlib.sha256(images.cpu().contiguous().numpy())
    if isinstance(conditions, Tensor):
        digest.update(conditions.cpu().contiguous().numpy())
    elif conditions is not None:
        digest.update(getattr(conditions, "__qualname__", type(conditions).__qualname__).encode())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def _check_conditions(denoiser: Denoiser, images: Tensor, conditions: Tensor | Callable | None) -> None:
    config = getattr(denoiser.network, "config", {})
    if conditions is None or callable(conditions):
        return
    if config.get("image_channels"):
        expected = (len(images), config["image_channels"], *images.shape[2:])
        if not conditions.is_floating_point() or tuple(conditions.shape) != expected:
            raise ValueError(
                f"the images beside the images must be floats of shape {expected}; "
                f"got {conditions.dtype} of shape {tuple(conditions.shape)}."
            )
        if not conditions.isfinite().all():
            raise ValueError("the images beside the images must be finite; got nan or inf.")
    elif "encoder" in config:
        if conditions.ndim != 2 or len(conditions) != len(images) or conditions.is_floating_point():
            raise ValueError(
                f"captions must come as tokens, whole numbers of shape ({len(images)}, length): "
                f"network.encoder.tokenise(captions); got {conditions.dtype} of shape {tuple(conditions.shape)}."
            )
    else:
        _check_labels(config.get("classes"), images, conditions)


def _check_labels(classes: int | None, images: Tensor, labels: Tensor) -> None:
    if classes is None:
        raise ValueError("labels were given, but the network has no classes: build it with classes=N.")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must hold one whole number per image, shape ({len(images)},); "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}; got {int(labels.min())} to {int(labels.max())}.")


def _mixed_precision(precision: str, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    half = torch.float16 if precision == "float16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=precision != "float32")
    return autocast, torch.amp.GradScaler(device.type, enabled=precision == "float16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16, and does not only emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _difference(name: str, theirs: object, ours: object) -> str:
    """Where two nested settings first differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        theirs, ours = ({k: part.get(k, "missing") for k in theirs | ours} for part in (theirs, ours))
        key = next(k for k in theirs if theirs[k] != ours[k])
        return _difference(f"{name}.{key}", theirs[key], ours[key])
    return f"{name} is {theirs!r} there and {ours!r} here"
