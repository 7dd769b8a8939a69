"""Fill holes in test images with every method of ``ddpm_lib.inverse`` and measure the fills.

    python -m scripts.inpainting_table

writes ``ddpm_lib/datasets/inpainting.json``, where the chapter "Inpainting and outpainting" reads it; half an hour on
one busy core. Every image is filled twice, from different noise, for the variety of the fills.
"""

import json
import platform
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_lib import (
    DPS,
    MMPS,
    Mask,
    NullSpace,
    PiGDM,
    Replacement,
    digits,
    pretrained,
    pretrained_classifier,
    repaint,
    sample,
)

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "inpainting.json"
SETTINGS = {
    "digits": {"images": 200, "steps": 50, "masks": ["hole", "half"]},
    "fashion-mnist": {"images": 20, "steps": 25, "masks": ["half"]},
}
FILLS, JUMP, RESAMPLINGS = 2, 5, 5
WEIGHT, SIGMA, ITERATIONS = 4.0, 0.05, 3
# Passes of the network forward and backward, per step.
PASSES = {
    "null space": (1, 0),
    "replacement": (1, 0),
    "RePaint": (RESAMPLINGS, 0),
    "DPS, null space": (1, 1),
    "PiGDM": (1, 1),
    "PiGDM, null space": (1, 1),
    "MMPS, null space": (1, 1 + ITERATIONS),
}


def examples(data: str, n: int) -> tuple[Tensor, Tensor]:
    """n test images in [-1, 1] and their labels."""
    if data == "digits":
        images, labels = digits("test")
        return images[:n], labels[:n]
    file = np.load(str(resources.files("ddpm_lib") / "datasets" / "fashion_examples.npz"))
    images = torch.from_numpy(file["images"][:n]).float()[:, None] / 127.5 - 1
    return images, torch.from_numpy(file["labels"][:n]).long()


def keep(mask: str, side: int) -> Tensor:
    """True where a pixel is known: all but a hole in the middle, or the left half."""
    known = torch.ones(side, side, dtype=torch.bool)
    if mask == "hole":
        known[side // 4 : side - side // 4, side // 4 : side - side // 4] = False
    else:
        known[:, side // 2 :] = False
    return known


def seam(x: Tensor, known: Tensor) -> float:
    """Root mean square jump from a known pixel to the filled one beside or below it."""
    across, down = known[:, 1:] != known[:, :-1], known[1:] != known[:-1]
    jumps = torch.cat([x.diff(dim=3)[..., across], x.diff(dim=2)[..., down]], dim=-1)
    return float(jumps.square().mean().sqrt())


def fill(method: str, model, known: Tensor, y: Tensor, steps: int, variance: float, seed: int) -> Tensor:
    """One fill of each image by the method."""
    A, generator = Mask(known), torch.Generator().manual_seed(seed)
    options = {"steps": steps, "variance": "beta_tilde", "generator": generator}
    inner = {
        "DPS": lambda: DPS(model, A, y, WEIGHT),
        "PiGDM": lambda: PiGDM(model, A, y, 0.0, variance),
        "MMPS": lambda: MMPS(model, A, y, SIGMA, ITERATIONS),
    }.get(method.split(",")[0], lambda: model)()
    if method == "PiGDM":
        return sample(inner, y.shape, **options)
    if method == "replacement":
        return sample(Replacement(model, A, y, generator), y.shape, **options)
    if method == "RePaint":
        return repaint(Replacement(model, A, y, generator), y.shape, jump=JUMP, resamplings=RESAMPLINGS, **options)
    return sample(NullSpace(inner, A, y), y.shape, **options)


def measure(fills: Tensor, x: Tensor, label: Tensor, known: Tensor, judge) -> dict:
    """What the chapter's table shows of fills (FILLS, B, 1, side, side)."""
    spread = (fills[0] - fills[1])[..., ~known].square().mean() / 2
    right = (judge(fills.flatten(0, 1).clamp(-1, 1)).argmax(1) == label.repeat(FILLS)).double()
    return {
        "known": float((fills - x)[..., known].square().mean().sqrt()),
        "seam": seam(fills.flatten(0, 1), known) / seam(x, known),
        "accuracy": float(right.mean()),
        "spread": float(spread.sqrt()),
        "rmse": float((fills - x)[..., ~known].square().mean().sqrt()),
    }


def main() -> None:
    rows = []
    for data, setting in SETTINGS.items():
        model, judge = pretrained(data), pretrained_classifier(data)
        x, label = examples(data, setting["images"])
        variance = float((digits("train")[0] if data == "digits" else examples(data, 100)[0]).var(0).mean())
        for mask in setting["masks"]:
            known = keep(mask, x.shape[-1])
            y = Mask(known).forward(x)
            for method in PASSES:
                fills = [fill(method, model, known, y, setting["steps"], variance, seed) for seed in range(FILLS)]
                row = {"data": data, "mask": mask, "method": method}
                row |= measure(torch.stack(fills), x, label, known, judge)
                rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                print(rows[-1], flush=True)
                settings = {"data": SETTINGS, "fills": FILLS, "jump": JUMP, "resamplings": RESAMPLINGS}
                settings |= {"weight": WEIGHT, "sigma": SIGMA, "iterations": ITERATIONS}
                machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
                stored = {"settings": settings, "machine": machine, "rows": rows}
                RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
