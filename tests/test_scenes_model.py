"""The shipped model of captioned scenes draws what its card says, on captions that no script has used."""

import json
from pathlib import Path

import pytest
import torch

from ddpm_lib import Guided, pretrained, sample
from ddpm_lib.scene_reader import read_scene, satisfies
from ddpm_lib.scenes import scenes

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "scenes_results.json"
NUMBER = 60


@pytest.mark.parametrize("split", ["test", "held-out pairs"])
def test_pairs_are_drawn_as_often_as_the_card_says(split):
    rows = json.loads(RESULTS.read_text())["sampled"]
    (row,) = (r for r in rows if (r["split"], r["family"], r["weight"]) == (split, "pairs", 1.0))
    model = pretrained("scenes")
    _, captions = scenes(NUMBER, split, seed=77, family="pairs")
    tokens = model.network.encoder.tokenise(captions)
    options = {"steps": 15, "eta": 0.0, "generator": torch.Generator().manual_seed(7)}
    readings = [read_scene(x) for x in sample(Guided(model, 1.0), (NUMBER, 3, 32, 32), condition=tokens, **options)]
    right = [satisfies(reading, caption)["all"] for reading, caption in zip(readings, captions)]
    share, deviation = row["all"], (row["all"] * (1 - row["all"]) / NUMBER + 1 / NUMBER**2) ** 0.5
    assert sum(right) / NUMBER == pytest.approx(share, abs=3 * deviation)
    assert sum(reading.rmse for reading in readings) / NUMBER == pytest.approx(row["rmse"], rel=0.25)
