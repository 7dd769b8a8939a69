"""Captioned scenes show what their captions say, and the readers of both notice whatever is wrong."""

import hashlib
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ddpm_lib.scene_reader import STRAY, UNKNOWN, Reading, parse_caption, read_scene, satisfies
from ddpm_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    GRID,
    HELD_OUT_OBJECTS,
    LONGEST,
    RADII,
    SHAPES,
    SIDE,
    SPLITS,
    VOCABULARY,
    Item,
    Scene,
    captioned_scenes,
    coverage,
    draw_scene,
    held_out_pair,
    scenes,
)

AREAS = {  # for radius 1
    "circle": math.pi,
    "square": 1.8**2,
    "triangle": 2.2**2 / 2,
    "diamond": 2.3**2 / 2,
    "cross": 2 * 2.1 * 0.8 - 0.8**2,
    "ring": math.pi * (1.05**2 - 0.45**2),
}
KINDS = list(itertools.product(SHAPES, RADII))
ALL = [(split, family) for split in SPLITS for family in FAMILIES if (split, family) != ("held-out pairs", "counts")]


def painted(shape: str, radius: float, x: float, y: float, fine: int = 32) -> Tensor:
    """Coverage (32, 32) as Pillow paints it on a grid ``fine`` times as fine."""
    image = Image.new("L", (32 * fine, 32 * fine))
    brush = ImageDraw.Draw(image)

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((x + radius * dx) * fine - 0.5, (y + radius * dy) * fine - 0.5) for dx, dy in points]

    match shape:
        case "circle":
            brush.ellipse(at((-1, -1), (1, 1)), fill=255)
        case "ring":
            brush.ellipse(at((-1.05, -1.05), (1.05, 1.05)), fill=255)
            brush.ellipse(at((-0.45, -0.45), (0.45, 0.45)), fill=0)
        case "square":
            brush.rectangle(at((-0.9, -0.9), (0.9, 0.9)), fill=255)
        case "triangle":
            brush.polygon(at((0, -1.1), (1.1, 1.1), (-1.1, 1.1)), fill=255)
        case "diamond":
            brush.polygon(at((0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)), fill=255)
        case "cross":
            brush.rectangle(at((-1.05, -0.4), (1.05, 0.4)), fill=255)
            brush.rectangle(at((-0.4, -1.05), (0.4, 1.05)), fill=255)
    whole = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, fine, 32, fine)
    return whole.float().mean(dim=(1, 3)) / 255


def paint(scene: Scene) -> Tensor:
    """The picture (3, 32, 32) that Pillow paints of a scene."""
    ground = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1) / 127.5 - 1
    image = ground.repeat(1, 32, 32)
    for item in scene.items:
        colour = torch.tensor(COLOURS[item.colour]).view(3, 1, 1) / 127.5 - 1
        image = torch.lerp(image, colour, painted(item.shape, RADII[item.size], item.x, item.y))
    return image


def as_floats(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def content(scene: Scene) -> tuple:
    return scene.background, sorted((item.shape, item.colour, item.size) for item in scene.items)


def caption_of(scene: Scene) -> str:
    """A caption that leaves nothing open, of a scene of two objects side by side."""
    left, right = (f"a {item.size} {item.colour} {item.shape}" for item in scene.items)
    return f"{left} left of {right} on a {scene.background} background"


def side_by_side(generator: torch.Generator) -> Scene:
    """Two objects of unlike shapes, colours and sizes, far apart."""
    shapes, colours, sizes = (
        [list(names)[i] for i in torch.randperm(len(names), generator=generator)[:2]]
        for names in (SHAPES, list(COLOURS)[:7], RADII)
    )
    places = torch.tensor([[8.0, 16.0], [24.0, 16.0]]) + torch.rand(2, 2, generator=generator) - 0.5
    items = (Item(*kind, *place) for kind, place in zip(zip(shapes, colours, sizes), places.tolist()))
    return Scene("black", tuple(items), "left to right")


def beside(a: tuple[str, str], b: tuple[str, str], colours: tuple[str, str], gap: float, below: bool) -> Scene:
    """Two kinds, one behind the other, with a gap between their bounding boxes, negative where these overlap."""
    reaches = [RADII[size] * SHAPES[shape][0] for shape, size in (a, b)]
    start = (SIDE - 2 * sum(reaches) - gap) / 2
    along, across = (start + reaches[0], SIDE - start - reaches[1]), (16.0, 16.3)
    places = zip(across, along) if below else zip(along, across)
    kinds = zip((a, b), colours, places)
    return Scene("black", tuple(Item(shape, colour, size, *place) for (shape, size), colour, place in kinds))


@pytest.mark.parametrize(("split", "family"), ALL)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_every_picture_is_read_and_satisfies_its_caption(split, family, noise, generator):
    made = captioned_scenes(16, split, seed=5, family=family)
    images, captions = scenes(16, split, seed=5, family=family)
    assert captions == [caption for _, caption in made]
    images = as_floats(images)
    for image, (scene, caption) in zip(images + noise * torch.randn(images.shape, generator=generator), made):
        reading = read_scene(image)
        assert content(reading.scene) == content(scene)
        assert all(min(math.dist((a.x, a.y), (b.x, b.y)) for b in reading.scene.items) < 0.1 for a in scene.items)
        assert reading.rmse == pytest.approx(noise, abs=0.003 if noise == 0 else 0.01)  # noise on white is clipped
        verdict = satisfies(reading, caption)
        assert verdict["all"]
        assert verdict == satisfies(image, caption)


@pytest.mark.parametrize(("shape", "size"), KINDS)
def test_shapes_cover_what_pillow_paints(shape, size):
    """Only corners, which the signed distance rounds, may differ by more than 0.07 of a pixel."""
    places = 16 + torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.2, -0.3], [-0.37, 0.41]])
    for x, y in places.tolist():
        ours = coverage(shape, RADII[size], torch.tensor([x]), torch.tensor([y]))[0]
        difference = (ours - painted(shape, RADII[size], x, y)).abs()
        assert difference.max() < 0.35
        assert (difference > 0.07).sum() <= 12
        assert float(ours.sum()) == pytest.approx(AREAS[shape] * RADII[size] ** 2, rel=0.05)


def test_no_shape_is_taken_for_another():
    """The confusion matrix over shapes and sizes, of pictures that Pillow painted, is diagonal."""
    confusion = dict.fromkeys(itertools.product(KINDS, [*KINDS, (UNKNOWN, UNKNOWN)]), 0)
    for number, (kind, place) in enumerate(itertools.product(KINDS, torch.rand(8, 2) + 15.5)):
        colour = list(COLOURS)[number % 7]
        (item,) = read_scene(paint(Scene("black", (Item(kind[0], colour, kind[1], *place.tolist()),)))).scene.items
        assert item.colour == colour
        confusion[kind, (item.shape, item.size)] += 1
    assert confusion == {(a, b): 8 * (a == b) for a, b in confusion}


@pytest.mark.parametrize("attribute", ["colour", "size", "shape", "place"])
def test_swaps_are_noticed(attribute, generator):
    for _ in range(12):
        scene = side_by_side(generator)
        a, b = scene.items
        assert satisfies(draw_scene(scene), caption_of(scene))["all"]
        if attribute == "place":
            swapped = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
        else:
            swapped = (
                replace(a, **{attribute: getattr(b, attribute)}),
                replace(b, **{attribute: getattr(a, attribute)}),
            )
        verdict = satisfies(draw_scene(replace(scene, items=swapped)), caption_of(scene))
        wrong = {"order"} if attribute == "place" else {f"{attribute} 1", f"{attribute} 2"}
        assert {key for key, right in verdict.items() if not right} == wrong | {"all"}


def test_each_wrong_attribute_is_named():
    """And no other is blamed."""
    a, b = Item("circle", "red", "large", 8.0, 16.0), Item("cross", "blue", "small", 24.0, 15.0)
    caption = "a large red circle to the left of a small blue cross on a grey background"
    ring = Item("ring", "green", "small", 22.0, 26.0)
    changes = {
        "shape 1": ("grey", replace(a, shape="diamond"), b),
        "colour 1": ("grey", replace(a, colour="orange"), b),
        "size 1": ("grey", replace(a, size="small"), b),
        "shape 2": ("grey", a, replace(b, shape="ring")),
        "colour 2": ("grey", a, replace(b, colour="purple")),
        "size 2": ("grey", a, replace(b, size="large")),
        "order": ("grey", replace(a, x=12.0, y=8.0), replace(b, x=19.0, y=24.0)),
        "background": ("navy", a, b),
        "count": ("grey", a, b, ring),
    }
    right = satisfies(draw_scene(Scene("grey", (a, b))), caption)
    assert set(right) == set(changes) | {"clean", "all"}
    assert all(right.values())
    for wrong, (background, *items) in changes.items():
        verdict = satisfies(draw_scene(Scene(background, tuple(items))), caption)
        assert {key for key, right in verdict.items() if not right} == {wrong, "all"}


def test_missing_objects_are_noticed():
    for scene, caption in captioned_scenes(20, "test", seed=3):
        for i in range(len(scene.items)):
            fewer = replace(scene, items=scene.items[:i] + scene.items[i + 1 :])
            verdict = satisfies(draw_scene(fewer), caption)
            assert not verdict["count"]
            assert not verdict["all"]


def test_leftovers_are_noticed():
    """A few stray pixels pass; a line, a smear, a hole or a bump do not."""
    clean = draw_scene(Scene("black", (Item("square", "white", "large", 10.0, 10.0),)))
    caption = "a large white square on a black background"

    def verdict(row: slice, column: slice, value: float) -> dict[str, bool]:
        image = clean.clone()
        image[:, row, column] = value
        return satisfies(image, caption)

    assert verdict(slice(25, 27), slice(25, 26), 1.0)["all"]
    assert not verdict(slice(25, 26), slice(20, 28), 1.0)["all"]
    assert not verdict(slice(22, 30), slice(2, 30), -0.4)["all"]
    assert not verdict(slice(8, 11), slice(8, 11), -1.0)["shape 1"]
    assert not verdict(slice(15, 19), slice(8, 12), 1.0)["shape 1"]
    dots = clean.clone()
    dots[:, 20:30:3, 20:30:3] = 1.0
    assert 16 == read_scene(dots).stray > STRAY
    assert not satisfies(dots, caption)["clean"]


@pytest.mark.parametrize(
    "blob",
    [
        lambda x, y: (x / 6) ** 2 + (y / 3.4) ** 2 < 1,  # an ellipse
        lambda x, y: (abs(x) < 6) & (abs(y) < 2),  # a bar
        lambda x, y: (x**2 + y**2 < 30) & (x > 0),  # half a disc
        lambda x, y: (x - y > -4) & (x + y > -4) & (x < 4) & (y < 3),  # no regular shape
    ],
)
def test_a_blob_is_no_shape(blob):
    y, x = torch.meshgrid(*[torch.arange(32) - 15.5] * 2, indexing="ij")
    image = torch.where(blob(x, y), 1.0, -1.0).expand(3, 32, 32)
    (item,) = read_scene(image).scene.items
    assert item.shape == UNKNOWN


def test_an_object_of_two_colours_is_no_shape():
    """The patch in the blue disc is as far from the black background as blue is, along blue."""
    image = draw_scene(Scene("black", (Item("circle", "blue", "large", 16.0, 16.0),)))
    assert read_scene(image).scene.items[0].shape == "circle"
    image[:, 14:17, 14:17] = torch.tensor([210, 210, 126]).view(3, 1, 1) / 127.5 - 1
    assert read_scene(image).scene.items[0].shape == UNKNOWN


@pytest.mark.parametrize("colours", [("red", "blue"), ("white", "green"), ("pink", "pink")])
def test_objects_that_touch_are_read(colours):
    for number, (a, b) in enumerate(itertools.product(KINDS, KINDS)):
        scene = beside(a, b, colours, gap=0, below=number % 2 == 1)
        reading = read_scene(paint(scene))
        assert content(reading.scene) == content(scene)
        assert reading.stray == 0
        assert reading.rmse < 0.08  # Pillow's corners are sharp


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colours", [("pink",) * 4, ("red", "green", "yellow", "blue")])
def test_three_and_four_objects_that_touch_are_read(shape, colours):
    """In a row, in a column, and two by two; but four equal squares two by two are one square."""
    width = 2 * RADII["small"] * SHAPES[shape][0]
    three = [16 - width, 16.0, 16 + width]
    row, column = [(x, 16.3) for x in three], [(16.3, y) for y in three]
    four = list(itertools.product((16 - width / 2, 16 + width / 2), repeat=2))
    for places in (row, column, four):
        items = tuple(Item(shape, colour, "small", *place) for colour, place in zip(colours, places))
        shown = read_scene(paint(Scene("grey", items))).scene
        if (shape, colours[0], len(items)) == ("square", "pink", 4):
            assert [item.shape for item in shown.items] == [UNKNOWN]
        else:
            assert content(shown) == content(Scene("grey", items))
            assert all(min(math.dist((a.x, a.y), (b.x, b.y)) for b in shown.items) < 0.3 for a in items)


def test_objects_that_cover_the_same_pixels_are_not_read():
    """Neither as the two of which the picture is the sum, nor as one on the other in a colour that is not there."""
    left, right = (Item("circle", colour, "large", x, 16.0) for colour, x in (("red", 13.0), ("green", 19.0)))
    assert [item.shape for item in read_scene(draw_scene(Scene("black", (left, right)))).scene.items] == [UNKNOWN]
    large, small = Item("square", "orange", "large", 16.0, 16.0), Item("diamond", "red", "small", 16.0, 16.0)
    shown = read_scene(paint(Scene("grey", (large, small)))).scene
    assert [item.shape for item in shown.items] == [UNKNOWN]


@pytest.mark.parametrize("colours", [("red", "blue"), ("pink", "pink")])
@pytest.mark.parametrize("shape", ["square", "ring"])
def test_objects_that_overlap_are_not_read(shape, colours):
    for size in RADII:
        reading = read_scene(paint(beside((shape, size), ("square", "large"), colours, gap=-2, below=False)))
        assert [item.shape for item in reading.scene.items] == [UNKNOWN]


@pytest.mark.parametrize(
    ("row", "column", "like"),
    [
        (slice(15, 18), slice(9, 12), (0, 0)),  # a hole in the square
        (slice(21, 25), slice(6, 10), (16, 10)),  # a bump on the square
        (slice(21, 29), slice(7, 8), (16, 10)),  # a thread that hangs from it
        (slice(17, 32), slice(16, 32), (0, 0)),  # half of the circle
    ],
)
def test_objects_that_touch_are_read_all_or_none(row, column, like):
    scene = beside(("square", "large"), ("circle", "large"), ("red", "white"), gap=0, below=False)
    image = paint(scene)
    assert content(read_scene(image).scene) == content(scene)
    image[:, row, column] = image[:, like[0], like[1], None, None].clone()
    assert [item.shape for item in read_scene(image).scene.items] == [UNKNOWN]


def test_a_disc_of_two_colours_is_not_two_objects():
    image = paint(Scene("black", (Item("circle", "red", "large", 16.0, 16.0),)))
    image[:, :, 16:] = paint(Scene("black", (Item("circle", "white", "large", 16.0, 16.0),)))[:, :, 16:]
    assert [item.shape for item in read_scene(image).scene.items] == [UNKNOWN]


def test_unknown_colours_and_backgrounds():
    olive, black = (torch.tensor(rgb).view(3, 1, 1) / 127.5 - 1 for rgb in [(110, 110, 0), BACKGROUNDS["black"]])
    scene = read_scene(torch.lerp(black, olive, painted("circle", RADII["large"], 16.0, 16.0))).scene
    assert [(item.shape, item.colour) for item in scene.items] == [("circle", UNKNOWN)]
    assert scene.background == "black"
    assert read_scene(olive.expand(3, 32, 32)).scene.background == UNKNOWN


def test_noise_is_no_scene(generator):
    for image in torch.randn(5, 3, 32, 32, generator=generator):
        reading = read_scene(image)
        assert isinstance(reading, Reading)
        assert not satisfies(reading, "a red circle")["all"]


@pytest.mark.parametrize(
    ("ground", "contrasts"),
    [
        (-1.0, [(2.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 2.0)]),  # whose median is 0
        (0.18, [(-1.0, 0.3, 0.3), (0.3, -1.0, 0.3), (0.3, 0.3, -1.0)]),  # whose median leads away from all
    ],
)
def test_colours_that_cancel_are_no_scene(ground, contrasts):
    image = torch.full((3, 32, 32), ground)
    for column, contrast in enumerate(contrasts, start=10):
        image[:, 10:18, column] += torch.tensor(contrast)[:, None]
    assert [item.shape for item in read_scene(image).scene.items] == [UNKNOWN]


def test_captions_say_what_their_scenes_hold():
    """The reader of captions, which knows nothing of their writer, finds the objects and their order."""
    unsaid = {"size": 0, "background": 0, "order": 0}
    made = captioned_scenes(2000, seed=1)
    for scene, caption in made:
        stated = parse_caption(caption)
        assert stated.background in (None, scene.background)
        assert stated.order in (None, scene.order)
        said = {(item.shape, item.colour): item.size for item in stated.items}
        assert len(stated.items) == len(scene.items)
        assert set(said) == {(item.shape, item.colour) for item in scene.items}
        assert all(said[item.shape, item.colour] in (None, item.size) for item in scene.items)
        if stated.order:
            places = {(item.shape, item.colour): (item.x, item.y) for item in scene.items}
            axis = ("left to right", "top to bottom").index(stated.order)
            along = [places[item.shape, item.colour][axis] for item in stated.items]
            assert along == sorted(along)
        unsaid["size"] += sum(item.size is None for item in stated.items) / len(stated.items)
        unsaid["background"] += stated.background is None
        unsaid["order"] += scene.order is not None and stated.order is None
    shares = {key: count / len(made) for key, count in unsaid.items()}
    assert shares == pytest.approx({"size": 1 / 4, "background": 1 / 4, "order": 1 / 12}, abs=0.03)


def test_relations_have_a_clear_margin():
    for scene, _ in captioned_scenes(500, seed=2, family="pairs"):
        a, b = scene.items
        along, across = (b.x - a.x, b.y - a.y) if scene.order == "left to right" else (b.y - a.y, b.x - a.x)
        assert along >= abs(across) + 3
    for scene, _ in captioned_scenes(300, seed=2, family="rows"):
        places = [item.x if scene.order == "left to right" else item.y for item in scene.items]
        assert all(b - a >= 5 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize(
    ("caption", "items", "order", "background"),
    [
        ("a red circle", ["red circle"], None, None),
        ("An orange BOX on white", ["orange square"], None, "white"),
        ("three little pink boxes, navy background", ["small pink square"] * 3, None, "navy"),
        ("two big white crosses", ["large white cross"] * 2, None, None),
        ("a red disc over a blue ring", ["red circle", "blue ring"], "top to bottom", None),
        ("under a red disc, a blue ring", ["red circle", "blue ring"], "top to bottom", None),
        ("on grey, above a red disc, a blue ring", ["blue ring", "red circle"], "top to bottom", "grey"),
        ("a red disc to the right of a blue ring", ["blue ring", "red circle"], "left to right", None),
        ("to the left of a red disc, a blue ring", ["blue ring", "red circle"], "left to right", None),
        ("a red ring, a blue ring and a pink ring", ["red ring", "blue ring", "pink ring"], None, None),
        (
            "on black, from bottom to top, a red ring, a little blue ring and a pink ring",
            ["pink ring", "small blue ring", "red ring"],
            "top to bottom",
            "black",
        ),
        (
            "a red ring, a blue ring and a pink ring from left to right on a black background",
            ["red ring", "blue ring", "pink ring"],
            "left to right",
            "black",
        ),
    ],
)
def test_captions_are_understood(caption, items, order, background):
    stated = parse_caption(caption)
    words = [" ".join(filter(None, (item.size, item.colour, item.shape))) for item in stated.items]
    assert (words, stated.order, stated.background) == (items, order, background)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red circle",
        "a circle",
        "a red dog",
        "a red circle on a red background",
        "a red circle above",
        "two red circles above a blue ring",
        "from left to top, a red ring, a blue ring and a pink ring",
        "a huge red circle",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match=re.escape(repr(caption))):
        parse_caption(caption)


def test_words_are_in_the_vocabulary():
    words = [re.findall(r"\w+|,", caption) for _, caption in captioned_scenes(1500, seed=4)]
    assert len(set(VOCABULARY)) == len(VOCABULARY) < 64
    assert set(itertools.chain(*words)) == set(VOCABULARY)
    assert max(map(len, words)) <= LONGEST


def test_objects_stand_apart_and_inside():
    """Two pixels that two objects cover are two pixels or more apart, and no object is cut off."""
    for scene, _ in captioned_scenes(200, seed=6):
        pixels = []
        for item in scene.items:
            covered = coverage(item.shape, RADII[item.size], torch.tensor([item.x]), torch.tensor([item.y]))[0]
            whole = coverage(item.shape, RADII[item.size], torch.tensor([item.x + 8]), torch.tensor([item.y + 8]), 48)
            assert float(covered.sum()) == pytest.approx(float(whole.sum()), rel=1e-5)
            pixels.append((covered > 0.5).nonzero().float())
        for a, b in itertools.combinations(pixels, 2):
            assert torch.cdist(a, b).min() >= 2


def test_objects_lie_on_the_grid_and_three_are_small():
    sizes = {1: set(), 2: set(), 3: set(), 4: set()}
    for scene, _ in captioned_scenes(300, seed=9):
        assert all(item.x % GRID == item.y % GRID == 0 for item in scene.items)
        sizes[len(scene.items)] |= {item.size for item in scene.items}
    assert sizes == {1: {"small", "large"}, 2: {"small", "large"}, 3: {"small"}, 4: {"small"}}


def objects_of(scene: Scene) -> set[tuple[str, str]]:
    return {(item.colour, item.shape) for item in scene.items}


def holds_out(scene: Scene) -> tuple[bool, bool]:
    """Whether a scene has a held-out object, and a held-out pair."""
    objects = objects_of(scene)
    return bool(objects & HELD_OUT_OBJECTS), any(held_out_pair(*pair) for pair in itertools.combinations(objects, 2))


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_are_held_out(split):
    """By the captions, and by the pictures."""
    images, captions = scenes(700, split, seed=7)
    stated = [holds_out(parse_caption(caption)) for caption in captions]
    assert [holds_out(read_scene(image).scene) for image in as_floats(images[:60])] == stated[:60]
    match split:
        case "held-out pairs":
            assert set(stated) == {(False, True)}
        case "held-out objects":
            assert all(new_object for new_object, _ in stated)
        case _:
            assert set(stated) == {(False, False)}
            met = set.union(*(objects_of(parse_caption(caption)) for caption in captions))
            assert met == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT_OBJECTS


def test_about_one_pair_in_eight_is_held_out():
    pairs = list(itertools.combinations(itertools.product(COLOURS, SHAPES), 2))
    held = [pair for pair in pairs if held_out_pair(*pair)]
    assert len(held) / len(pairs) == pytest.approx(1 / 8, abs=0.02)
    assert held == [pair for pair in pairs if held_out_pair(*pair[::-1])]
    assert {shape for _, shape in HELD_OUT_OBJECTS} == set(SHAPES)
    assert len({colour for colour, _ in HELD_OUT_OBJECTS}) == len(HELD_OUT_OBJECTS)


def test_families_have_equal_parts():
    made = [scene for scene, _ in captioned_scenes(2000, seed=8)]
    counts = [scene for scene in made if scene.order is None]
    ordered = [len(scene.items) for scene in made if scene.order]
    for part in (len(counts), ordered.count(2), ordered.count(3)):
        assert part / len(made) == pytest.approx(1 / 3, abs=0.03)
    for number in (1, 2, 3, 4):
        assert sum(len(scene.items) == number for scene in counts) / len(counts) == pytest.approx(1 / 4, abs=0.05)


def test_scenes_are_always_the_same():
    images, captions = scenes(64, seed=0)
    digest = hashlib.sha256(images.numpy().tobytes() + "\n".join(captions).encode()).hexdigest()
    assert digest[:16] == "f018dca40e96e279"


def test_few_scenes_begin_many_and_keys_differ():
    images, captions = scenes(64)
    few, few_captions = scenes(10, seed=0)
    assert torch.equal(few, images[:10])
    assert few_captions == captions[:10]
    others = [scenes(10, seed=1)[1], scenes(10, "test")[1], scenes(10, family="pairs")[1]]
    assert all(set(other).isdisjoint(captions[:10]) for other in others)


def test_bytes_round_the_picture():
    images, _ = scenes(520, seed=9)
    exact = torch.stack([draw_scene(scene) for scene, _ in captioned_scenes(520, seed=9)])
    assert images.dtype == torch.uint8
    assert (as_floats(images) - exact).abs().max() <= 0.5 / 127.5 + 1e-6


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="n must"):
        scenes(0)
    with pytest.raises(ValueError, match=r"split must be one of train, test.*'valid'"):
        scenes(1, "valid")
    with pytest.raises(ValueError, match=r"family must be None or one of pairs.*'trios'"):
        scenes(1, family="trios")
    with pytest.raises(ValueError, match="no family 'counts'"):
        scenes(1, "held-out pairs", family="counts")
    for image in (torch.zeros(1, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((3, 32, 32), math.nan)):
        with pytest.raises(ValueError, match="image must be floats"):
            read_scene(image)
    with pytest.raises(ValueError, match="shape must be one of"):
        coverage("star", 3.0, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"background must be one of.*'red'"):
        draw_scene(Scene("red", ()))
    with pytest.raises(ValueError, match="needs a known shape, colour and size"):
        draw_scene(parse_caption("a red circle on black"))
    with pytest.raises(ValueError, match="needs a place"):
        draw_scene(parse_caption("a small red circle on black"))


def test_in_grey_four_colours_are_one():
    """By Pillow's luma, of Recommendation 601 too; all others are 15 levels apart, or more."""
    greys = {name: Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0)) for name, rgb in COLOURS.items()}
    alike = {name for name, grey in greys.items() if grey == greys["red"]}
    assert alike == {"red", "green", "blue", "purple"}
    others = sorted({greys["red"], *(greys[name] for name in COLOURS.keys() - alike)})
    assert len(others) == 5
    assert min(b - a for a, b in itertools.pairwise(others)) > 15
