"""The stored comparison of the four families: made by its script, with the settings that the search found."""

import json
from itertools import product
from statistics import mean

import numpy as np
import pytest
import torch

from benchmarks.families import DIGITS, FAMILIES, OPTIONS, POINTS, RESULTS, SAMPLES, SEEDS, STEPS, held_out
from ddpm_lib import sliced_wasserstein
from scripts.families_search import GRIDS

STORED = json.loads((RESULTS / "families.json").read_text())
SEARCH = json.loads((RESULTS / "families_search.json").read_text())["runs"]


def test_the_results_are_those_of_the_script():
    runs = [(run["data"], run["family"], run["seed"]) for run in STORED["runs"]]
    assert runs == list(product(STEPS, FAMILIES, SEEDS))
    ours = {"points": POINTS, "samples": {"points": SAMPLES, "digits": DIGITS}, "steps": STEPS, "options": OPTIONS}
    assert {name: STORED["settings"][name] for name in ours} == json.loads(json.dumps(ours))
    for run in STORED["runs"]:
        model = FAMILIES[run["family"]](64 if run["data"] == "digits" else 2, **OPTIONS[run["data"]][run["family"]])
        assert (sum(p.numel() for p in model.parameters()), model.passes) == (run["parameters"], run["passes"])


@pytest.mark.parametrize("data", STEPS)
def test_all_families_have_the_same_number_of_weights_and_about_the_same_time(data):
    counts = [run["parameters"] for run in STORED["runs"] if run["data"] == data]
    assert max(counts) < 1.15 * min(counts)
    times = [row["training_seconds"] for row in STORED["timing"] if row["data"] == data]
    assert not times or max(times) < 1.4 * min(times)


def test_the_search_tried_the_whole_grid():
    tried = [(row["data"], row["family"], json.dumps(row["options"])) for row in SEARCH]
    grid = [
        (data, family, json.dumps({**options, "learning_rate": rate}))
        for data, (settings, rates) in GRIDS.items()
        for family in settings
        for options, rate in product(settings[family], rates)
    ]
    assert tried == grid


def best(rows: list[dict], key: str) -> dict:
    """The options with the smallest sum of a figure over the data."""
    totals = {}
    for row in rows:
        name = json.dumps(row["options"])
        totals[name] = totals.get(name, 0) + row[key]
    return json.loads(min(totals, key=totals.get))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_settings_are_the_best_of_the_search(family):
    rows = [row for row in SEARCH if row["family"] == family]
    assert OPTIONS["ring"][family] == OPTIONS["spiral"][family]
    assert OPTIONS["ring"][family] == best([row for row in rows if row["data"] != "digits"], "sliced_wasserstein")
    assert OPTIONS["digits"][family] == best([row for row in rows if row["data"] == "digits"], "frechet_distance")
    defaults, chosen = FAMILIES[family](2), FAMILIES[family](2, **OPTIONS["ring"][family])
    assert str(defaults) == str(chosen)
    names = ("learning_rate", "latent", "penalty", "passes")
    assert [getattr(defaults, name, None) for name in names] == [getattr(chosen, name, None) for name in names]


@pytest.mark.parametrize("data", ["ring", "spiral"])
def test_no_family_is_a_straw_man(data):
    """Mean sliced Wasserstein distance over the seeds at most 0.07: the best Gaussian is about three times as far."""
    real = held_out(data)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    gaussian = noise @ torch.linalg.cholesky(real.T.cov()).T + real.mean(0)
    assert sliced_wasserstein(gaussian, real) > 0.17
    for family in FAMILIES:
        found = [run["sliced_wasserstein"] for run in STORED["runs"] if (run["family"], run["data"]) == (family, data)]
        assert mean(found) < 0.07


def test_the_stored_digits_are_all_there():
    with np.load(RESULTS / "families_digits.npz") as drawn:
        assert list(drawn) == list(FAMILIES)
        for levels in drawn.values():
            assert (levels.shape, levels.dtype) == ((len(SEEDS), DIGITS, 8, 8), np.uint8)
            assert 8 < levels.max() <= 16
            assert len(np.unique(levels.reshape(-1, 64), axis=0)) > 0.9 * len(SEEDS) * DIGITS
