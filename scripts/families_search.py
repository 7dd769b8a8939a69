"""Try settings of the four families on points of the plane and on the digits, and keep what was tried.

    python -m scripts.families_search

Every family gets the same learning rates and as many values of one other setting, and the seconds that
``benchmarks/families.py`` gives it. Points are judged by the sliced Wasserstein distance to held-out points, digits by
the Frechet distance of the classifier's features to training digits (there the stored GANs took 1,300 steps, and the
flows 1,500, before the seconds were measured and made equal). Adds what was not tried before to
``ddpm_lib/datasets/families_search.json``: remove the file to try everything again. The best settings stand in
``benchmarks/families.py``, by hand.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

from benchmarks.families import RESULTS, as_json, measure, train
from ddpm_lib import digits, frechet_distance, pretrained_classifier
from ddpm_lib.families import quantise
from scripts.training_signals import rounded

POINT_RATES, DIGIT_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2), (1e-3, 2e-3, 5e-3, 1e-2)
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
    "DDPM": [{"width": 150, "T": T} for T in (50, 100)],
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


def main() -> None:
    path = RESULTS / "families_search.json"
    tasks = [
        (data, family, {**options, "learning_rate": rate})
        for data, (settings, rates) in GRIDS.items()
        for family in settings
        for options, rate in product(settings[family], rates)
    ]
    rows = {key(row): row for row in (json.loads(path.read_text())["runs"] if path.exists() else [])}
    missing = [task for task in tasks if json.dumps(task) not in rows]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows |= {key(row): rounded(row) for row in pool.map(attempt, *zip(*missing))}
    path.write_text(as_json({"runs": [rows[json.dumps(task)] for task in tasks]}))


def key(row: dict) -> str:
    return json.dumps([row["data"], row["family"], row["options"]])


if __name__ == "__main__":
    main()
