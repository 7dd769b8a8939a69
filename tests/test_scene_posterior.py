"""The exact law of the colours given a grey picture, against scenes that were drawn."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from ddpm_lib.scene_posterior import (
    colour_posterior,
    entropy,
    look_alikes,
    luma,
    painted_colours,
    total_variation,
)
from ddpm_lib.scenes import BACKGROUNDS, COLOURS, SHAPES, Item, Scene, captioned_scenes, draw_scene, held_out_pair

FOUR = ("red", "green", "blue", "purple")
BYTES = {name: 0.299 * r + 0.587 * g + 0.114 * b for name, (r, g, b) in (COLOURS | BACKGROUNDS).items()}


def test_four_colours_share_their_luma_and_no_other_two_objects_do():
    assert look_alikes("green") == FOUR == look_alikes("purple")
    for colour in set(COLOURS) - set(FOUR):
        assert look_alikes(colour) == (colour,)
    for colour in COLOURS:
        assert luma(colour) == pytest.approx(BYTES[colour] / 127.5 - 1, abs=1e-6)
    apart = [abs(BYTES[a] - BYTES[b]) for a, b in combinations(COLOURS, 2) if not {a, b} <= set(FOUR)]
    assert min(apart) > 15
    assert set(COLOURS) & set(BACKGROUNDS) == {"white"}


@pytest.mark.parametrize(("family", "n"), [("counts", 10_000), ("pairs", 20_000), ("rows", 10_000)])
def test_the_posterior_is_the_share_among_drawn_scenes(family, n):
    """All scenes with the same shapes, lumas and background are one grey picture up to places, which say nothing."""
    seen, example = defaultdict(Counter), {}
    for scene, _ in captioned_scenes(n, "train", seed=5, family=family):
        key = tuple((item.shape, round(BYTES[item.colour])) for item in scene.items), scene.background
        seen[key][tuple(item.colour for item in scene.items)] += 1
        example[key] = scene
    statistic = variance = degrees = 0.0
    for key, counts in seen.items():
        law, total = colour_posterior(example[key], family), sum(counts.values())
        assert counts.keys() <= law.keys()
        assert sum(law.values()) == pytest.approx(1)
        expected = {colours: total * p for colours, p in law.items()}
        statistic += sum((counts[colours] - e) ** 2 / e for colours, e in expected.items())
        k = len(law)
        degrees += k - 1
        variance += 2 * (k - 1) * (1 - 1 / total)  # of Pearson's statistic, exactly, for equal probabilities
    z = (statistic - degrees) / math.sqrt(variance)
    assert abs(z) < 4, f"{z:.1f} standard errors off"
    assert degrees > 50


def test_one_object_has_three_or_four_colours():
    for shape in SHAPES:
        law = colour_posterior(
            Scene("black", (Item(shape, "green" if shape != "diamond" else "red", "large"),)), "counts"
        )
        missing = {"circle": "blue", "ring": "red", "triangle": "purple", "diamond": "green"}.get(shape)
        assert {colour for (colour,) in law} == set(FOUR) - {missing}
        assert entropy(law) == pytest.approx(math.log2(3 if missing else 4))


def test_equal_objects_have_one_colour_and_different_objects_are_different():
    three = Scene("black", (Item("square", "red", "small"),) * 3)
    assert colour_posterior(three, "counts") == {(c,) * 3: 0.25 for c in FOUR}
    pair = Scene("black", (Item("square", "red", "small"),) * 2)
    law = colour_posterior(pair, "pairs")
    assert all(a != b for a, b in law)
    ringed = Scene("navy", (Item("circle", "yellow", None), Item("ring", "blue", None)))
    for colours in colour_posterior(ringed, "pairs"):
        assert colours[0] == "yellow"
        assert not held_out_pair(("yellow", "circle"), (colours[1], "ring"))


def test_entropy_and_distance_by_hand():
    assert entropy({"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}) == pytest.approx(1.5)
    assert total_variation({"a": 0.7, "b": 0.3}, {"b": 0.5, "c": 0.5}) == pytest.approx(0.7)
    rng = torch.Generator().manual_seed(0)
    p, q = (dict(enumerate(torch.rand(5, generator=rng).double().softmax(0).tolist())) for _ in range(2))
    events = [set(e) for size in range(6) for e in combinations(range(5), size)]
    largest = max(abs(sum(p[i] - q[i] for i in e)) for e in events)
    assert total_variation(p, q) == pytest.approx(largest)


def test_colours_are_read_at_their_places():
    a = Item("ring", "blue", "small", 9.3, 16.0)
    b = Item("cross", "purple", "large", 23.0, 16.4)
    scene = Scene("navy", (a, b))
    picture = draw_scene(scene)
    assert painted_colours(picture, scene) == ("blue", "purple")
    assert painted_colours(picture, replace(scene, items=(b, a))) == ("purple", "blue")
    assert painted_colours(picture, replace(scene, items=(a, replace(b, x=9.3)))) == ("blue", "unknown")
    mean = torch.stack([draw_scene(replace(scene, items=(a, replace(b, colour=c)))) for c in FOUR]).mean(0)
    assert painted_colours(mean, scene) == ("blue", "unknown")
    halves = torch.where(
        torch.arange(32) < 23, picture, draw_scene(replace(scene, items=(a, replace(b, colour="red"))))
    )
    assert painted_colours(halves, scene) == ("blue", "unknown")
    assert all(painted_colours(draw_scene(s), s) == tuple(i.colour for i in s.items) for s, _ in captioned_scenes(40))


def test_wrong_input_is_named():
    scene = Scene("black", (Item("circle", "red", "large"), Item("ring", "pink", "large")))
    with pytest.raises(ValueError, match="family must be one of"):
        colour_posterior(scene, "crowds")
    with pytest.raises(ValueError, match="equal objects"):
        colour_posterior(scene, "counts")
    with pytest.raises(ValueError, match="no scene"):
        colour_posterior(Scene("black", (Item("square", "yellow", "large"),)), "counts")
