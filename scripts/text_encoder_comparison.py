"""What the text encoder does for the picture: the same U-Net, trained alike, beside one encoder after another.

    python -m scripts.text_encoder_comparison NAME ...   # of VARIANTS; about 10 minutes each on one core

adds or replaces a row each in ``ddpm_lib/datasets/text_encoders.json``, where the chapter on text to image reads them.
The scenes are pairs of objects at half their size, 16 x 16 pixels: a quarter of the work, colours and places are as
plain as before, and shapes, which are learned long after, are not judged. The U-Net is that of the recipe ``scenes``
with fewer levels and channels. A row says of 500 samples how many hold the two colours of their caption, and how many
hold them in the order that it states; on captions of the training law while the training lasts, and at its end also on
pairs of objects that were never shown; and the Frechet distance of the samples to as many real scenes, in the features
of a small network that was trained to match pictures with captions.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_lib import Denoiser, Guided, Trainer, UNet, frechet_distance, sample
from ddpm_lib.checkpoint import load_text_encoder, write_file
from ddpm_lib.recipe import Recipe
from ddpm_lib.scenes import BACKGROUNDS, COLOURS, LONGEST, VOCABULARY, Scene, captioned_scenes, colour_value, scenes
from ddpm_lib.text import TextEncoder, TextUNet
from scripts import text_encoder
from scripts.training_signals import rounded

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "text_encoders.json"
SETTINGS = {
    "size": 16,
    "scenes": 60_000,
    "pretraining": 2000,
    "judge": 1000,
    "base_channels": 32,
    "steps": 1000,
    "looks": 4,
    "captions": 500,
    "weight": 1.0,
    "walk": 10,
}
HALVED = 4.0  # a mean of four pixels has a quarter of their noise: as much is seen at four times the ratio
SPECK = 4  # pixels; less of a colour does not count
ENCODER = {"objective": "objects", "width": 64, "layers": 2}  # the shipped one
VARIANTS = {  # how the encoder learned to read (None: with the U-Net), or what else differs from the shipped one
    **{name: {"objective": name} for name in ("words", "pictures", "objects")},
    "joint": {"objective": None},
    "no layer": {"layers": 0},
    "one layer": {"layers": 1},
    "width 128": {"width": 128},
    "joint, large": {"objective": None, "width": 128, "layers": 4},
}


def halved(images: Tensor) -> Tensor:
    """Bytes (N, 3, 32, 32) as bytes (N, 3, 16, 16): means of four pixels."""
    return F.avg_pool2d(images.float(), 2).round().byte()


def encoder(objective: str | None, width: int, layers: int) -> TextEncoder:
    """The encoder, pre-trained and frozen unless it is to learn with the U-Net."""
    if objective is None:
        torch.manual_seed(0)
        return TextEncoder(VOCABULARY, LONGEST, width, layers)
    if (objective, width, layers) == tuple(ENCODER.values()):
        return load_text_encoder("scenes-text")
    steps = SETTINGS["pretraining"]
    for reader, _ in tqdm(text_encoder.train(objective, steps, width, layers), total=steps):  # noqa: B007
        pass
    return reader.eval().requires_grad_(False)


def train(reader: TextEncoder, recipe: Recipe) -> Iterator[tuple[int, Denoiser]]:
    """Images seen and averaged model, several times; an encoder that is not pre-trained learns, too."""
    like = recipe.denoiser()
    learns = any(p.requires_grad for p in reader.parameters())
    torch.manual_seed(0)
    network = TextUNet(reader, UNet(**asdict(recipe.network), text_channels=reader.width))
    network.encoder.requires_grad_(learns)
    images, captions = scenes(SETTINGS["scenes"], family="pairs")
    steps = SETTINGS["steps"]
    trainer = Trainer(
        Denoiser(network, like.schedule, like.predicts),
        halved(images),
        reader.tokenise(captions),
        **recipe.trainer_options() | {"decay_steps": steps, "ema_decay": 0.995},
    )
    for step in tqdm(trainer.run(steps), total=steps):
        if step.step % (steps // SETTINGS["looks"]) == 0:
            yield step.step * recipe.training.batch_size, trainer.ema


def draw(model: Denoiser, captions: list[str]) -> Tensor:
    tokens = model.network.encoder.tokenise(captions)
    size = SETTINGS["size"]
    noise = torch.randn(len(captions), 3, size, size, generator=torch.Generator().manual_seed(0))
    parts = [
        sample(Guided(model, SETTINGS["weight"]), x_T=x, condition=c, steps=SETTINGS["walk"], eta=0.0)
        for x, c in zip(noise.split(250), tokens.split(250))
    ]
    return torch.cat(parts).clamp(-1, 1)


def coloured(image: Tensor, scene: Scene) -> tuple[bool, bool]:
    """Whether both colours of a pair of objects are in the picture (3, H, W), and whether they are in their order."""
    palette = torch.stack([colour_value(rgb) for rgb in (COLOURS | BACKGROUNDS).values()])
    nearest = (image - palette[:, :, None, None]).norm(dim=1).argmin(dim=0)
    found = [(nearest == list(COLOURS).index(item.colour)).nonzero().float() for item in scene.items]
    if min(map(len, found)) < SPECK:
        return False, False
    first, second = (places.mean(0)[0 if scene.order == "top to bottom" else 1] for places in found)
    return True, bool(first < second)


def shares(drawn: Tensor, made: list[tuple[Scene, str]]) -> dict[str, float]:
    """Of the captions that name two colours: both are there; both are there in the stated order."""
    told = [coloured(image, scene) for image, (scene, _) in zip(drawn, made) if differ(scene)]
    there, in_order = zip(*told)
    return {"colours": sum(there) / len(told), "in order": sum(in_order) / len(told)}


def differ(scene: Scene) -> bool:
    return scene.items[0].colour != scene.items[1].colour


def judge() -> nn.Module:
    """The network that sees, from training with captions, with features that no encoder under test has touched."""
    torch.manual_seed(2)
    reader = TextEncoder(VOCABULARY, LONGEST, 64, 2)
    images, captions = scenes(text_encoder.SCENES)
    parts, loss = text_encoder.pictures(reader, reader.tokenise(captions), images)
    optimiser = torch.optim.Adam([*reader.parameters(), *parts.parameters()], lr=1e-3)
    for _ in tqdm(range(SETTINGS["judge"])):
        optimiser.zero_grad()
        loss(torch.randint(text_encoder.SCENES, (text_encoder.BATCH,))).backward()
        optimiser.step()
    return nn.Sequential(nn.Upsample(scale_factor=2), parts["eye"]).eval()


@torch.no_grad()
def judged(model: Denoiser, split: str, eye: nn.Module) -> dict[str, float]:
    made = captioned_scenes(SETTINGS["captions"], split, seed=1, family="pairs")
    real = halved(scenes(SETTINGS["captions"], split, seed=1, family="pairs")[0]) / 127.5 - 1
    drawn = draw(model, [caption for _, caption in made])
    return shares(drawn, made) | {"frechet": frechet_distance(eye(drawn), eye(real))}


def measure(variant: dict, eye: nn.Module) -> dict:
    """A row of the results."""
    large = Recipe.load("scenes")
    settings = ENCODER | variant
    reader = encoder(**settings)
    recipe = replace(
        large,
        network=replace(
            large.network,
            image_size=SETTINGS["size"],
            base_channels=SETTINGS["base_channels"],
            channel_multipliers=large.network.channel_multipliers[:2],
        ),
        noise=replace(large.noise, snr_scale=HALVED * large.noise.snr_scale),
    )
    course = []
    for seen, model in train(reader, recipe):
        course.append({"images": seen, **judged(model, "test", eye)})
    return {
        **settings,
        "weights": sum(p.numel() for p in reader.parameters()),
        "test": course,
        "held-out pairs": judged(model, "held-out pairs", eye),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    eye = judge()
    for name in names:
        row = measure(VARIANTS[name], eye)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if results.get("settings") != SETTINGS:
            results = {"settings": SETTINGS, "rows": {}}
        results["rows"][name] = rounded(row)
        write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
