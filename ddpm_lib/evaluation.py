"""How good a trained denoiser is: its loss by step on held-out images, and its samples before an independent judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import shipped_names
from .classifier import Classifier, pretrained_classifier
from .data import load_images
from .loss import simple_loss
from .metrics import frechet_distance
from .prediction import Denoiser
from .sampling import sample

BATCH = 250
REFERENCES = 10_000  # training images that samples are compared with


def evaluate(
    denoiser: Denoiser,
    dataset: str,
    *,
    root: Path | None = None,
    number: int = 1000,
    steps: int | None = 50,
    eta: float = 0.0,
    variance: str = "beta",
    seed: int = 0,
) -> dict[str, float]:
    """Figures by name, from ``number`` held-out images and as many samples.

    Always: the loss on held-out images, for each quarter of the steps t. Where the package ships a classifier for the
    data set: the Frechet distance of the samples to training images in its features, and beside it that of real
    held-out images, the floor; for a class-conditional model the share of samples that the classifier reads as the
    class asked for, and of held-out images that it reads right.

    Args:
        dataset, root: as for ``load_images``; of an image folder, one with held-out images.
        number: images and samples.
        steps, eta, variance: of the sampler, as for ``sample_steps``.
        seed: of steps, noise and samples.
    """
    split = "train" if dataset == "image-folder" else "test"
    images, labels = load_images(dataset, split, root=root, image_size=denoiser.network.config["image_size"])
    images = _floats(images[:number])
    classes = denoiser.network.config["classes"]
    labels = None if classes is None else labels[:number]
    figures = _losses(denoiser, images, labels, seed)
    if f"{dataset}-classifier" not in shipped_names():
        return figures
    judge = pretrained_classifier(dataset)
    training = _features(judge, _floats(load_images(dataset, "train", root=root)[0][:REFERENCES]))
    held_out = _features(judge, images)
    wanted = None if classes is None else torch.arange(len(images)) % classes
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for start in range(0, len(images), BATCH):
        noise = torch.randn(images[start : start + BATCH].shape, generator=generator)
        label = None if wanted is None else wanted[start : start + BATCH]
        walk = {"steps": steps, "eta": eta, "variance": variance}
        samples.append(sample(denoiser, x_T=noise, label=label, generator=generator, **walk).clamp(-1, 1))
    features = _features(judge, torch.cat(samples))
    figures["Frechet distance, samples to training"] = frechet_distance(features, training)
    figures["Frechet distance, held-out to training"] = frechet_distance(held_out, training)
    if wanted is not None:
        figures["label accuracy, samples"] = _accuracy(judge.head(features), wanted)
        figures["label accuracy, held-out"] = _accuracy(judge.head(held_out), labels)
    return figures


def _losses(denoiser: Denoiser, images: Tensor, labels: Tensor | None, seed: int) -> dict[str, float]:
    """Mean loss on the images for each quarter of the steps, one random step of the quarter per image."""
    T, generator = denoiser.schedule.T, torch.Generator().manual_seed(seed)
    figures = {}
    for quarter in range(4):
        low, high = quarter * T // 4 + 1, (quarter + 1) * T // 4
        t = torch.randint(low, high + 1, (len(images),), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        columns = [images, t, eps] if labels is None else [images, t, eps, labels]
        with torch.no_grad():
            losses = [simple_loss(denoiser, *part) for part in zip(*(column.split(BATCH) for column in columns))]
        figures[f"loss on held-out images, t = {low} to {high}"] = float(torch.cat(losses).mean())
    return figures


def _features(judge: Classifier, images: Tensor) -> Tensor:
    return torch.cat([judge.features(x) for x in images.split(BATCH)])


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _floats(images: Tensor) -> Tensor:
    return images / 127.5 - 1 if images.dtype == torch.uint8 else images
