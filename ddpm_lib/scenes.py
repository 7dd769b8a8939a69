"""Captioned scenes: pictures of coloured shapes with a caption that says what they show, drawn by this file.

What a picture shows can be measured, so that text to image can be too: ``ddpm_lib.scene_reader`` reads a picture back
and compares it with a caption. Lengths are in pixels; x grows to the right and y downwards, from the corner at the top
left, so that the centre of the first pixel is (0.5, 0.5). The centres of objects lie on a grid of two pixels: a network
that works on squares of 2 x 2 pixels always meets a shape in the same cut.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import _positive_int

SIDE = 32
MARGIN = 0.5  # between an object and the frame
GAP = 2.0  # at least, between two objects
GRID = 2  # of which the coordinates of every object's centre are multiples
RADII = {"small": 4.2, "large": 6.0}
COLOURS = {  # red, green, blue and purple are equally light: their luma is 98 of 255
    "red": (224, 44, 46),
    "orange": (247, 130, 15),
    "yellow": (250, 214, 50),
    "green": (0, 150, 88),
    "blue": (38, 104, 225),
    "purple": (150, 55, 184),
    "pink": (255, 150, 200),
    "white": (250, 250, 250),
}
BACKGROUNDS = {"black": (14, 14, 18), "navy": (22, 38, 92), "grey": (150, 152, 156), "white": (250, 250, 250)}
SHAPES = {  # half the width, and half the width along a diagonal of the frame, for radius 1
    "circle": (1.0, 1.0),
    "square": (0.9, 1.28),
    "triangle": (1.1, 1.56),
    "diamond": (1.15, 0.82),
    "cross": (1.05, 1.03),
    "ring": (1.05, 1.05),
}
FAMILIES = ("pairs", "rows", "counts")
SPLITS = ("train", "test", "held-out pairs", "held-out objects")
HELD_OUT_OBJECTS = {
    ("blue", "circle"),
    ("yellow", "square"),
    ("purple", "triangle"),
    ("green", "diamond"),
    ("orange", "cross"),
    ("red", "ring"),
}

SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {"circle": ("circle", "disc"), "square": ("square", "box")}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {  # of the first object to the second, and of the second to the first
    "top to bottom": (("above", "over"), ("below", "under")),
    "left to right": (("left of", "to the left of"), ("right of", "to the right of")),
}
COUNTS = ("one", "two", "three", "four")
LONGEST = 24  # words and commas that a caption may have


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith(("s", "x")) else "s")


VOCABULARY = (
    *(",", "a", "an", "and", "on", "background", "from", "to", "the", "of", "left", "right", "top", "bottom"),
    *("above", "over", "below", "under", *COUNTS, *itertools.chain(*SIZE_WORDS.values())),
    *(*COLOURS, "black", "navy", "grey"),
    *(form for words in SHAPE_WORDS.values() for word in words for form in (word, plural(word))),
)


@dataclass(frozen=True)
class Item:
    """An object of a scene, with its centre (that of its bounding box); None for what is not known."""

    shape: str
    colour: str
    size: str | None
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Scene:
    """Objects on a background. ``order``, if any, is 'left to right' or 'top to bottom': that of ``items``.

    Of two objects in an order, the offset along it exceeds the offset across it by 3 pixels or more; of three, each
    lies 5 pixels or more beyond the last.
    """

    background: str
    items: tuple[Item, ...]
    order: str | None = None


def coverage(shape: str, radius: float, x: Tensor, y: Tensor, side: int = SIDE) -> Tensor:
    """How much of each pixel a shape covers, (N, side, side) in [0, 1], for centres x and y (N,).

    It is 1/2 minus the signed distance from the pixel's centre to the outline, clipped to [0, 1]: exact for a straight
    upright outline.
    """
    centres = torch.arange(side) + 0.5
    x = (centres[None, None, :] - x[:, None, None]) / radius
    y = (centres[None, :, None] - y[:, None, None]) / radius
    match shape:
        case "circle":
            distance = (x**2 + y**2).sqrt() - 1
        case "square":
            distance = torch.maximum(x.abs(), y.abs()) - 0.9
        case "triangle":  # base and height 2.2
            distance = torch.maximum(y - 1.1, (2 * x.abs() - y - 1.1) / 5**0.5)
        case "diamond":
            distance = (x.abs() + y.abs() - 1.15) / 2**0.5
        case "cross":
            long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
            distance = torch.maximum(long - 1.05, short - 0.4)
        case "ring":
            distance = ((x**2 + y**2).sqrt() - 0.75).abs() - 0.3
        case _:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}.")
    return (0.5 - radius * distance).clamp(0, 1)


def colour_value(rgb: tuple[int, int, int]) -> Tensor:
    """A colour of three bytes as (3,) in [-1, 1]."""
    return torch.tensor(rgb) / 127.5 - 1


def draw_scene(scene: Scene) -> Tensor:
    """The picture (3, 32, 32) in [-1, 1] of a scene, with soft edges; objects must not overlap."""
    if scene.background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}; got {scene.background!r}.")
    for item in scene.items:
        if item.shape not in SHAPES or item.colour not in COLOURS or item.size not in RADII:
            raise ValueError(f"an item needs a known shape, colour and size ({', '.join(RADII)}); got {item}.")
        if item.x is None or item.y is None:
            raise ValueError(f"an item needs a place, x and y; got {item}.")
    return _draw([scene])[0]


def scenes(n: int, split: str = "train", seed: int = 0, family: str | None = None) -> tuple[Tensor, list[str]]:
    """n pictures (n, 3, 32, 32) uint8 in 0..255 with their captions.

    The same seed, split and family always give the same scenes; the first of many are the same as of few. ``family``:

    - 'pairs': two objects, one above, below, left of or right of the other;
    - 'rows': three small objects, from left to right or from top to bottom;
    - 'counts': one to four equal objects, three and four of them small;
    - None: all of these, in equal parts.

    ``split``:

    - 'train': no object of ``HELD_OUT_OBJECTS``, and of the pairs of objects (each a colour and a shape) about 1 in 8
      are left out, see ``held_out_pair``;
    - 'test': other scenes of the same law;
    - 'held-out pairs': objects as in 'train', but a pair of them is held out, which 'counts' cannot have;
    - 'held-out objects': at least one object is held out.
    """
    made = captioned_scenes(n, split, seed, family)
    images = torch.empty(n, 3, SIDE, SIDE, dtype=torch.uint8)
    for i in range(0, n, 512):
        images[i : i + 512] = ((_draw([scene for scene, _ in made[i : i + 512]]) + 1) * 127.5).round()
    return images, [caption for _, caption in made]


def captioned_scenes(n: int, split: str = "train", seed: int = 0, family: str | None = None) -> list[tuple[Scene, str]]:
    """The scenes that ``scenes`` draws, with their captions."""
    _positive_int("n", n)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if family not in (None, *FAMILIES):
        raise ValueError(f"family must be None or one of {', '.join(FAMILIES)}; got {family!r}.")
    if (split, family) == ("held-out pairs", "counts"):
        raise ValueError("the split 'held-out pairs' has no family 'counts', whose objects are all equal.")
    families = [family] if family else FAMILIES[:2] if split == "held-out pairs" else FAMILIES
    draws = _Draws(f"{seed} {split} {family}")
    made = []
    for _ in range(n):
        scene = _random_scene(draws, split, draws.pick(families))
        made.append((scene, _caption(draws, scene)))
    return made


def held_out_pair(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two objects, each (colour, shape), never occur together in the splits 'train' and 'test'."""
    return zlib.crc32(" ".join(sorted(first + second)).encode()) % 8 == 0


class _Draws:
    """Random numbers from one torch.Generator, one at a time."""

    def __init__(self, key: str):
        self.numbers = self._endless(torch.Generator().manual_seed(zlib.crc32(key.encode())))

    def _endless(self, generator: torch.Generator) -> Iterator[float]:
        while True:
            yield from torch.rand(4096, generator=generator, dtype=torch.float64).tolist()

    def chance(self, probability: float) -> bool:
        return next(self.numbers) < probability

    def pick(self, options: Sequence):
        return options[int(next(self.numbers) * len(options))]


def _random_scene(draws: _Draws, split: str, family: str) -> Scene:
    while True:
        if family == "counts":
            count = draws.pick((1, 2, 3, 4))
            items = [_random_item(draws, count)] * count
        else:
            count = 2 if family == "pairs" else 3
            items = [_random_item(draws, count) for _ in range(count)]
        objects = {(item.colour, item.shape) for item in items}
        if len(objects) < len(items) and family != "counts":
            continue
        new_object = not HELD_OUT_OBJECTS.isdisjoint(objects)
        new_pair = any(held_out_pair(*pair) for pair in itertools.combinations(objects, 2))
        if {
            "held-out pairs": new_pair and not new_object,
            "held-out objects": new_object,
        }.get(split, not new_pair and not new_object):
            break
    background = draws.pick([name for name in BACKGROUNDS if name not in {item.colour for item in items}])
    order = None if family == "counts" else draws.pick(tuple(RELATIONS))
    while (placed := _placed(draws, items, order)) is None:
        pass
    return Scene(background, placed, order)


def _random_item(draws: _Draws, of: int) -> Item:
    sizes = tuple(RADII) if of <= 2 else ("small",)
    return Item(draws.pick(tuple(SHAPES)), draws.pick(tuple(COLOURS)), draws.pick(sizes))


def _placed(draws: _Draws, items: Sequence[Item], order: str | None) -> tuple[Item, ...] | None:
    """The objects at random places, one after the other; None where one finds none in 20 tries."""
    placed: tuple[Item, ...] = ()
    for item in items:
        reach = MARGIN + RADII[item.size] * SHAPES[item.shape][0]
        centres = [float(place) for place in range(0, SIDE, GRID) if reach <= place <= SIDE - reach]
        for _ in range(20):
            new = (*placed, Item(item.shape, item.colour, item.size, draws.pick(centres), draws.pick(centres)))
            if _in_order(new, order, len(items)) and _apart(new):
                break
        else:
            return None
        placed = new
    return placed


def _apart(items: Sequence[Item]) -> bool:
    """Whether a strip of GAP pixels, upright, level or diagonal, lies between the last object and each other."""
    b = items[-1]
    for a in items[:-1]:
        dx, dy = abs(a.x - b.x), abs(a.y - b.y)
        width, diagonal = (RADII[a.size] * p + RADII[b.size] * q for p, q in zip(SHAPES[a.shape], SHAPES[b.shape]))
        if max(dx, dy) < width + GAP and (dx + dy) / 2**0.5 < diagonal + GAP:
            return False
    return True


def _in_order(items: Sequence[Item], order: str | None, of: int) -> bool:
    """Whether the last object lies beyond the one before it, where ``of`` objects have an order."""
    if order is None or len(items) == 1:
        return True
    (x, y), (next_x, next_y) = ((item.x, item.y) for item in items[-2:])
    along, across = (next_x - x, next_y - y) if order == "left to right" else (next_y - y, next_x - x)
    return along >= (abs(across) + 3 if of == 2 else 5)


def _caption(draws: _Draws, scene: Scene) -> str:
    """One of the captions that fit: one size in 4, one background in 4 and one order of three in 4 are left unsaid."""
    if scene.order is None:
        text = _noun(draws, scene.items[0], len(scene.items))
    elif len(scene.items) == 2:
        (first, second), (forwards, backwards) = scene.items, RELATIONS[scene.order]
        a, b, relations = draws.pick([(first, second, forwards), (second, first, backwards)])
        a, b, relation = _noun(draws, a), _noun(draws, b), draws.pick(relations)
        text = f"{relation} {b}, {a}" if draws.chance(1 / 6) else f"{a} {relation} {b}"
    else:
        nouns, ends = [_noun(draws, item) for item in scene.items], scene.order.split(" to ")
        if draws.chance(1 / 2):
            nouns, ends = nouns[::-1], ends[::-1]
        text, course = f"{nouns[0]}, {nouns[1]} and {nouns[2]}", f"from {ends[0]} to {ends[1]}"
        text = draws.pick([text, f"{text} {course}", f"{course}, {text}", f"{course}, {text}"])
    if draws.chance(1 / 4):
        return text
    where = draws.pick(("on {1}, {0}", "{0} on {1}", "{0} on a {1} background", "{0}, {1} background"))
    return where.format(text, scene.background)


def _noun(draws: _Draws, item: Item, count: int | None = None) -> str:
    shape = draws.pick(SHAPE_WORDS[item.shape])
    words = [item.colour, shape if count in (None, 1) else plural(shape)]
    if not draws.chance(1 / 4):
        words.insert(0, draws.pick(SIZE_WORDS[item.size]))
    article = "an" if words[0] == "orange" else "a"
    if count is not None and (count > 1 or draws.chance(1 / 4)):
        article = COUNTS[count - 1]
    return " ".join([article, *words])


def _draw(made: Sequence[Scene]) -> Tensor:
    """Pictures (N, 3, 32, 32) in [-1, 1] of N scenes."""
    images = torch.stack([colour_value(BACKGROUNDS[scene.background]) for scene in made])[:, :, None, None]
    images = images.repeat(1, 1, SIDE, SIDE)
    kinds: dict[tuple[str, str], list[tuple[int, Item, Tensor]]] = {}
    for i, scene in enumerate(made):
        ground = colour_value(BACKGROUNDS[scene.background])
        for item in scene.items:
            kinds.setdefault((item.shape, item.size), []).append((i, item, colour_value(COLOURS[item.colour]) - ground))
    for (shape, size), members in kinds.items():
        numbers, items, contrasts = zip(*members)
        x, y = (torch.tensor([getattr(item, axis) for item in items]) for axis in "xy")
        covered = coverage(shape, RADII[size], x, y)
        images.index_add_(0, torch.tensor(numbers), covered[:, None] * torch.stack(contrasts)[:, :, None, None])
    return images
