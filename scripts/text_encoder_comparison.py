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
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_lib import Denoiser, Guided, Trainer, UNet, frechet_distance, sample
from ddpm_lib.checkpoint import write_file
from ddpm_lib.recipe import Recipe
from ddpm_lib.scenes import LONGEST, VOCABULARY, scenes
from ddpm_lib.text import TextEncoder, TextUNet
from scripts import text_encoder
from scripts.scenes_results import measure
from scripts.training_signals import rounded

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "text_encoders.json"
SETTINGS = {"steps": 1500, "scenes": 60_000, "pretraining": 2000, "captions": 500, "weight": 1.0, "walk": 20}
ENCODER = {"objective": "objects", "width": 64, "layers": 2}  # the shipped one
VARIANTS = {  # how the encoder learned to read (None: with the U-Net), or what else differs from the shipped model
    **{name: {"objective": name} for name in ("words", "pictures", "names", "tables", "objects")},
    "joint": {"objective": None},
    "width 32": {"width": 32},
    "width 128": {"width": 128},
    "one layer": {"layers": 1},
    "no layer": {"layers": 0},
    "no coordinates": {"coordinates": False},
    "less noise": {"snr_scale": 0.25},
}


def encoder(objective: str | None, width: int, layers: int) -> TextEncoder:
    """The encoder, pre-trained and frozen unless it is to learn with the U-Net."""
    if objective is None:
        torch.manual_seed(0)
        return TextEncoder(VOCABULARY, LONGEST, width, layers)
    steps = SETTINGS["pretraining"]
    for reader, _ in tqdm(text_encoder.train(objective, steps, width, layers), total=steps):  # noqa: B007
        pass
    return reader.eval().requires_grad_(False)


def train(reader: TextEncoder, recipe: Recipe) -> Denoiser:
    """The averaged model; an encoder that is not pre-trained learns, too, by the same optimiser."""
    like = recipe.denoiser()
    learns = any(p.requires_grad for p in reader.parameters())
    torch.manual_seed(0)
    network = TextUNet(reader, UNet(**asdict(recipe.network), text_channels=reader.width))
    network.encoder.requires_grad_(learns)
    images, captions = scenes(SETTINGS["scenes"], family="pairs")
    steps = SETTINGS["steps"]
    trainer = Trainer(
        Denoiser(network, like.schedule, like.predicts),
        images,
        reader.tokenise(captions),
        **recipe.trainer_options() | {"decay_steps": steps, "ema_decay": 0.995},
    )
    for _ in tqdm(trainer.run(steps), total=steps):
        pass
    return trainer.ema


def judged(model: Denoiser, eye: nn.Module) -> dict:
    figures = {}
    for split in ("test", "held-out pairs"):
        images, captions = scenes(SETTINGS["captions"], split, seed=1, family="pairs")
        drawn = draw(model, captions)
        with torch.no_grad():
            distance = frechet_distance(eye(drawn), eye(images / 127.5 - 1))
        figures[split] = measure(iter(drawn), captions) | {"frechet": distance}
    return figures


def draw(model: Denoiser, captions: list[str]) -> Tensor:
    tokens = model.network.encoder.tokenise(captions)
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = [
        sample(Guided(model, SETTINGS["weight"]), x_T=x, condition=c, steps=SETTINGS["walk"], eta=0.0)
        for x, c in zip(noise.split(250), tokens.split(250))
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
    shipped = Recipe.load("scenes")
    usual = ENCODER | {"coordinates": shipped.network.coordinates, "snr_scale": shipped.noise.snr_scale}
    for name in names:
        settings = usual | VARIANTS[name]
        reader = encoder(*(settings[key] for key in ("objective", "width", "layers")))
        recipe = replace(
            shipped,
            network=replace(shipped.network, coordinates=settings["coordinates"]),
            noise=replace(shipped.noise, snr_scale=settings["snr_scale"]),
        )
        row = settings | {"weights": sum(p.numel() for p in reader.parameters())} | judged(train(reader, recipe), eye)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if results.get("settings") != SETTINGS:
            results = {"settings": SETTINGS, "rows": {}}
        results["rows"][name] = rounded(row)
        write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
