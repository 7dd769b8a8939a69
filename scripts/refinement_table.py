"""Refine coarse and blurred test images of Fashion-MNIST in several ways, and measure the answers.

    python -m scripts.refinement_table

writes ``ddpm_lib/datasets/refinement.json``, where the chapter "Image refinement" reads it; about ten minutes on one
core. It needs the data set Fashion-MNIST. With names, as in ``python -m scripts.refinement_table trained sdedit``,
only these parts are measured anew.
"""

import json
import math
import platform
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lib import (
    Blur,
    Downsample,
    NullSpace,
    PiGDM,
    frechet_distance,
    load_images,
    pretrained,
    pretrained_classifier,
    sample,
    step,
    timesteps,
)
from ddpm_lib.degradation import enlarge

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "refinement.json"
IMAGES, STEPS, DRAWS = 200, 25, {"null space": 2, "PiGDM": 2, "conditional": 8}
SIGMA = 2 / 255 / math.sqrt(12)  # deviation of what rounding to 256 levels adds
TASKS = {"coarse": Downsample(4), "blurred": Blur(2.0)}
STRANGERS = {"means of 2 x 2": Downsample(2), "means of 7 x 7": Downsample(7), "blurred": Blur(2.0)}
STRANGE_IMAGES = 50
STARTS = (100, 300, 500, 700, 900)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in decibels of a mean squared error, for images in [-1, 1]."""
    return 10 * math.log10(4 / mse)


def seen(A, x: Tensor) -> Tensor:
    """A x in 256 levels, as a file would hold it."""
    return as_file(A.forward(x))


def as_file(x: Tensor) -> Tensor:
    """Images in [-1, 1] rounded to 256 levels."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def shown(y: Tensor, side: int = 28) -> Tensor:
    """What is seen, at the size of the images: what the networks were trained on."""
    return y if y.shape[-1] == side else enlarge(y, side // y.shape[-1])


def linear_rule(A, x: Tensor) -> tuple[Tensor, Tensor]:
    """K and k of the affine rule ``K y + k`` with the least squared error, from images x; both for flattened images."""
    flat = x.double().flatten(1)
    mean, C = flat.mean(0), flat.T.cov()
    rows = A.forward(torch.eye(flat.shape[1], dtype=torch.float64).view(-1, *x.shape[1:])).flatten(1).T
    S = rows @ C @ rows.T + SIGMA**2 * torch.eye(len(rows), dtype=torch.float64)
    K = torch.linalg.solve(S, rows @ C).T
    return K, mean - K @ (rows @ mean)


def guided(name: str, model, A, y: Tensor, variance: float):
    """The unconditional model, led to y."""
    if name == "null space":
        return NullSpace(model, A, y)
    if isinstance(A, Downsample):
        return NullSpace(PiGDM(model, A, y, 0.0, variance), A, y)
    return PiGDM(model, A, y, SIGMA, variance)


def draws(denoiser, x: Tensor, number: int, condition: Tensor | None = None) -> Tensor:
    """Answers (number, B, 1, 28, 28)."""
    answers = []
    for seed in range(number):
        options = {"steps": STEPS, "variance": "beta_tilde", "generator": torch.Generator().manual_seed(seed)}
        answers.append(sample(denoiser, x.shape, condition=condition, **options).clamp(-1, 1))
    return torch.stack(answers)


def crude(x: Tensor) -> Tensor:
    """Drawings made of images: blurred, and then in three grey levels."""
    return Blur(1.5).forward(x).clamp(-1, 1).round()


def edited(model, drawing: Tensor, start: int, seed: int = 0) -> Tensor:
    """The drawing noised to the step ``start`` and walked back (SDEdit)."""
    generator, schedule = torch.Generator().manual_seed(seed), model.schedule
    path = [start] + [t for t in timesteps(schedule.T, 50) if t < start]
    z = torch.randn(drawing.shape, generator=generator)
    x = schedule.signal[start].float() * drawing + schedule.noise[start].float() * z
    with torch.no_grad():
        for t, s in pairwise(path):
            x = step(model(x, t).clip(), t, s, schedule, variance="beta_tilde", generator=generator)
    return x.clamp(-1, 1)


class Judge:
    """Frechet distance to test images that are not refined, and label accuracy."""

    def __init__(self, others: Tensor, labels: Tensor):
        self.classifier, self.labels = pretrained_classifier("fashion-mnist"), labels
        self.reference = self.features(others)

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in x.split(500)])

    def __call__(self, x: Tensor) -> dict:
        found = self.features(x)
        right = self.classifier.head(found).argmax(1) == self.labels[: len(x)]
        return {"frechet": frechet_distance(found, self.reference), "accuracy": float(right.double().mean())}


def measure(answers: Tensor, x: Tensor, A, y: Tensor, judge: Judge) -> dict:
    """The first draw is judged; errors are means over all draws (number, B, 1, 28, 28)."""
    mse = float((answers - x).square().mean())
    off = A.forward(answers[0]) - y
    row = {"mse": mse, "psnr": psnr(mse) if mse else None} | judge(answers[0])
    row |= {"off_rms": float(off.square().mean().sqrt()), "off_max": float(off.abs().max())}
    if len(answers) > 1:
        row["variance"] = float(answers.var(0).mean())
    return row


def means_of(answers: Tensor, x: Tensor) -> dict:
    """Mean squared error of the mean of N draws, for N = 1, 2, 4, ...; each draw is used once for each N."""
    sizes = [2**k for k in range(int(math.log2(len(answers))) + 1)]
    return {n: float((answers.unflatten(0, (-1, n)).mean(1) - x).square().mean()) for n in sizes}


def untrained(stored: dict, x: Tensor, training: Tensor, judge: Judge, model) -> None:
    """The rows of the table that no conditional network is needed for, for both tasks."""
    variance = float(training.var(0).mean())
    for task, A in TASKS.items():
        y = seen(A, x)
        K, k = linear_rule(A, training)
        linear = (y.double().flatten(1) @ K.T + k).float().view(1, *x.shape).clamp(-1, 1)
        answers = {"real": x[None], "as seen": shown(y).clamp(-1, 1)[None], "linear": linear}
        for name in ("null space", "PiGDM"):
            answers[name] = draws(guided(name, model, A, y, variance), x, DRAWS[name])
        for name, found in answers.items():
            stored["untrained"].append({"task": task, "method": name} | measure(found, x, A, y, judge))
            print(stored["untrained"][-1], flush=True)


def trained(stored: dict, x: Tensor, training: Tensor, judge: Judge, model) -> None:
    """The rows of the two conditional networks, and the error of means of their draws."""
    for task, A in TASKS.items():
        y = seen(A, x)
        found = draws(pretrained(f"fashion-mnist-{task}"), x, DRAWS["conditional"], shown(y))
        for name, answers in {"conditional": found, "mean of 8": found.mean(0, keepdim=True)}.items():
            stored["trained"].append({"task": task, "method": name} | measure(answers, x, A, y, judge))
            print(stored["trained"][-1], flush=True)
        stored["means"][task] = means_of(found, x)


def estrange(stored: dict, x: Tensor, training: Tensor, judge: Judge, model) -> None:
    """The network for means of 4 x 4, shown what it was not trained on, beside guidance, which is told."""
    x, variance = x[:STRANGE_IMAGES], float(training.var(0).mean())
    network = pretrained("fashion-mnist-coarse")
    for name, A in {"means of 4 x 4": Downsample(4), **STRANGERS}.items():
        y = seen(A, x)
        answers = {
            "conditional": draws(network, x, 1, shown(y)),
            "PiGDM": draws(guided("PiGDM", model, A, y, variance), x, 1),
        }
        for method, found in answers.items():
            stored["strangers"].append({"seen": name, "method": method} | measure(found, x, A, y, judge))
            print(stored["strangers"][-1], flush=True)


def edit(stored: dict, x: Tensor, training: Tensor, judge: Judge, model) -> None:
    """Drawings made of test images, noised to several steps and walked back."""
    drawing = crude(x)
    for start in (0, *STARTS):
        found = edited(model, drawing, start) if start else drawing
        row = {"start": start, "to_drawing": float((found - drawing).square().mean().sqrt())}
        row["to_image"] = float((found - x).square().mean().sqrt())
        stored["sdedit"].append(row | judge(found))
        print(stored["sdedit"][-1], flush=True)


PARTS = {"untrained": untrained, "trained": trained, "strangers": estrange, "sdedit": edit}


def rounded(value):
    """Every float in what is stored, to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def images(split: str) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and labels of Fashion-MNIST."""
    x, labels = load_images("fashion-mnist", split)
    return x / 127.5 - 1, labels


def main(parts: list[str]) -> None:
    x, labels = images("test")
    training, judge, model = images("train")[0], Judge(x[5000:], labels), pretrained("fashion-mnist")
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = {"images": IMAGES, "steps": STEPS, "draws": DRAWS, "sigma": SIGMA, "strange_images": STRANGE_IMAGES}
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    for part in parts or PARTS:
        new = {part: [], "means": {}}
        PARTS[part](new, x[:IMAGES], training, judge, model)
        old |= {name: found for name, found in new.items() if found}
        stored = {"settings": settings, "machine": machine} | {k: v for k, v in old.items() if k in (*PARTS, "means")}
        RESULTS.write_text(json.dumps(rounded(stored), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
