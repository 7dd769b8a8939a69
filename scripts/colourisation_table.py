"""Colour grey pictures of scenes in every way of the chapter and count which colours come out.

    python -m scripts.colourisation_table [WAY ...]

writes ``ddpm_lib/datasets/colourisation.json``, where the chapter "Colourisation" reads it; about a quarter of an hour
on one core. With the names of ways, only these are measured, again if they were before.
"""

import json
import math
import platform
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lib import MMPS, Grey, Guided, NullSpace, PiGDM, pretrained, sample
from ddpm_lib.checkpoint import read_tensors, shipped, write_file
from ddpm_lib.degradation import grey
from ddpm_lib.scene_posterior import colour_posterior, look_alikes, painted_colours
from ddpm_lib.scene_reader import FAR
from ddpm_lib.scenes import BACKGROUNDS, RADII, SHAPES, Scene, captioned_scenes, colour_value, coverage, draw_scene

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "colourisation.json"
SINGLES, FOURS, PAIRS, WORDS = 96, 48, 96, 24  # pictures: one object (of each shape), four equal ones, two, told
STEPS, BATCH, VARIANCE = 25, 48, 0.48  # VARIANCE is the data_variance of PiGDM
WEIGHTS = (0.0, 1.0, 3.0)  # of guidance by words
MMPS_SIGMA, MMPS_ITERATIONS = 0.1, 1
WAYS = ("truth", "conditional", "null space", "PiGDM", "MMPS")  # the last two inside NullSpace, too
FOUR = look_alikes("red")


def drawn(family: str, of: int, seed: int) -> list[Scene]:
    """Test scenes of a family whose first object has one of the four colours, on a background that hides nothing."""
    made = (scene for scene, _ in captioned_scenes(of, "test", seed, family))
    return [scene for scene in made if scene.background != "grey" and scene.items[0].colour in FOUR]


def questions() -> dict[str, list[Scene]]:
    """The scenes to be coloured. No other family could show their grey pictures."""
    counts, pairs = drawn("counts", 8000, 0), drawn("pairs", 1000, 1)
    single = [scene for scene in counts if len(scene.items) == 1]
    of_shape = [[scene for scene in single if scene.items[0].shape == shape][:SINGLES] for shape in SHAPES]
    apart = [s for s in pairs if s.items[1].colour in FOUR and len({(i.shape, i.size) for i in s.items}) == 2]
    return {
        "single": [scene for some in of_shape for scene in some],
        "four": [scene for scene in counts if len(scene.items) == 4][:FOURS],
        "pair": apart[:PAIRS],
    }


def pictures(scenes: list[Scene]) -> Tensor:
    """Pictures (N, 3, 32, 32) as ``ddpm_lib.scenes.scenes`` rounds them."""
    return ((torch.stack([draw_scene(scene) for scene in scenes]) + 1) * 127.5).round() / 127.5 - 1


def colour(way: str, x: Tensor, seed: int = 0) -> Tensor:
    """One colouring of the luma of each picture."""
    generator, y = torch.Generator().manual_seed(seed), grey(x)
    options = {"steps": STEPS, "variance": "beta_tilde", "generator": generator}
    if way == "truth":
        return x
    if way == "conditional":
        return sample(pretrained("scenes-grey"), x.shape, condition=y, **options)
    model = pretrained("scenes")
    inner = {
        "PiGDM": lambda: PiGDM(model, Grey(), y, 0.0, VARIANCE),
        "MMPS": lambda: MMPS(model, Grey(), y, MMPS_SIGMA, MMPS_ITERATIONS),
    }.get(way, lambda: model)()
    return sample(NullSpace(inner, Grey(), y), x.shape, **options)


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """The pictures x with luma y again, made greyer where they would leave [-1, 1] (the chapter derives it)."""
    away = x + Grey().pseudo_inverse(y - grey(x)) - y
    room = torch.where(away.abs() < 1e-9, 1.0, (away.sign() - y) / away)
    return y + room.amin(1, keepdim=True).clamp(0, 1) * away


def stray(x: Tensor, scenes: list[Scene]) -> float:
    """Share of the pixels without an object whose colour is not that of the background."""
    off, of = 0, 0
    for picture, scene in zip(x, scenes):
        ground = torch.ones(x.shape[2:], dtype=torch.bool)
        for item in scene.items:
            place = torch.tensor([item.x]), torch.tensor([item.y])
            ground &= coverage(item.shape, RADII[item.size], *place)[0] == 0
        distance = (picture - colour_value(BACKGROUNDS[scene.background])[:, None, None]).norm(dim=0)
        off, of = off + int((distance[ground] > FAR).sum()), of + int(ground.sum())
    return off / of


def in_batches(way: str, x: Tensor) -> Tensor:
    return torch.cat([colour(way, part, seed) for seed, part in enumerate(x.split(BATCH))])


def measure(way: str, scenes: dict[str, list[Scene]]) -> dict:
    """What one way paints: counts of colours per shape, the luma's error, pairs and fours that cannot be."""
    x = {kind: pictures(some) for kind, some in scenes.items()}
    painted = {kind: in_batches(way, images) for kind, images in x.items()}
    colours = {kind: [painted_colours(p, s) for p, s in zip(painted[kind], some)] for kind, some in scenes.items()}
    result: dict = {"single": {}}
    for shape in SHAPES:
        found = [c for (c,), s in zip(colours["single"], scenes["single"]) if s.items[0].shape == shape]
        result["single"][shape] = dict(sorted(Counter(found).items()))
    pairs = zip(colours["single"], scenes["single"])
    result["recovered"] = sum(found == tuple(item.colour for item in scene.items) for found, scene in pairs)
    everything, truth = torch.cat(list(painted.values())), torch.cat(list(x.values()))
    for name, images in (("luma", everything), ("fitted luma", fitted(everything, grey(truth)))):
        off = (grey(images) - grey(truth)).abs()
        result[name] = {"max": round(float(off.max()), 4), "rms": round(float(off.square().mean().sqrt()), 5)}
    result["stray"] = round(stray(everything, [s for some in scenes.values() for s in some]), 4)
    for kind, family in (("four", "counts"), ("pair", "pairs")):
        read = [(c, s) for c, s in zip(colours[kind], scenes[kind]) if set(c) <= set(FOUR)]
        possible = sum(c in colour_posterior(s, family) for c, s in read)
        result[kind] = {"pictures": len(scenes[kind]), "read": len(read), "possible": possible}
    return result


def each_for_itself(scenes: dict[str, list[Scene]]) -> dict:
    """How many pictures are possible, on average, where every object is painted for itself from its exact law."""
    result = {}
    for kind, family in (("four", "counts"), ("pair", "pairs")):
        total = 0.0
        for scene in scenes[kind]:
            laws = [colour_posterior(Scene(scene.background, (item,)), "counts") for item in scene.items]
            colourings = colour_posterior(scene, family)
            total += sum(math.prod(law.get((c,), 0) for law, c in zip(laws, colours)) for colours in colourings)
        result[kind] = {"pictures": len(scenes[kind]), "possible": round(total, 1)}
    return result


def obedience(weight: float) -> dict:
    """How often words choose the colour: of an object seen in training, and of one that never was."""
    model = pretrained("scenes")
    result = {}
    for kind, chosen in (("seen", {"red", "green", "purple"}), ("never seen", {"blue"})):
        scenes = [s for s in drawn("counts", 2000, 2) if len(s.items) == 1 and s.items[0].shape == "circle"][:WORDS]
        words = [sorted(chosen)[i % len(chosen)] for i in range(len(scenes))]
        y = grey(pictures(scenes))
        tokens = model.network.encoder.tokenise([f"a {word} circle" for word in words])
        options = {"steps": STEPS, "variance": "beta_tilde", "generator": torch.Generator().manual_seed(0)}
        way = NullSpace(Guided(model, weight), Grey(), y)
        x = sample(way, (len(scenes), 3, *y.shape[2:]), condition=tokens, **options)
        found = [painted_colours(p, s)[0] for p, s in zip(x, scenes)]
        result[kind] = {
            "pictures": len(scenes),
            "obeyed": sum(a == b for a, b in zip(found, words)),
            "unknown": found.count("unknown"),
        }
    return result


def settings() -> dict:
    """What the stored numbers depend on."""
    return {
        "singles of each shape": SINGLES,
        "fours": FOURS,
        "pairs": PAIRS,
        "told": WORDS,
        "steps": STEPS,
        "batch": BATCH,
        "MMPS": [MMPS_SIGMA, MMPS_ITERATIONS],
        "variance": VARIANCE,
        "weights": list(WEIGHTS),
    }


def models() -> dict:
    """Which weights were measured."""
    return {name: read_tensors(shipped(name))[0]["sha256"] for name in ("scenes", "scenes-grey")}


def main(ways: list[str]) -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if (stored.get("models"), stored.get("settings")) != (models(), settings()):
        stored = {"models": models(), "settings": settings(), "ways": {}}
    scenes = questions()
    stored["each for itself"] = each_for_itself(scenes)
    for way in ways or WAYS:
        stored["ways"][way] = measure(way, scenes)
        print(way, json.dumps(stored["ways"][way]), flush=True)
    if not ways:
        stored["words"] = {str(weight): obedience(weight) for weight in WEIGHTS}
    stored["ways"] = {way: stored["ways"][way] for way in WAYS if way in stored["ways"]}
    stored["machine"] = {"processor": platform.machine(), "torch": torch.__version__}
    write_file(RESULTS, (json.dumps(stored, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
