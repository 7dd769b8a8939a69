"""The measure of the comparison of text encoders, on pictures whose answer is known, and its stored rows."""

import json

import pytest
import torch

from ddpm_lib.scenes import Item, Scene, captioned_scenes, draw_scene, scenes
from scripts import text_encoder_comparison as comparison
from scripts.text_encoder_comparison import coloured, differ, halved, shares

PAIRS = {"n": 300, "split": "test", "seed": 5, "family": "pairs"}


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return halved(scenes(**PAIRS)[0]) / 127.5 - 1


def test_real_scenes_have_the_colours_of_their_captions_in_the_right_order(real):
    assert shares(real, captioned_scenes(**PAIRS)) == {"colours": 1, "in order": 1}


def test_mirrored_scenes_have_them_in_the_wrong_order(real):
    assert shares(real.flip(2, 3), captioned_scenes(**PAIRS)) == {"colours": 1, "in order": 0}


def test_a_colour_that_is_missing_does_not_count():
    red, blue = Item("circle", "red", "large", 8.0, 16.0), Item("ring", "blue", "small", 24.0, 16.0)
    asked = Scene("black", (red, blue), "left to right")
    for items, expected in (((red,), (False, False)), ((red, blue), (True, True))):
        picture = halved((draw_scene(Scene("black", items))[None] + 1) * 127.5)[0] / 127.5 - 1
        assert coloured(picture, asked) == expected


def test_objects_of_one_colour_are_left_out():
    made = captioned_scenes(**PAIRS)
    same = [scene for scene, _ in made if len({item.colour for item in scene.items}) == 1]
    assert same
    assert not any(map(differ, same))
    assert sum(differ(scene) for scene, _ in made) == len(made) - len(same)


def test_half_the_size_has_a_quarter_of_the_noise():
    noise = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = halved(127.5 + 20 * noise).float() - 127.5
    assert pytest.approx(float(400 / small.var()), rel=0.05) == comparison.HALVED


def test_every_variant_has_its_row():
    stored = json.loads(comparison.RESULTS.read_text())
    assert stored["settings"] == comparison.SETTINGS
    assert stored["rows"].keys() == comparison.VARIANTS.keys()
    for name, row in stored["rows"].items():
        assert comparison.VARIANTS[name].items() <= row.items()
        assert [look["images"] for look in row["test"]] == [32_000, 64_000, 96_000, 128_000]
        for look in (*row["test"], row["held-out pairs"]):
            assert 0 <= look["in order"] <= look["colours"] <= 1
