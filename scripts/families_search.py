"""Try settings of the four families on points of the plane and on the digits, and keep what was tried.

    python -m scripts.families_search [ring] [spiral] [digits]

Every family gets the same learning rates and as many values of one other setting, and the seconds that
``benchmarks/families.py`` gives it. Points are judged by the sliced Wasserstein distance to held-out points, digits by
the Frechet distance of the classifier's features to training digits. Writes
``ddpm_lib/datasets/families_search.json``; the best settings stand in ``benchmarks/families.py``, by hand.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

from benchmarks.families import RESULTS, as_json, measure, rounded, train
from ddpm_lib import digits, frechet_distance, pretrained_classifier
from ddpm_lib.families import quantise

POINT_RATES, DIGIT_RATES = (5e-4, 1e-3, 2e-3, 5e-3), (1e-3, 2e-3)
POINT_GRID = {
    "GAN": [{"width": 92, "penalty": penalty} for penalty in (0.0, 0.1)],
    "VAE": [{"width": 92, "latent": latent} for latent in (2, 8)],
    "Flow": [{"layers": layers, "width": width} for layers, width in ((6, 74), (8, 64))],
    "DDPM": [{"width": 92, "T": T} for T in (50, 100)],
}
DIGIT_GRID = {
    "GAN": [{"width": 150, "latent": 32, "penalty": penalty} for penalty in (0.1, 1.0)],
    "VAE": [{"width": 150, "latent": latent} for latent in (8, 16)],
    "Flow": [{"layers": layers, "width": width} for layers, width in ((6, 96), (8, 80))],
    "DDPM": [{"width": 150, "T": T} for T in (100, 200)],
}
GRIDS = {"ring": (POINT_GRID, POINT_RATES), "spiral": (POINT_GRID, POINT_RATES), "digits": (DIGIT_GRID, DIGIT_RATES)}


def attempt(data: str, family: str, options: dict) -> dict:
    model = train(data, family, 0, options)
    figures, drawn = measure(data, model, 0)
    if data == "digits":
        judge = pretrained_classifier()
        features = [judge.features(images) for images in (quantise(drawn), digits("train")[0])]
        figures["frechet_distance"] = frechet_distance(*features)
    row = {"data": data, "family": family, "options": options, **figures}
    print(rounded(row), flush=True)
    return row


def main(chosen: list[str]) -> None:
    tasks = [
        (data, family, {**options, "learning_rate": rate})
        for data in chosen or GRIDS
        for family, settings in GRIDS[data][0].items()
        for options, rate in product(settings, GRIDS[data][1])
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(attempt, *zip(*tasks)))
    path = RESULTS / "families_search.json"
    kept = [row for row in json.loads(path.read_text())["runs"] if row["data"] not in chosen] if chosen else []
    path.write_text(as_json({"runs": kept + rounded(rows)}))


if __name__ == "__main__":
    main(sys.argv[1:])
