"""Does the model of captioned scenes draw what it is told? ``python -m scripts.scenes_results [MODEL.safetensors]``.

Writes ddpm_lib/datasets/scenes_results.json, where the chapter on text to image reads it: for fresh captions of every
split and family, and for several weights of guidance, the share of samples that show what their caption says, for each
attribute and in full, as ``scene_reader`` reads them. About 25 minutes on one core, after each row the file is written;
rows that are there already for this model are kept, so that a run that was stopped can go on.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Denoiser, Guided, load_denoiser, sample
from ddpm_lib.checkpoint import read_tensors, shipped, write_file
from ddpm_lib.scene_reader import read_scene, satisfies
from ddpm_lib.scenes import FAMILIES, SPLITS, scenes

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "scenes_results.json"
SETTINGS = {"captions": 500, "steps": 15, "eta": 0.0, "seed": 1}
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
BATCH = 100
NONE_SUCH = ("held-out pairs", "counts")
SAMPLED = [(split, family) for split in SPLITS[1:] for family in FAMILIES if (split, family) != NONE_SUCH]


def rows() -> list[tuple[str, str, float]]:
    """Split, family and weight of every row: all splits at weight 1, then the other weights on fresh captions."""
    others = [("test", family, weight) for family in FAMILIES for weight in WEIGHTS if weight != 1.0]
    return [(split, family, 1.0) for split, family in SAMPLED] + others


def draw(model: Denoiser, captions: list[str], weight: float) -> Iterator[Tensor]:
    tokens = model.network.encoder.tokenise(captions)
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(SETTINGS["seed"]))
    for x_T, condition in zip(noise.split(BATCH), tokens.split(BATCH)):
        walk = {"steps": SETTINGS["steps"], "eta": SETTINGS["eta"]}
        yield from sample(Guided(model, weight), x_T=x_T, condition=condition, **walk)


def measure(images: Iterator[Tensor], captions: list[str]) -> dict[str, float]:
    """Share of pictures that satisfy 'all' that their caption states; of things stated, shares that are right; RMSE."""
    whole, right, rmse = [], {}, []
    for image, caption in tqdm(zip(images, captions), total=len(captions), leave=False):
        reading = read_scene(image)
        verdict = satisfies(reading, caption)
        whole.append(verdict.pop("all"))
        for name, value in verdict.items():
            right.setdefault(name.split()[0], []).append(value)
        rmse.append(reading.rmse)
    shares = {name: round(sum(values) / len(values), 3) for name, values in {"all": whole, **right}.items()}
    return shares | {"rmse": round(sum(rmse) / len(rmse), 4)}


def main(path: Path) -> None:
    model, digest = load_denoiser(path), read_tensors(path)[0]["sha256"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if (results.get("model"), results.get("settings")) != (digest, SETTINGS):
        results = {"model": digest, "settings": SETTINGS, "real": [], "sampled": []}
        for split, family in SAMPLED:
            images, captions = scenes(SETTINGS["captions"], split, SETTINGS["seed"], family)
            figures = measure((image / 127.5 - 1 for image in images), captions)
            results["real"].append({"split": split, "family": family, **figures})
    done = {(row["split"], row["family"], row["weight"]) for row in results["sampled"]}
    for split, family, weight in tqdm([row for row in rows() if row not in done]):
        _, captions = scenes(SETTINGS["captions"], split, SETTINGS["seed"], family)
        figures = measure(draw(model, captions, weight), captions)
        results["sampled"].append({"split": split, "family": family, "weight": weight, **figures})
        write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    for row in results["real"] + results["sampled"]:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else shipped("scenes"))
