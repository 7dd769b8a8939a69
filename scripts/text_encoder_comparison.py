"""What the text encoder does for the picture: the same U-Net, trained alike, beside one encoder after another.

    python -m scripts.text_encoder_comparison NAME ...   # of VARIANTS; about half an hour each on one core

adds or replaces a row each in ``ddpm_lib/datasets/text_encoders.json``, where the chapter on text to image reads them.
The scenes are pairs of objects. A row holds the share of 500 samples that show what their caption says, for each
attribute and in full, on captions of the training law and on pairs of objects that were never shown; and the Frechet
distance of the samples to as many real scenes, in the features of a small network that was trained to match pictures
with captions.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_lib import Denoiser, Guided, Trainer, UNet, frechet_distance, sample
from ddpm_lib.checkpoint import write_file
from ddpm_lib.recipe import Recipe
from ddpm_lib.scene_reader import satisfies
from ddpm_lib.scenes import LONGEST, VOCABULARY, scenes
from ddpm_lib.text import TextEncoder, TextUNet
from scripts import text_encoder
from scripts.training_signals import rounded

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "text_encoders.json"
STEPS, SCENES, PRETRAINING = 2500, 60_000, 2000
VARIANTS = {  # how the encoder learned to read, its width and its layers
    "joint": (None, 64, 2),
    "words": ("words", 64, 2),
    "pictures": ("pictures", 64, 2),
    "names": ("names", 64, 2),
    "tables": ("tables", 64, 2),
    "objects": ("objects", 64, 2),
    "objects, width 32": ("objects", 32, 2),
    "objects, width 128": ("objects", 128, 2),
    "objects, 1 layer": ("objects", 64, 1),
    "objects, no layer": ("objects", 64, 0),
}
WALK = {"steps": 20, "eta": 0.0}
WEIGHT = 1.0


def encoder(objective: str | None, width: int, layers: int) -> tuple[TextEncoder, float | None]:
    """The encoder, pre-trained unless it is to learn with the U-Net, with its last loss."""
    if objective is None:
        torch.manual_seed(0)
        return TextEncoder(VOCABULARY, LONGEST, width, layers), None
    for reader, loss in tqdm(text_encoder.train(objective, PRETRAINING, width, layers), total=PRETRAINING):  # noqa: B007
        pass
    return reader.eval(), loss


def train(reader: TextEncoder, jointly: bool) -> Denoiser:
    """The averaged model after STEPS steps of the recipe of the shipped one, but for what it reads."""
    recipe = Recipe.load("scenes")
    shipped = recipe.denoiser()
    torch.manual_seed(0)
    network = TextUNet(reader, UNet(**asdict(recipe.network), text_channels=reader.width))
    network.encoder.requires_grad_(jointly)
    images, captions = scenes(SCENES, family="pairs")
    trainer = Trainer(
        Denoiser(network, shipped.schedule, shipped.predicts),
        images,
        reader.tokenise(captions),
        **recipe.trainer_options() | {"decay_steps": STEPS, "ema_decay": 0.995},
    )
    for _ in tqdm(trainer.run(STEPS), total=STEPS):
        pass
    return trainer.ema


def measure(model: Denoiser, eye: nn.Module) -> dict:
    figures = {}
    for split in ("test", "held-out pairs"):
        images, captions = scenes(500, split, seed=1, family="pairs")
        drawn = draw(model, captions)
        verdicts = [satisfies(image, caption) for image, caption in zip(drawn, captions)]
        names = dict.fromkeys(name for verdict in verdicts for name in verdict)
        found = {name: [verdict[name] for verdict in verdicts if name in verdict] for name in names}
        figures[split] = {name: sum(values) / len(values) for name, values in found.items()}
        with torch.no_grad():
            figures[split]["frechet"] = frechet_distance(eye(drawn), eye(images / 127.5 - 1))
    return figures


def draw(model: Denoiser, captions: list[str]) -> Tensor:
    tokens = model.network.encoder.tokenise(captions)
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = [
        sample(Guided(model, WEIGHT), x_T=x, condition=c, **WALK) for x, c in zip(noise.split(250), tokens.split(250))
    ]
    return torch.cat(parts).clamp(-1, 1)


def judge() -> nn.Module:
    """The network that sees, from training with captions, with features that no encoder under test has touched."""
    torch.manual_seed(1)
    reader = TextEncoder(VOCABULARY, LONGEST, 64, 2)
    tokens = reader.tokenise(scenes(text_encoder.SCENES)[1])
    parts, loss = text_encoder.pictures(reader, tokens)
    optimiser = torch.optim.Adam([*reader.parameters(), *parts.parameters()], lr=1e-3)
    for _ in tqdm(range(1000)):
        optimiser.zero_grad()
        loss(torch.randint(text_encoder.SCENES, (text_encoder.BATCH,))).backward()
        optimiser.step()
    return parts["eye"].eval()


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    eye = judge()
    for name in names:
        objective, width, layers = VARIANTS[name]
        reader, loss = encoder(objective, width, layers)
        figures = measure(train(reader, objective is None), eye)
        row = {"pretraining": objective, "width": width, "layers": layers, "loss": loss, **figures}
        row["parameters"] = sum(p.numel() for p in reader.parameters())
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        write_file(RESULTS, (json.dumps(rows | {name: rounded(row)}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
