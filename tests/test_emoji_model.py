"""The shipped model of emoji does what its card says."""

import re

import pytest
import torch

from ddpm_lib import pretrained, sample
from ddpm_lib.checkpoint import MODELS
from ddpm_lib.data import as_floats, emoji

NUMBER = 60


@pytest.fixture(scope="module")
def card() -> dict[str, tuple[float, float]]:
    """Of each split: the share with no other emoji nearer than the one asked for, and the median distance to it."""
    text = (MODELS / "emoji.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (train|test) \| ([\d.]+)% \| ([\d.]+) \|$", text, re.MULTILINE)
    return {split: (float(share) / 100, float(distance)) for split, share, distance in rows}


@pytest.mark.parametrize("split", ["train", "test"])
def test_names_are_drawn_as_the_card_says(split, card):
    model, (images, names) = pretrained("emoji"), emoji(split)
    every, known = emoji("all")
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(3))[:NUMBER]
    tokens = model.network.encoder.tokenise([names[i] for i in chosen])
    options = {"steps": 20, "variance": "beta_tilde", "generator": torch.Generator().manual_seed(4)}
    drawn = sample(model, (NUMBER, 3, 32, 32), condition=tokens, **options).clamp(-1, 1)
    away = torch.cdist(drawn.flatten(1), as_floats(every).flatten(1)) / drawn[0].numel() ** 0.5
    asked = torch.tensor([known.index(names[i]) for i in chosen])
    right = float((away[range(NUMBER), asked] <= away.min(1).values + 1e-3).double().mean())
    share, distance = card[split]
    assert right == pytest.approx(share, abs=3 * (share * (1 - share) / NUMBER + 1 / NUMBER**2) ** 0.5)
    off = (drawn - as_floats(images)[chosen]).square().flatten(1).mean(1).sqrt().median()
    assert float(off) == pytest.approx(distance, rel=0.25)
