"""GAN, VAE, flow and DDPM on the same data, with the same number of weights and the same seconds of training.

    python -m benchmarks.families

The settings are the ones that ``scripts/families_search.py`` found. Every family is trained with every seed, two runs
at a time; then, one after the other in this process, the families take turns at training and sampling, and the
processor's time is read, which other work on the machine changes least. Writes ``ddpm_lib/datasets/families.json``, and
the digits drawn to ``families_digits.npz``.
"""

import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import resources
from itertools import product
from multiprocessing import get_context
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ddpm_lib import GaussianMixture, digits, sliced_wasserstein, spiral
from ddpm_lib.families import DDPM, GAN, VAE, Family, Flow, dequantise, quantise
from scripts.training_signals import rounded

from .speed_ladder import hardware

RESULTS = resources.files("ddpm_lib") / "datasets"
FAMILIES = {family.__name__: family for family in (GAN, VAE, Flow, DDPM)}
POINTS, SAMPLES = 10_000, 10_000
SEEDS = range(1, 6)  # the search had seed 0
DIGITS, ROUNDS = 1000, 7
# The same seconds for all families, about: the results file has the times.
STEPS = {
    "ring": {"GAN": 1250, "VAE": 2750, "Flow": 1500, "DDPM": 3250},
    "digits": {"GAN": 1080, "VAE": 3000, "Flow": 1750, "DDPM": 3200},
}
STEPS["spiral"] = STEPS["ring"]
# Found by scripts/families_search.py. Those for points are the classes' defaults; about 70,000 weights, and 210,000
# for digits.
POINT_OPTIONS = {
    "GAN": {"width": 92, "penalty": 0.1, "learning_rate": 2e-3},
    "VAE": {"width": 92, "latent": 8, "learning_rate": 5e-3},
    "Flow": {"layers": 8, "width": 64, "learning_rate": 5e-3},
    "DDPM": {"width": 92, "T": 100, "learning_rate": 1e-2},
}
DIGIT_OPTIONS = {
    "GAN": {"width": 150, "latent": 32, "penalty": 1.0, "learning_rate": 2e-3},
    "VAE": {"width": 150, "latent": 8, "learning_rate": 5e-3},
    "Flow": {"layers": 8, "width": 80, "learning_rate": 5e-3},
    "DDPM": {"width": 150, "T": 100, "learning_rate": 1e-2},
}
OPTIONS = {"ring": POINT_OPTIONS, "spiral": POINT_OPTIONS, "digits": DIGIT_OPTIONS}
RING = GaussianMixture.ring()
NEAR = 0.4  # four deviations of a mode of the ring


def draw(data: str, n: int, seed: int) -> Tensor:
    """n points of the plane."""
    generator = torch.Generator().manual_seed(seed)
    return (RING.sample(n, generator) if data == "ring" else spiral(n, generator)).float()


def training_data(data: str) -> Tensor:
    if data != "digits":
        return draw(data, POINTS, 0)
    generator = torch.Generator().manual_seed(0)
    return torch.cat([dequantise(digits("train")[0], generator) for _ in range(20)])


def held_out(data: str) -> Tensor:
    if data != "digits":
        return draw(data, SAMPLES, 1)
    return dequantise(digits("test")[0], torch.Generator().manual_seed(1))


def train(data: str, family: str, seed: int, options: dict) -> Family:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    points = training_data(data)
    model = FAMILIES[family](points.shape[1], **options)
    for _ in model.fit(points, STEPS[data][family], seed=seed):
        pass
    return model


def measure(data: str, model: Family, seed: int) -> tuple[dict, Tensor]:
    """Figures of a trained model, and what it drew."""
    generator = torch.Generator().manual_seed(seed)
    real, figures = held_out(data), {}
    drawn = model.sample(DIGITS if data == "digits" else SAMPLES, generator)
    if data != "digits":
        figures["sliced_wasserstein"] = sliced_wasserstein(drawn, real)
    if data == "ring":
        nearest = torch.cdist(drawn, RING.means.float()).min(1)
        near = nearest.values < NEAR
        count = torch.bincount(nearest.indices[near], minlength=len(RING.means))
        figures["near"] = float(near.double().mean())
        figures["modes"] = int((count > len(drawn) / len(RING.means) / 4).sum())
    if model.likelihood != "none":
        nats = float(model.log_likelihood(real, generator).double().mean())
        if data == "digits":  # a level is 2 / 17 wide
            figures["bits_per_pixel"] = -nats / 64 / math.log(2) - math.log2(2 / 17)
        else:
            figures["log_likelihood"] = nats
    return figures, drawn


def run(data: str, family: str, seed: int, options: dict) -> tuple[dict, np.ndarray | None]:
    model = train(data, family, seed, options)
    figures, drawn = measure(data, model, seed)
    parameters = sum(p.numel() for p in model.parameters())
    figures = {
        "data": data,
        "family": family,
        "seed": seed,
        "parameters": parameters,
        "passes": model.passes,
        **figures,
    }
    print(rounded(figures), flush=True)
    levels = ((quantise(drawn)[:, 0] + 1) * 8).round().to(torch.uint8).numpy() if data == "digits" else None
    return figures, levels


def timing(options: dict) -> list[dict]:
    """Medians of processor time over rounds in which the families take turns: training, and drawing 1,000 samples."""
    rows = []
    for data in ("ring", "digits"):
        points = training_data(data)
        models = {name: FAMILIES[name](points.shape[1], **options[data][name]) for name in FAMILIES}
        steps = {name: model.fit(points, 10_000) for name, model in models.items()}
        times = {name: ([], []) for name in FAMILIES}
        for round_ in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.process_time()
                for _ in range(20):
                    next(steps[name])
                middle = time.process_time()
                model.sample(1000)
                if round_ > 0:  # the first warms up
                    times[name][0].append((middle - start) / 20)
                    times[name][1].append(time.process_time() - middle)
        for name, (step, draw_1000) in times.items():
            rows.append(
                {
                    "data": data,
                    "family": name,
                    "training_seconds": STEPS[data][name] * median(step),
                    "sampling_ms_per_1000": 1000 * median(draw_1000),
                    "slower_than_the_GAN": median(a / b for a, b in zip(draw_1000, times["GAN"][1])),
                }
            )
    return rows


def floor(data: str) -> list[float]:
    """Sliced Wasserstein distances of fresh points from the held-out ones."""
    return [sliced_wasserstein(draw(data, SAMPLES, 100 + seed), held_out(data)) for seed in SEEDS]


def main() -> None:
    torch.set_num_threads(1)
    jobs = [(data, family, seed, OPTIONS[data][family]) for data, family, seed in product(STEPS, FAMILIES, SEEDS)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(run, *zip(*jobs)))
    images = {name: [] for name in FAMILIES}
    for figures, levels in outcomes:
        if levels is not None:
            images[figures["family"]].append(levels)
    np.savez_compressed(RESULTS / "families_digits.npz", **{name: np.stack(rows) for name, rows in images.items()})
    settings = {
        "points": POINTS,
        "samples": {"points": SAMPLES, "digits": DIGITS},
        "steps": STEPS,
        "options": OPTIONS,
        "hardware": hardware(torch.device("cpu")) + ", one thread",
        "torch": torch.__version__.split("+")[0],
        "date": date.today().isoformat(),
    }
    parts = {
        "settings": settings,
        "floor": {data: floor(data) for data in ("ring", "spiral")},
        "truth": {"ring": float(RING.log_prob(held_out("ring")).mean())},
        "timing": timing(OPTIONS),
        "runs": [figures for figures, _ in outcomes],
    }
    (RESULTS / "families.json").write_text(as_json(rounded(parts)))


def as_json(parts: dict) -> str:
    """JSON with a line for each part, and for each row of a part that is a list of rows."""
    lines = []
    for name, part in parts.items():
        rows = isinstance(part, list)
        text = "[\n  " + ",\n  ".join(json.dumps(row) for row in part) + "\n ]" if rows else json.dumps(part)
        lines.append(f"{json.dumps(name)}: {text}")
    return "{" + ",\n ".join(lines) + "}\n"


if __name__ == "__main__":
    main()
