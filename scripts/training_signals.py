"""What can be watched while the digits recipe trains: losses, gradients and their noise, samples.

    python -m scripts.training_signals

writes ``ddpm_lib/datasets/training_signals.json``, where the chapter "Scaling up" reads it. It trains the first
thousand steps of the recipe, and takes the model that the package ships, the end of the same run, as the last stage.
On one thread that takes about ten minutes.
"""

import json
import platform
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Denoiser, digits, frechet_distance, pretrained, pretrained_classifier, sample, simple_loss
from ddpm_lib.recipe import Recipe
from ddpm_lib.run import build

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "training_signals.json"
STAGES = (10, 30, 100, 300, 1000)
RANGES = ((1, 100), (101, 400), (401, 1000))
PARTS, PART = 128, 32
SAMPLES = {"steps": 25, "variance": "beta_tilde"}


def gradient(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor) -> Tensor:
    """The gradient of a batch's mean loss over all weights, in one vector."""
    loss = simple_loss(denoiser, x0, t, eps, label).mean()
    parts = torch.autograd.grad(loss, list(denoiser.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


def scatter(a: Tensor, b: Tensor) -> float:
    """Half the mean squared distance of two rows: what differs between them adds this much variance."""
    return float((a - b).square().sum(1).mean() / 2)


def gradient_noise(denoiser: Denoiser) -> dict:
    """Length of the mean gradient, scatter of single examples around it, and where the scatter comes from.

    Each part of PART images gets three gradients: two with the same steps t, two with the same images only.
    """
    images, labels = digits("train")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(PARTS):
        index = torch.randint(len(images), (PART,), generator=generator)
        t, other_t = torch.randint(1, denoiser.schedule.T + 1, (2, PART), generator=generator)
        eps = torch.randn(3, PART, *images.shape[1:], generator=generator)
        batch = images[index], labels[index]
        rows.append([gradient(denoiser, batch[0], s, e, batch[1]) for s, e in zip((t, t, other_t), eps)])
    first, same_t, same_images = draws = [torch.stack(row) for row in zip(*rows)]
    means = sum(draws) / len(draws)
    squared_length, error = squared_expectation(means @ means.T)
    return {
        "squared_length": squared_length,
        "error_of_squared_length": error,
        "trace": PART * float(first.var(0).sum()),
        "trace_of_eps": PART * scatter(first, same_t),
        "trace_of_t_and_eps": PART * scatter(first, same_images),
    }


def squared_expectation(products: Tensor) -> tuple[float, float]:
    """From the products of all pairs of rows: squared length of their expectation, and the jackknife's error of it.

    Only products of different rows count, so that the estimate has no bias.
    """
    n = len(products)
    off = products - products.diag().diag()
    estimate = off.sum() / (n * (n - 1))
    without = (off.sum() - 2 * off.sum(1)) / ((n - 1) * (n - 2))
    return float(estimate), float(without.std(correction=0) * (n - 1) ** 0.5)


@torch.no_grad()
def losses(denoiser: Denoiser) -> list[float]:
    """Loss on the test digits in each of RANGES, the same steps and noise for everyone."""
    images, labels = (part.repeat(4, *[1] * (part.ndim - 1)) for part in digits("test"))
    generator = torch.Generator().manual_seed(7)
    found = []
    for low, high in RANGES:
        t = torch.randint(low, high + 1, (len(images),), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        found.append(float(simple_loss(denoiser, images, t, eps, labels).mean()))
    return found


def samples(denoiser: Denoiser) -> dict:
    """Label accuracy of 450 samples, and their distance from the training digits."""
    label = torch.arange(450) % 10
    drawn = sample(denoiser, (450, 1, 8, 8), condition=label, generator=torch.Generator().manual_seed(0), **SAMPLES)
    judge = pretrained_classifier()
    features = judge.features(drawn.clamp(-1, 1))
    return {
        "accuracy": float((judge.head(features).argmax(1) == label).double().mean()),
        "frechet": frechet_distance(features, judge.features(digits("train")[0])),
    }


def stage(step: int, denoiser: Denoiser) -> dict:
    denoiser.eval().requires_grad_(True)
    figures = {"step": step, "test_loss": losses(denoiser), **gradient_noise(denoiser), **samples(denoiser)}
    denoiser.requires_grad_(False)
    return rounded(figures)


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    recipe = Recipe.load("digits")
    trainer = build(recipe, torch.device("cpu"))
    stages, batches = [], []
    for log in tqdm(trainer.run(max(STAGES)), total=max(STAGES), unit="step"):
        batches.append([log.loss, float(log.grad_norm)])
        if log.step in STAGES:
            stages.append(stage(log.step, trainer.ema))
    stages.append(stage(recipe.training.steps, pretrained("digits")))
    settings = {
        "ranges": RANGES,
        "parts": PARTS,
        "images_per_part": PART,
        "sampling": SAMPLES,
        "torch": torch.__version__.split("+")[0],
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }
    lines = ",\n  ".join(json.dumps(figures) for figures in stages)
    batches = json.dumps(rounded(batches))
    RESULTS.write_text(
        f'{{"settings": {json.dumps(settings)},\n "stages": [\n  {lines}\n ],\n "loss_and_norm": {batches}\n}}\n'
    )


if __name__ == "__main__":
    main()
