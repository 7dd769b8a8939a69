"""Which colours a grey picture of a scene leaves possible, how probable each is, and which ones a picture shows."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .degradation import grey
from .scene_reader import FAR, UNKNOWN
from .scenes import COLOURS, FAMILIES, HELD_OUT_OBJECTS, RADII, Item, Scene, colour_value, coverage, held_out_pair

SAME_LUMA = 0.005  # in [-1, 1]: colours that differ by less look the same in grey
FILLED = 0.99  # coverage of a pixel that shows nothing but the object
MOST = 0.8  # of the pixels of an object that has a colour


def luma(colour: str) -> float:
    """The luma of a colour of the objects, in [-1, 1]."""
    return float(grey(colour_value(COLOURS[colour])[None, :, None, None]))


def look_alikes(colour: str) -> tuple[str, ...]:
    """The colours of objects that cannot be told from this one in grey, itself among them."""
    return tuple(other for other in COLOURS if abs(luma(other) - luma(colour)) < SAME_LUMA)


def colour_posterior(scene: Scene, family: str) -> dict[tuple[str, ...], float]:
    """Every way to colour the objects of a scene that has their luma, with its probability.

    Given are the family and everything of the scene but the colours, of which only the luma is known. The law is that
    of the splits 'train' and 'test' of ``scenes``: all colourings are equally probable that have no object of
    ``HELD_OUT_OBJECTS``, no ``held_out_pair``, and in 'pairs' and 'rows' no object twice; in 'counts' all objects have
    one colour. (Neither places nor sizes depend on colours. The background does, as it is none of theirs; but the one
    colour that both may have, white, is known by its luma.)
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}.")
    choices = [look_alikes(item.colour) for item in scene.items]
    if family == "counts":
        if len({(item.shape, item.size, choice) for item, choice in zip(scene.items, choices)}) > 1:
            raise ValueError(f"a scene of the family 'counts' has equal objects; got {scene.items}.")
        colourings = [(colour,) * len(choices) for colour in choices[0]]
    else:
        colourings = list(itertools.product(*choices))
    allowed = [colours for colours in colourings if _occurs(colours, scene.items, family)]
    if not allowed:
        raise ValueError(f"no scene of the family {family!r} looks like this in grey: {scene.items}.")
    return dict.fromkeys(allowed, 1 / len(allowed))


def entropy(law: dict[tuple[str, ...], float]) -> float:
    """How much of the colours a law leaves open, in bits."""
    return -sum(p * math.log2(p) for p in law.values() if p > 0)


def total_variation(p: dict, q: dict) -> float:
    """Half the sum of the absolute differences of two laws: the largest difference that any event can have."""
    return sum(abs(p.get(outcome, 0) - q.get(outcome, 0)) for outcome in p.keys() | q.keys()) / 2


def painted_colours(picture: Tensor, scene: Scene) -> tuple[str, ...]:
    """The colour that a picture (3, 32, 32) in [-1, 1] has at the place of each object of a scene.

    It is that of ``COLOURS`` nearest to the median of the pixels which the object fills, if at least ``MOST`` of them
    are no farther from it than ``FAR``; else 'unknown': another colour, or several.
    """
    values = torch.stack([colour_value(rgb) for rgb in COLOURS.values()])
    names = []
    for item in scene.items:
        covered = coverage(item.shape, RADII[item.size], torch.tensor([item.x]), torch.tensor([item.y]))[0]
        pixels = picture[:, covered > FILLED]
        nearest = int((values - pixels.median(dim=1).values).norm(dim=1).argmin())
        near = (pixels - values[nearest, :, None]).norm(dim=0) <= FAR
        names.append(list(COLOURS)[nearest] if near.float().mean() >= MOST else UNKNOWN)
    return tuple(names)


def _occurs(colours: tuple[str, ...], items: tuple[Item, ...], family: str) -> bool:
    """Whether objects of these colours are allowed together."""
    objects = [(colour, item.shape) for colour, item in zip(colours, items)]
    if not HELD_OUT_OBJECTS.isdisjoint(objects):
        return False
    if family == "counts":
        return True
    pairs = list(itertools.combinations(objects, 2))
    return all(a != b and not held_out_pair(a, b) for a, b in pairs)
