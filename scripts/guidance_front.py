"""Measure guidance on Fashion-MNIST, whose data are not shipped: ``python -m scripts.guidance_front``.

Writes ddpm_lib/datasets/guidance_fashion.json: label accuracy, Frechet distance, precision and recall of 1,000 samples
of the shipped model for each weight, judged by the shipped classifier. Needs the data (see README); about ten minutes
on one core.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import (
    Classifier,
    Guided,
    fashion_mnist,
    frechet_distance,
    precision_recall,
    pretrained,
    pretrained_classifier,
    sample,
)

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "guidance_fashion.json"
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
NUMBER, STEPS, REFERENCES = 1000, 10, 10_000


def features(judge: Classifier, images: Tensor) -> Tensor:
    """Of images in [-1, 1], or of bytes."""
    if images.dtype == torch.uint8:
        images = images / 127.5 - 1
    return torch.cat([judge.features(part) for part in images.split(500)])


def measure(judge: Classifier, images: Tensor, labels: Tensor, training: Tensor) -> dict:
    found = features(judge, images)
    precision, recall = precision_recall(training[:NUMBER], found)
    return {
        "accuracy": round(float((judge.head(found).argmax(1) == labels).double().mean()), 3),
        "frechet": round(frechet_distance(found, training), 2),
        "precision": round(precision, 3),
        "recall": round(recall, 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    network, judge = pretrained("fashion-mnist"), pretrained_classifier("fashion-mnist")
    training = features(judge, fashion_mnist("train")[0][:REFERENCES])
    images, labels = fashion_mnist("test")
    results = {
        "settings": {"samples": NUMBER, "references": REFERENCES, "steps": STEPS, "eta": 0.0},
        "real": measure(judge, images[:NUMBER], labels[:NUMBER], training),
        "guided": [],
    }
    labels = torch.arange(NUMBER) % 10
    for weight in tqdm(WEIGHTS, unit="weight"):
        x_T = torch.randn(NUMBER, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        drawn = []
        for noise, label in zip(x_T.split(100), labels.split(100)):
            drawn.append(sample(Guided(network, weight), x_T=noise, steps=STEPS, eta=0.0, condition=label).clamp(-1, 1))
        results["guided"].append({"weight": weight} | measure(judge, torch.cat(drawn), labels, training))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
