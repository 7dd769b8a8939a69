"""The measurements that the chapter on scaling reads belong to their scripts, which estimate what they say."""

import json

import torch

from benchmarks import speed_ladder
from scripts import training_signals
from scripts.training_signals import PART, PARTS, RANGES, STAGES, squared_expectation


def test_the_signals_are_those_of_the_script():
    stored = json.loads(training_signals.RESULTS.read_text())
    assert [stage["step"] for stage in stored["stages"]] == [*STAGES, 4000]
    assert len(stored["loss_and_norm"]) == max(STAGES)
    settings = stored["settings"]
    assert (settings["parts"], settings["images_per_part"]) == (PARTS, PART)
    assert settings["ranges"] == [list(span) for span in RANGES]
    for stage in stored["stages"]:
        assert 0 < stage["trace_of_eps"] < stage["trace_of_t_and_eps"] < 1.1 * stage["trace"]
        assert stage["squared_length"] > 2 * stage["error_of_squared_length"]


def test_the_ladder_is_that_of_the_script():
    for run in json.loads(speed_ladder.RESULTS.read_text()):
        names = [row["rung"] for row in run["rungs"]]
        assert names == [*speed_ladder.RUNGS][: len(names)]
        assert len(names) >= len(speed_ladder.RUNGS) - (run["device"] == "cpu")
        assert run["rungs"][0]["speed"] == 1
        assert {"hardware", "threads", "load", "bfloat16_in_hardware", "batch", "torch", "date"} <= run.keys()


def test_the_squared_length_is_estimated_without_bias_and_with_its_error(generator):
    truth = torch.linspace(0, 1, 9, dtype=torch.float64)
    noise = torch.randn(2_000, 30, 9, dtype=torch.float64, generator=generator)
    found = torch.tensor([squared_expectation(rows @ rows.T) for rows in truth + 2 * noise])
    mean, scatter = found[:, 0].mean(), found[:, 0].std()
    assert abs(mean - truth.square().sum()) < 4 * scatter / 2_000**0.5
    assert 0.9 < found[:, 1].mean() / scatter < 1.2
