"""How good a trained denoiser is: its loss by step on held-out images, and its samples before an independent judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import shipped_names
from .classifier import Classifier, pretrained_classifier
from .data import as_floats, emoji, load_images
from .degradation import GIVEN
from .guidance import Guided
from .inception import Inception
from .loss import simple_loss
from .metrics import frechet_distance, inception_score, precision_recall
from .prediction import Denoiser
from .sampling import _evaluating, sample
from .scene_reader import satisfies

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
    weight: float = 0.0,
    given: str | None = None,
    seed: int = 0,
    inception: bool = False,
) -> dict[str, float]:
    """Figures by name, from ``number`` held-out images and as many samples.

    Always: the loss on held-out images, for each quarter of the steps t. Where there is a judge of samples: their
    Frechet distance to training images in its features, and beside it that of real held-out images, the floor; their
    precision and recall. From the classifier that the package ships for a data set, for a class-conditional model
    also the share of samples that it reads as the class asked for, and of held-out images that it reads right. For a
    model that draws captions of scenes, the share of samples that show their whole caption, and of held-out images; of
    emoji, the share to which no other emoji is nearer than the one asked for.
    For a model that is shown a part of each image, the peak signal-to-noise ratio of its samples, one for each held-out
    image, in decibels.

    Args:
        denoiser: on any device; the work is done there.
        dataset, root: as for ``load_images``; of an image folder, one with held-out images.
        number: of samples, and of held-out images where there are so many.
        steps, eta, variance: of the sampler, as for ``sample_steps``.
        weight: of classifier-free guidance, as for ``Guided``; 0 for none.
        given: a key of ``ddpm_lib.degradation.GIVEN``, for a model that is shown a part of each image.
        seed: of steps, noise and samples.
        inception: judge by ``Inception`` instead, against all training images: the Frechet distance is then the FID,
            which is comparable with published ones at ``number`` 50,000. Also gives the Inception score. Where there
            are no training images beside the held-out ones (an image folder), the held-out ones stand for both.
    """
    split = "train" if dataset == "image-folder" else "test"
    device = next(denoiser.parameters()).device
    size = denoiser.network.config["image_size"]
    images, labels = load_images(dataset, split, root=root, image_size=size)
    images = as_floats(images[:number]).to(device)
    classes = denoiser.network.config["classes"]
    captions = labels[:number] if isinstance(labels, list) and "encoder" in denoiser.network.config else None
    if captions is not None:
        conditions = denoiser.network.encoder.tokenise(captions).to(device)
    elif given is not None:
        conditions = GIVEN[given](images)
    elif classes is None:
        conditions = None
    elif isinstance(labels, Tensor):
        conditions = labels[:number].to(device)
    else:
        raise ValueError(f"this model is told classes, but {dataset} has no labels to tell it.")
    figures = _losses(denoiser, images, conditions, seed)
    walker = Guided(denoiser, weight) if weight else denoiser
    walk = {"steps": steps, "eta": eta, "variance": variance}
    if captions is not None:
        drawn = _draw(walker, images.shape, conditions, seed, **walk)
        shown = _share_shown if dataset == "scenes" else _share_nearest
        figures["captions shown, samples"] = shown(drawn, captions)
        figures["captions shown, held-out"] = shown(images, captions)
        return figures
    if given is not None:
        drawn = _draw(walker, images.shape, conditions, seed, **walk)
        figures["PSNR, samples"] = float(10 * torch.log10(4 / (drawn - images).square().flatten(1).mean(1)).mean())
        return figures
    if inception:
        judge = Inception().to(device)
        training = load_images(dataset, "train", root=root, image_size=size)[0]
    elif f"{dataset}-classifier" in shipped_names():
        judge = pretrained_classifier(dataset).to(device)
        training = load_images(dataset, "train", root=root)[0][:REFERENCES]
    else:
        return figures
    training = _features(judge, training)
    held_out = _features(judge, images)
    wanted = None if classes is None else torch.arange(number, device=device) % classes
    features = _features(judge, _draw(walker, (number, *images.shape[1:]), wanted, seed, **walk))
    figures["Frechet distance, samples to training"] = frechet_distance(features, training)
    figures["Frechet distance, held-out to training"] = frechet_distance(held_out, training)
    few, generator = min(number, len(training), REFERENCES), torch.Generator().manual_seed(seed)
    some = training[torch.randperm(len(training), generator=generator)[:few].to(device)]
    figures["precision"], figures["recall"] = precision_recall(some, features[:few])
    if inception:
        figures["Inception score, samples"] = inception_score(judge.head(features))
    elif wanted is not None:
        figures["label accuracy, samples"] = _accuracy(judge.head(features), wanted)
        figures["label accuracy, held-out"] = _accuracy(judge.head(held_out), conditions)
    return figures


def _draw(denoiser: Denoiser | Guided, shape: tuple, conditions: Tensor | None, seed: int, **walk) -> Tensor:
    """Samples in parts, with the noise of the seed."""
    generator, samples = torch.Generator().manual_seed(seed), []
    device = next(denoiser.parameters()).device
    for start in range(0, shape[0], BATCH):
        noise = torch.randn(min(BATCH, shape[0] - start), *shape[1:], generator=generator).to(device)
        condition = None if conditions is None else conditions[start : start + BATCH]
        samples.append(sample(denoiser, x_T=noise, condition=condition, generator=generator, **walk).clamp(-1, 1))
    return torch.cat(samples)


def _share_shown(images: Tensor, captions: list[str]) -> float:
    """Share of the scenes that show their whole caption."""
    return sum(satisfies(image, caption)["all"] for image, caption in zip(images, captions)) / len(captions)


def _losses(denoiser: Denoiser, images: Tensor, labels: Tensor | None, seed: int) -> dict[str, float]:
    """Mean loss on the images for each quarter of the steps, one random step of the quarter per image."""
    T, generator = denoiser.schedule.T, torch.Generator().manual_seed(seed)
    if T < 4:
        raise ValueError(f"the losses are told for quarters of the steps; this schedule has only {T}.")
    figures = {}
    for quarter in range(4):
        low, high = quarter * T // 4 + 1, (quarter + 1) * T // 4
        t = torch.randint(low, high + 1, (len(images),), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        t, eps = t.to(images.device), eps.to(images.device)
        columns = [images, t, eps] if labels is None else [images, t, eps, labels]
        with torch.no_grad(), _evaluating(denoiser):
            losses = [simple_loss(denoiser, *part) for part in zip(*(column.split(BATCH) for column in columns))]
        figures[f"loss on held-out images, t = {low} to {high}"] = float(torch.cat(losses).mean())
    return figures


@torch.no_grad()
def _features(judge: Classifier | Inception, images: Tensor) -> Tensor:
    device = next(judge.parameters()).device
    return torch.cat([judge.features(as_floats(x.to(device))) for x in images.split(BATCH)])


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _share_nearest(images: Tensor, names: list[str]) -> float:
    """Share of the pictures that are nearer to the emoji of this name than to any other."""
    every, known = emoji("all")
    nearest = torch.cdist(images.flatten(1).cpu(), as_floats(every).flatten(1)).argmin(1)
    return sum(known[i] == name for i, name in zip(nearest, names)) / len(names)
