"""Print what the card of the digits model states: ``python -m scripts.digits``; ``make digits`` trains it first."""

import torch

from ddpm_lib import digits, frechet_distance, pretrained, pretrained_classifier, sample


def measure() -> None:
    """450 samples, as many as there are real test digits."""
    classifier = pretrained_classifier()
    train_images, test_images = digits("train")[0], digits("test")[0]
    train_features, test_features = classifier.features(train_images), classifier.features(test_images)
    label = torch.arange(450) % 10
    noise = torch.randn(450, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    print(f"real test digits: distance {frechet_distance(test_features, train_features):.2f}, ", end="")
    print(f"nearest training image {nearest(test_images, train_images):.3f}")
    print(f"noise: distance {frechet_distance(classifier.features(noise), train_features):.1f}")
    for name, options in {
        "DDIM, 50 steps": {"steps": 50, "eta": 0.0},
        "ancestral, 100 steps": {"steps": 100, "variance": "beta_tilde"},
        "ancestral, 1,000 steps": {},
    }.items():
        generator = torch.Generator().manual_seed(0)
        images = sample(pretrained("digits"), (450, 1, 8, 8), label=label, generator=generator, **options)
        features = classifier.features(images.clamp(-1, 1))
        right = float((classifier.head(features).argmax(1) == label).double().mean())
        print(
            f"{name}: label accuracy {right:.3f}, "
            f"distance {frechet_distance(features, train_features):.2f} to training, "
            f"{frechet_distance(features, test_features):.2f} to test digits, "
            f"nearest training image {nearest(images, train_images):.3f}"
        )


def nearest(images: torch.Tensor, references: torch.Tensor) -> float:
    """Median over images of the root-mean-square distance to the nearest reference."""
    distances = torch.cdist(images.flatten(1), references.flatten(1)).min(1).values
    return float(distances.median()) / images[0].numel() ** 0.5


if __name__ == "__main__":
    measure()
