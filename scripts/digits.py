"""Train the digits model that the package ships, and measure it: ``make digits``.

The run saves itself every 500 steps and goes on from there if it is stopped. ``python -m scripts.digits --measure``
only measures the shipped file.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ddpm_lib import (
    Denoiser,
    Schedule,
    Trainer,
    UNet,
    digits,
    frechet_distance,
    pretrained,
    pretrained_classifier,
    sample,
    save_denoiser,
)

ROOT = Path(__file__).parent.parent
RUN = ROOT / "_build" / "digits-run.safetensors"
SHIPPED = ROOT / "ddpm_lib" / "models" / "digits.safetensors"
NETWORK = {
    "image_size": 8,
    "in_channels": 1,
    "base_channels": 24,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "dropout": 0.1,
    "groups": 8,
    "classes": 10,
}
STEPS = 4000
OPTIONS = {"batch_size": 64, "learning_rate": 2e-3, "warmup": 200, "decay_steps": STEPS, "ema_decay": 0.999}


def train() -> None:
    torch.manual_seed(0)
    trainer = Trainer(Denoiser(UNet(**NETWORK), Schedule.linear()), *digits("train"), **OPTIONS, precision="float32")
    if RUN.exists():
        trainer.resume(RUN)
    progress = tqdm(total=STEPS, initial=trainer.step, unit="step")
    for log in trainer.run(STEPS - trainer.step):
        progress.update()
        if log.step % 50 == 0:
            progress.set_postfix(loss=f"{log.loss:.4f}")
        if log.step % 500 == 0:
            trainer.save(RUN)
    progress.close()
    save_denoiser(trainer.ema, SHIPPED)
    RUN.unlink()


def measure() -> None:
    """Print what the model card states: 450 samples, as many as there are real test digits."""
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
    if "--measure" not in sys.argv[1:]:
        train()
    measure()
