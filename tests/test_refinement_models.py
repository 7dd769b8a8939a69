"""The shipped models for super-resolution and deblurring give what their cards say, on the package's test images."""

import re
from importlib import resources

import numpy as np
import pytest
import torch

from ddpm_lib import pretrained, sample
from ddpm_lib.checkpoint import MODELS
from ddpm_lib.degradation import GIVEN


@pytest.mark.parametrize("given", ["coarse", "blurred"])
def test_the_card_says_how_near_a_draw_comes(given):
    file = np.load(str(resources.files("ddpm_lib") / "datasets" / "fashion_examples.npz"))
    images = torch.from_numpy(file["images"]).float()[:, None] / 127.5 - 1
    shown = GIVEN[given](images)
    options = {"steps": 25, "variance": "beta_tilde", "generator": torch.Generator().manual_seed(0)}
    drawn = sample(pretrained(f"fashion-mnist-{given}"), images.shape, condition=shown, **options)
    degraded = (GIVEN[given](drawn) - shown).square().mean().sqrt()
    card = (MODELS / f"fashion-mnist-{given}.md").read_text(encoding="utf-8")
    said = [float(number) for number in re.search(r"\| one draw \| ([\d.]+) dB \| ([\d.]+) \|", card).groups()]
    bicubic = float(re.search(r"\| what it is shown \| ([\d.]+) dB", card)[1])
    measured = [10 * np.log10(4 / float((part - images).square().mean())) for part in (drawn, shown)]
    assert measured == pytest.approx([said[0], bicubic], abs=0.1)
    assert float(degraded) == pytest.approx(said[1], rel=0.1)
