"""Does the model of captioned scenes draw what it is told? ``python -m scripts.scenes_results``.

Writes ddpm_lib/datasets/scenes_results.json, where the chapter on text to image reads it: for fresh captions of every
split and family, for several weights of guidance and for several walks, the share of samples that show what their
caption says, for each attribute and in full, as ``scene_reader`` reads them. The weight may change on the way: 'early'
holds while the noise is stronger than the signal, 'late' from there on. About an hour on one core; after each row the
file is written; rows that are there already for this model are kept, so that a run that was stopped can go on.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Denoiser, Guided, pretrained, sample
from ddpm_lib.checkpoint import read_tensors, shipped, write_file
from ddpm_lib.scene_reader import read_scene, satisfies
from ddpm_lib.scenes import FAMILIES, SPLITS, scenes

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "scenes_results.json"
SETTINGS = {"captions": 500, "variance": "beta_tilde", "seed": 2}
WALK = {"steps": 30, "eta": 1.0}
WALKS = [{"steps": steps, "eta": eta} for steps in (10, 30, 100) for eta in (0.0, 1.0)]
PLAIN = {"early": 1.0, "late": 1.0}
STRONG_EARLY = {"early": 4.0, "late": 1.0}  # chosen on other captions than these
WEIGHTS = [{"early": weight, "late": weight} for weight in (0.0, 2.0, 4.0)] + [{"early": 1.0, "late": 4.0}]
BATCH = 100
NONE_SUCH = ("held-out pairs", "counts")
SAMPLED = [(split, family) for split in SPLITS[1:] for family in FAMILIES if (split, family) != NONE_SUCH]


def rows() -> list[dict]:
    """What is sampled: all splits in two ways, other weights on captions of the training law, other walks on pairs."""
    usual = [{"split": split, "family": family, **PLAIN, **WALK} for split, family in SAMPLED]
    of_law = [row for row in usual if row["split"] == "test"]
    return [
        *usual,
        *(row | STRONG_EARLY for row in usual),
        *(row | weight for weight in WEIGHTS for row in of_law),
        *(of_law[0] | walk for walk in WALKS if walk != WALK),
    ]


def guided(model: Denoiser, early: float, late: float) -> Guided:
    """Guidance of one weight while the noise is stronger than the signal, and of another from there on."""
    schedule = model.schedule
    return Guided(model, lambda x_t, t: early if schedule.noise[t] > schedule.signal[t] else late)


def draw(model: Denoiser, captions: list[str], early: float, late: float, steps: int, eta: float) -> Iterator[Tensor]:
    tokens = model.network.encoder.tokenise(captions)
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(SETTINGS["seed"]))
    walk = {
        "steps": steps,
        "eta": eta,
        "variance": SETTINGS["variance"],
        "generator": torch.Generator().manual_seed(SETTINGS["seed"] + 1),
    }
    for x_T, condition in zip(noise.split(BATCH), tokens.split(BATCH)):
        yield from sample(guided(model, early, late), x_T=x_T, condition=condition, **walk)


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


def measured(model: Denoiser, row: dict) -> dict:
    """The row with its figures."""
    _, captions = scenes(SETTINGS["captions"], row["split"], SETTINGS["seed"], row["family"])
    told = {name: value for name, value in row.items() if name not in ("split", "family")}
    return row | measure(draw(model, captions, **told), captions)


def real(split: str, family: str) -> dict:
    """The figures of the scenes that the captions were written for."""
    images, captions = scenes(SETTINGS["captions"], split, SETTINGS["seed"], family)
    return {"split": split, "family": family, **measure((image / 127.5 - 1 for image in images), captions)}


def main() -> None:
    model, digest = pretrained("scenes"), read_tensors(shipped("scenes"))[0]["sha256"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if (results.get("model"), results.get("settings")) != (digest, SETTINGS):
        results = {"model": digest, "settings": SETTINGS, "real": [real(*asked) for asked in SAMPLED], "sampled": []}
    done = [{name: row[name] for name in rows()[0]} for row in results["sampled"]]
    for row in tqdm([row for row in rows() if row not in done]):
        results["sampled"].append(measured(model, row))
        write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    for row in results["real"] + results["sampled"]:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
