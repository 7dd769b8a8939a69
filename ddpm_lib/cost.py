"""What a training run will cost: parameters, arithmetic, memory, time."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .degradation import GIVEN
from .recipe import Recipe
from .training import Trainer, best_device

TIMED_BATCH, TIMED_STEPS = 16, 3  # on a CPU; an accelerator gets the whole batch


def cost(recipe: Recipe, device: str | torch.device | None = None) -> dict[str, str]:
    """Figures in words, by name. Takes no data: all images are zero. Times three steps on the device."""
    device = torch.device(device) if device else best_device()
    training, network = recipe.training, recipe.network
    denoiser = recipe.denoiser()
    parameters = sum(p.numel() for p in denoiser.parameters())
    forward, saved = per_image(recipe)
    batch = training.batch_size
    local = batch // training.accumulate
    size = batch if device.type != "cpu" else min(TIMED_BATCH, batch)
    images = torch.zeros(size, network.in_channels, network.image_size, network.image_size)
    options = recipe.trainer_options() | {"batch_size": size, "accumulate": 1 if size < batch else training.accumulate}
    nothing = denoiser.network.nothing
    conditions = None if nothing is None else torch.zeros(size, *nothing.shape, dtype=torch.long)
    if recipe.data.given is not None:
        conditions = GIVEN[recipe.data.given]
    trainer = Trainer(denoiser, images, conditions, **options, device=device)
    times = []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        float(next(trainer.run(1)).grad_norm)
        times.append(time.perf_counter() - start)
    seconds = sorted(times[1:])[TIMED_STEPS // 2] * batch / size
    return {
        "parameters": f"{parameters:,}",
        "multiplications per image": f"{forward / 2e9:.3g} billion (forward)",
        "arithmetic per training step": f"{3 * forward * batch / 1e12:.3g} TFLOP",
        "memory, about": f"{(20 * parameters + local * saved) / 2**30:.2g} GiB (float32, {local} images at a time)",
        "time per step": f"{seconds:.3g} s on this {device.type}, from {TIMED_STEPS} steps of {size} images",
        "images per second": f"{batch / seconds:.3g}",
        "whole run": f"{seconds * training.steps / 3600:.3g} hours for {training.steps:,} steps",
    }


def per_image(recipe: Recipe) -> tuple[int, int]:
    """FLOPs of a forward pass, and bytes that it keeps for the backward pass in float32; nothing is computed."""
    network = recipe.denoiser().network.to("meta")
    config = recipe.network
    x = torch.zeros(1, config.in_channels, config.image_size, config.image_size, device="meta")
    beside = network.config["image_channels"]
    seen = None if beside is None else torch.zeros(1, beside, *x.shape[2:], device="meta")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        steps = torch.zeros(1, dtype=torch.long, device="meta")
        output = network(x, steps, seen)  # alive, so that no storage is used twice
    assert output.shape == x.shape
    return counter.get_total_flops(), sum(kept.values())
