"""Print what the card of a shipped model states: ``python -m scripts.model_card digits`` (or ``fashion-mnist``)."""

import sys

import torch

from ddpm_lib import frechet_distance, load_images, pretrained, pretrained_classifier, sample

DDIM = {"steps": 50, "eta": 0.0}
ANCESTRAL = {"steps": 100, "variance": "beta_tilde"}
WALKS = {
    "digits": {"DDIM, 50 steps": DDIM, "ancestral, 100 steps": ANCESTRAL, "ancestral, 1,000 steps": {}},
    "fashion-mnist": {"DDIM, 50 steps": DDIM, "ancestral, 100 steps": ANCESTRAL},
}
NUMBER = {"digits": 450, "fashion-mnist": 1000}  # samples, and held-out images beside them
REFERENCES = 10_000  # training images, at most, for Frechet distances


def measure(name: str) -> None:
    """Label accuracy, Frechet distances and nearest training images of samples, real held-out images and noise."""
    number, judge = NUMBER[name], pretrained_classifier(name)
    training = images(name, "train")
    test, labels = images(name, "test")[:number], load_images(name, "test")[1][:number]
    features = {"training": in_parts(judge.features, training[:REFERENCES]), "test": in_parts(judge.features, test)}
    right = accuracy(judge, features["test"], labels)
    print(f"real test images: label accuracy {right:.3f}, ", end="")
    print(f"distance {frechet_distance(features['test'], features['training']):.2f} to training, ", end="")
    print(f"nearest training image {nearest(test, training):.3f}")
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
    print(f"noise: distance {frechet_distance(in_parts(judge.features, noise), features['training']):.1f}")
    label = torch.arange(number) % 10
    model = pretrained(name)
    for walk, options in WALKS[name].items():
        drawn = sample(model, test.shape, condition=label, generator=torch.Generator().manual_seed(0), **options)
        seen = in_parts(judge.features, drawn.clamp(-1, 1))
        distances = [f"{frechet_distance(seen, features[split]):.2f} to {split}" for split in ("training", "test")]
        print(
            f"{walk}: label accuracy {accuracy(judge, seen, label):.3f}, distance {', '.join(distances)}, "
            f"nearest training image {nearest(drawn, training):.3f}",
            flush=True,
        )


def images(name: str, split: str) -> torch.Tensor:
    """All images of a split, in [-1, 1]."""
    found = load_images(name, split)[0]
    return found / 127.5 - 1 if found.dtype == torch.uint8 else found


def in_parts(function, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(part) for part in x.split(500)])


def accuracy(judge, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float((judge.head(features).argmax(1) == labels).double().mean())


def nearest(found: torch.Tensor, references: torch.Tensor) -> float:
    """Median over images of the root-mean-square distance to the nearest reference."""
    distances = in_parts(lambda part: torch.cdist(part.flatten(1), references.flatten(1)).min(1).values, found)
    return float(distances.median()) / found[0].numel() ** 0.5


if __name__ == "__main__":
    measure(sys.argv[1])
