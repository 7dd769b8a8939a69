"""How many pictures does it take to learn instead of to memorise?  ``python -m scripts.memorisation [N ...]``

Trains the digits recipe's network, without dropout, on N of the training digits and again, from other first weights, on
N others, for several N. What the two draw from the same noise, after so many steps each, goes to
``ddpm_lib/datasets/memorisation.json``, where the chapter "Learned or memorised" reads it; beside it, what two
memorisers draw, and two Gaussians. Then once more with a label of its own for each digit. On one thread that takes
about two hours.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import (
    Denoiser,
    GaussianMixture,
    Prediction,
    Schedule,
    Trainer,
    UNet,
    digits,
    frechet_distance,
    pretrained_classifier,
    sample,
)
from ddpm_lib.checkpoint import write_file
from ddpm_lib.recipe import Recipe
from scripts.training_signals import rounded

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "memorisation.json"
SETTINGS = {"sizes": [10, 80, 670], "steps": [125, 250, 500, 1000, 2000, 4000, 8000], "samples": 200, "walk": 50}
SCHEDULE = Schedule.linear()  # that of the digits recipe


def train(images: Tensor, labels: Tensor | None = None, seed: int = 0) -> Iterator[Denoiser]:
    """The averaged model after each of the numbers of steps in SETTINGS."""
    recipe = Recipe.load("digits")
    recipe = replace(
        recipe, network=replace(recipe.network, dropout=0.0, classes=None if labels is None else len(labels))
    )
    torch.manual_seed(seed)
    steps = SETTINGS["steps"]
    options = recipe.trainer_options() | {"warmup": 100, "decay_steps": steps[-1], "ema_decay": 0.99, "seed": seed}
    trainer = Trainer(Denoiser(UNet(**asdict(recipe.network)), SCHEDULE), images, labels, **options)
    for step in tqdm(trainer.run(steps[-1]), total=steps[-1]):
        if step.step in steps:
            yield trainer.ema


def of_guess(guess: Callable[[Tensor, int], Tensor]) -> Callable:
    """The denoiser that takes this function of noisy points (B, 64) and the step for x_0."""

    def denoiser(x_t: Tensor, t: int) -> Prediction:
        x0 = guess(x_t.flatten(1).double(), t)
        return Prediction.of("x0", x0.view_as(x_t).to(x_t.dtype), x_t, t, SCHEDULE)

    denoiser.schedule = SCHEDULE
    return denoiser


def memoriser(images: Tensor) -> Callable:
    known = images.flatten(1).double()

    def guess(x_t: Tensor, t: int) -> Tensor:
        away = torch.cdist(x_t, SCHEDULE.signal[t] * known).square()
        return (-away / (2 * SCHEDULE.noise[t] ** 2)).softmax(1) @ known

    return of_guess(guess)


def gaussian(images: Tensor) -> Callable:
    """All that it knows is the mean and the covariance of the images."""
    x = images.flatten(1).double()
    optimal = GaussianMixture([1.0], x.mean(0, keepdim=True), x.T.cov(correction=0)[None]).denoiser(SCHEDULE)
    return of_guess(lambda x_t, t: optimal(x_t, t).x0)


def draw(model: Callable, labels: Tensor | None = None) -> Tensor:
    noise = torch.randn(SETTINGS["samples"], 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return sample(model, x_T=noise, condition=labels, steps=SETTINGS["walk"], eta=0.0).clamp(-1, 1)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Root mean squares over pixels (N, M) of the differences of images (N, ...) and (M, ...)."""
    one, other = one.flatten(1).double(), other.flatten(1).double()
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist") / one.shape[1] ** 0.5


def copies(drawn: Tensor, seen: Tensor) -> float:
    """Share of pictures whose nearest seen one is less than a third as far as the second nearest."""
    nearest = distances(drawn, seen).topk(2, largest=False).values
    return float((nearest[:, 0] < nearest[:, 1] / 3).double().mean())


@torch.no_grad()
def measure(drawn: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], fresh: Tensor) -> dict[str, float]:
    """Of the pictures that two models drew from the same noise, each with the pictures that it has seen."""
    apart, judge = distances(*drawn), pretrained_classifier()
    return {
        "copies": sum(map(copies, drawn, seen)) / 2,
        "same noise": float(apart.diag().median()),
        "other noise": float(apart.median()),
        "frechet": sum(frechet_distance(judge.features(x), judge.features(fresh)) for x in drawn) / 2,
    }


def row(n: int) -> dict:
    images, fresh = digits("train")[0], digits("test")[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    seen = images[:n], images[-n:]
    course = zip(*([draw(model) for model in train(pictures, seed=seed)] for seed, pictures in enumerate(seen)))
    own = torch.arange(n)
    told = own.repeat(SETTINGS["samples"])[: SETTINGS["samples"]]
    *_, labelled = train(seen[0], own)
    drawn = draw(labelled, told)
    right = distances(drawn, seen[0]).argmin(1) == told
    return {
        "networks": [measure(pair, seen, fresh) for pair in course],
        "memorisers": measure(tuple(draw(memoriser(pictures)) for pictures in seen), seen, fresh),
        "gaussians": measure(tuple(draw(gaussian(pictures)) for pictures in seen), seen, fresh),
        "fresh digits": {"copies": sum(copies(fresh, pictures) for pictures in seen) / 2},
        "own labels": {"copies": copies(drawn, seen[0]), "nearest is the one asked for": float(right.double().mean())},
    }


def main(sizes: list[int]) -> None:
    torch.set_num_threads(1)
    for n in sizes:
        found = row(n)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if results.get("settings") != SETTINGS:
            results = {"settings": SETTINGS, "rows": {}}
        results["rows"][str(n)] = rounded(found)
        write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or SETTINGS["sizes"])
