"""Does a picture show what a caption says? A reader of pictures of scenes, a reader of captions, and their comparison.

The reader of pictures sees nothing but pixels. It parts objects from the background by colour, and fits each with every
shape in both sizes at places a fraction of a pixel apart. Where none fits, it tries objects that touch; what these do
not explain either is 'unknown'. The reader of captions has a grammar of its own, so that a mistake of the one that
writes them would show.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

from .scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, SIDE, Item, Scene, colour_value, coverage

UNKNOWN = "unknown"
REACH = 8  # of an object and its soft edge from its centre, in pixels
FAR = 0.4  # distance in RGB, where black and white are 3.5 apart: a colour farther off is another
SPECK = 4  # pixels; what is smaller is no object
MISFIT = 0.04  # of a shape: squared error of coverage over squared coverage; above, it is another shape
MOST_TOUCHING = 4  # objects of one region
SMALLEST = 36  # pixels; even a small triangle covers more
ROUNDS = 3  # of fitting each of them to what the others leave
MOST_COMPARED = 6  # objects of a picture, those of the largest patches, with those of a caption
STRAY = 4  # pixels off the background and off all objects that a clean picture may have
CAPTION = re.compile(r"(?:on (\w+) , )?(.+?)(?: on a (\w+) background| , (\w+) background| on (\w+))?")
NOUN = re.compile(r"(a|an|one|two|three|four) (?:(small|little|large|big) )?(\w+) (\w+)")
COURSE = r"from (left|right|top|bottom) to (left|right|top|bottom)"
RELATION = r"(?:to the )?(above|over|below|under|left of|right of)"
ORDERS = {  # of the first object and the second; whether the second comes first
    "above": ("top to bottom", False),
    "over": ("top to bottom", False),
    "below": ("top to bottom", True),
    "under": ("top to bottom", True),
    "left of": ("left to right", False),
    "right of": ("left to right", True),
    "top to bottom": ("top to bottom", False),
    "bottom to top": ("top to bottom", True),
    "left to right": ("left to right", False),
    "right to left": ("left to right", True),
}
SAME = {"disc": "circle", "box": "square", "little": "small", "big": "large"}


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        scene: items by patch, from the largest patch to the smallest, with no order. Objects that touch share a patch:
            all of them are read, or the patch is one item that is 'unknown'.
        rmse: root of the mean squared difference, in [-1, 1] units, from the clean scene that has been read, each
            object at the place where it fits best.
        stray: pixels that differ from the background though no object that was read is near.
    """

    scene: Scene
    rmse: float
    stray: int


def read_scene(image: Tensor) -> Reading:
    """What a picture (3, 32, 32) in [-1, 1] shows."""
    if image.shape != (3, SIDE, SIDE) or not image.is_floating_point() or not image.isfinite().all():
        raise ValueError(
            f"image must be floats (3, {SIDE}, {SIDE}) in [-1, 1], all finite; "
            f"got {image.dtype} of shape {tuple(image.shape)}."
        )
    image = image.detach().cpu().float().clamp(-1, 1)
    palette = torch.stack([colour_value(rgb) for rgb in (BACKGROUNDS | COLOURS).values()])
    nearest = (image - palette[:, :, None, None]).norm(dim=1).argmin(dim=0)
    ground = image[:, nearest == nearest.flatten().mode().values].median(dim=1).values
    background, clean_ground = _nearest(ground, BACKGROUNDS)
    contrast = image - ground[:, None, None]
    off = contrast.norm(dim=0) > FAR
    parts = [part for part in _connected(off) if part.sum() >= SPECK]

    clean = clean_ground[:, None, None].expand(3, SIDE, SIDE).clone()
    near = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    items = []
    for part in parts:
        for fit in _read_region(contrast, ground, _grown(part)):
            items.append(fit.item)
            if fit.known:
                clean += fit.covered * (colour_value(COLOURS[fit.item.colour]) - clean_ground)[:, None, None]
                near |= _grown(fit.covered > 0)
    stray = int((off & ~near).sum())
    return Reading(Scene(background, tuple(items)), float((image - clean).square().mean().sqrt()), stray)


def parse_caption(caption: str) -> Scene:
    """What a caption states: a scene in which None stands for what is left open.

    Raises:
        ValueError: the caption is not in the grammar.
    """
    wrong = ValueError(
        "a caption names objects, as in 'a red circle', 'a small red circle above a blue square on a black background' "
        f"or 'from left to right, a red circle, a blue square and a pink ring'; got {caption!r}."
    )
    whole = CAPTION.fullmatch(" ".join(caption.lower().replace(",", " , ").split()))
    if not whole:
        raise wrong
    before, body, *after = whole.groups()
    background = next((name for name in (before, *after) if name), None)
    relation = None
    if found := re.fullmatch(f"{COURSE} , (.+)", body):
        relation, body = f"{found[1]} to {found[2]}", found[3]
    elif found := re.fullmatch(f"(.+) {COURSE}", body):
        relation, body = f"{found[2]} to {found[3]}", found[1]
    if found := re.fullmatch(f"{RELATION} (.+) , (.+)", body):
        relation, nouns = found[1], [found[3], found[2]]
    elif found := re.fullmatch(f"(.+?) {RELATION} (.+)", body):
        relation, nouns = found[2], [found[1], found[3]]
    else:
        nouns = re.split(" , | and ", body)
    items = [item for noun in nouns for item in _parse_noun(noun)]
    if (
        not items
        or None in items
        or background not in (None, *BACKGROUNDS)
        or relation not in (None, *ORDERS)
        or (relation and not len(nouns) == len(items) > 1)
    ):
        raise wrong
    order, reverse = ORDERS.get(relation, (None, False))
    return Scene(background, tuple(items[::-1] if reverse else items), order)


def satisfies(picture: Tensor | Reading, caption: str) -> dict[str, bool]:
    """Whether a picture shows what a caption says, for each thing that the caption states, and 'all' together.

    The objects of the picture are assigned to those of the caption so that most is right. Keys are 'shape 1',
    'colour 1' and 'size 1' for the first object, and so on; 'order', for relations too; 'background'; 'count', whether
    there are as many objects; 'clean', whether nothing else is there; and 'all'. Sizes, order and background are left
    out where the caption says nothing of them. Objects are counted from left to right or top to bottom if the caption
    gives an order, else as they are named.

    Args:
        picture: (3, 32, 32) in [-1, 1], or what ``read_scene`` made of it.
    """
    stated = parse_caption(caption)
    reading = picture if isinstance(picture, Reading) else read_scene(picture)
    shown = reading.scene.items
    candidates = [*shown[:MOST_COMPARED], *[None] * len(stated.items)]
    verdicts = (_compare(stated, chosen) for chosen in itertools.permutations(candidates, len(stated.items)))
    verdict = max(verdicts, key=lambda verdict: sum(verdict.values()))
    if stated.background:
        verdict["background"] = reading.scene.background == stated.background
    verdict["count"] = len(shown) == len(stated.items)
    verdict["clean"] = reading.stray <= STRAY
    return verdict | {"all": all(verdict.values())}


def _parse_noun(noun: str) -> list[Item | None]:
    """The objects that a noun names, [None] where it is none."""
    if not (found := NOUN.fullmatch(noun)):
        return [None]
    article, size, colour, shape = found.groups()
    count = {"two": 2, "three": 3, "four": 4}.get(article, 1)
    if count > 1:
        shape = re.sub("(?<=x)es$|(?<=ss)es$|(?<!s)s$", "", shape)
    shape, size = SAME.get(shape, shape), SAME.get(size, size)
    return [Item(shape, colour, size) if shape in SHAPES and colour in COLOURS else None] * count


def _compare(stated: Scene, shown: tuple[Item | None, ...]) -> dict[str, bool]:
    verdict = {}
    for i, (wanted, item) in enumerate(zip(stated.items, shown), start=1):
        verdict[f"shape {i}"] = item is not None and item.shape == wanted.shape
        verdict[f"colour {i}"] = item is not None and item.colour == wanted.colour
        if wanted.size:
            verdict[f"size {i}"] = item is not None and item.size == wanted.size
    if stated.order:
        verdict["order"] = None not in shown and all(
            _beyond(a, b, stated.order, len(shown)) for a, b in itertools.pairwise(shown)
        )
    return verdict


def _beyond(a: Item, b: Item, order: str, of: int) -> bool:
    """Whether b lies 2 pixels or more beyond a, and if these are all objects, more so than to the side."""
    along, across = (b.x - a.x, b.y - a.y) if order == "left to right" else (b.y - a.y, b.x - a.x)
    return along >= 2 and (of > 2 or along > abs(across))


def _nearest(colour: Tensor, palette: dict[str, tuple[int, int, int]]) -> tuple[str, Tensor]:
    """Name and value of the colour (3,) in the palette; 'unknown' and the colour itself if none is near."""
    name = min(palette, key=lambda name: float((colour_value(palette[name]) - colour).norm()))
    value = colour_value(palette[name])
    return (name, value) if (value - colour).norm() <= FAR else (UNKNOWN, colour)


def _connected(mask: Tensor) -> list[Tensor]:
    """The patches (32, 32) of a mask, from the largest to the smallest; pixels that share a side are of one patch."""
    left, patches = set(map(tuple, mask.nonzero().tolist())), []
    while left:
        edge = [left.pop()]
        patch = torch.zeros_like(mask)
        while edge:
            row, column = edge.pop()
            patch[row, column] = True
            neighbours = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= neighbours
            edge += neighbours
        patches.append(patch)
    return sorted(patches, key=lambda patch: -int(patch.sum()))


def _grown(mask: Tensor) -> Tensor:
    """The mask and all pixels that touch it."""
    return max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0


@cache
def _templates() -> tuple[list[tuple[str, str]], Tensor, Tensor]:
    """Kinds (shape, size); coverage (kinds, places, pixels) of a square patch; centres (kinds, places, 2) in it.

    The centroid of every template lies within half a pixel of the centre of the patch.
    """
    kinds, shapes = _centred()
    width = shapes.shape[-1]
    steps = torch.linspace(-0.5, 0.5, 9)
    places = torch.cartesian_prod(steps, steps) + width / 2
    covered, centres = [], []
    for (shape, size), middle in zip(kinds, shapes):
        centre = places - _centroid(middle) + width / 2
        covered.append(coverage(shape, RADII[size], *centre.T.contiguous(), width).flatten(1))
        centres.append(centre)
    return kinds, torch.stack(covered), torch.stack(centres)


@cache
def _centred() -> tuple[list[tuple[str, str]], Tensor]:
    """Kinds (shape, size); what each covers of a square patch in whose middle it sits, (kinds, pixels, pixels)."""
    kinds, width = list(itertools.product(SHAPES, RADII)), 2 * REACH + 1
    middle = torch.full((2, 1), width / 2)
    return kinds, torch.cat([coverage(shape, RADII[size], *middle, width) for shape, size in kinds])


def _centroid(covered: Tensor) -> Tensor:
    """(x, y) of the centre of mass of a square of coverage."""
    centres = torch.arange(len(covered)) + 0.5
    return torch.stack([covered.sum(0) @ centres, covered.sum(1) @ centres]) / covered.sum()


@dataclass(frozen=True)
class _Fit:
    """An object in a region of a picture: the item, what it covers of each pixel (32, 32), and what it adds to the
    background (3, 32, 32)."""

    item: Item
    covered: Tensor
    layer: Tensor

    @property
    def known(self) -> bool:
        return UNKNOWN not in (self.item.shape, self.item.colour)


def _read_region(contrast: Tensor, ground: Tensor, region: Tensor) -> list[_Fit]:
    """The object in a region (32, 32) or, where no shape fits, two or more that touch; else one that is unknown.

    Objects are added one by one where they explain most of what is left. Each is then fitted to what the others leave:
    to the pixels near it and to those near no object, so that leftovers count against it. All are read, or none; and
    none if some cover the same pixels.

    ``contrast`` (3, 32, 32) is the picture less its ``ground`` (3,), the colour of the background.
    """
    alone = _fit(contrast, ground, region)
    if alone.item.shape != UNKNOWN:
        return [alone]
    room = int((contrast.norm(dim=0) > FAR)[region].sum()) // SMALLEST
    seeds = [_strongest(contrast * region)]
    while len(seeds) < min(room, MOST_TOUCHING):
        seeds.append(_strongest(contrast * region - sum(seeds)))
        layers, fits = [*seeds], [alone] * len(seeds)
        for _ in range(ROUNDS):
            for i in range(len(layers)):
                near = torch.stack([_grown(layer.norm(dim=0) > 0) for layer in layers])
                own = region & (near[i] | ~near.any(0))
                left = contrast - sum(layers) + layers[i]
                if (left.norm(dim=0) > FAR)[own].sum() < SPECK:  # nothing is left for this one
                    return [alone]
                fits[i] = _fit(left, ground, own)
                layers[i] = fits[i].layer
        covered = torch.stack([fit.covered for fit in fits])
        shared = (covered.sum(0) - 1).clamp(min=0).sum() / covered.sum((1, 2)).min()
        if shared <= MISFIT and all(fit.known for fit in fits):
            return fits
    return [alone]


def _strongest(rest: Tensor) -> Tensor:
    """What an object adds that explains most of the rest (3, 32, 32); of any kind and colour, centred in a pixel."""
    kinds, shapes = _centred()
    norms = shapes.flatten(1).norm(dim=1)[:, None, None]
    explained = conv2d(rest[:, None], (shapes / norms)[:, None], padding=REACH).square().sum(0)
    kind, row, column = torch.unravel_index(explained.argmax(), explained.shape)
    shape, size = kinds[kind]
    covered = coverage(shape, RADII[size], column[None] + 0.5, row[None] + 0.5)
    return covered * (rest * covered).sum((1, 2), keepdim=True) / covered.square().sum()


def _fit(contrast: Tensor, ground: Tensor, region: Tensor) -> _Fit:
    """The object that fits a region (32, 32) best, of unknown shape if it fits badly."""
    pixels = contrast[:, region]
    strongest = pixels.norm(dim=0).topk(max(len(pixels.T) // 5, SPECK)).indices
    axis = pixels[:, strongest].median(dim=1).values
    if not (axis @ pixels > 0).any():  # colours that cancel
        axis = pixels[:, strongest[0]]
    colour, _ = _nearest(ground + axis, COLOURS)
    share = torch.einsum("c,chw->hw", axis, contrast) / axis.square().sum() * region  # of the object in each pixel
    other = (contrast - share * axis[:, None, None]).square().sum(0)[region].sum() / axis.square().sum()

    kinds, covered, centres = _templates()
    x, y = _centroid(share.clamp(min=0)).tolist()
    column, row = int(x), int(y)
    patch = pad(share, [REACH] * 4)[row : row + 2 * REACH + 1, column : column + 2 * REACH + 1].flatten()
    best = int((covered.square().sum(2) - 2 * covered @ patch).argmin())
    kind, place = divmod(best, centres.shape[1])
    shape, size = kinds[kind]
    centre = centres[kind, place] + torch.tensor([column - REACH, row - REACH])
    around = 0.25 * torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    for _ in range(3):  # Gauss-Newton steps
        here, right, left, down, up = coverage(shape, RADII[size], *(centre + around).T.contiguous())
        slopes = torch.stack([(right - left).flatten(), (down - up).flatten()], dim=1) / 0.5
        centre = centre + torch.linalg.lstsq(slopes, (share - here).flatten()[:, None]).solution[:, 0]
    here = coverage(shape, RADII[size], *centre[:, None])[0]
    misfit = float(((share - here).square().sum() + other) / here.square().sum())
    if misfit > MISFIT:
        shape = size = UNKNOWN
    return _Fit(Item(shape, colour, size, *centre.tolist()), here, here * axis[:, None, None])
