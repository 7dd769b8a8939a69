"""A training run killed at any moment goes on from a whole checkpoint, to the same bits.

One subprocess imports torch, then starts each training run as a fork of itself: fifty starts are fifty forks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_lib import run
from ddpm_lib.checkpoint import read_checkpoint
from ddpm_lib.recipe import Data, Network, Noise, Output, Recipe, Training

KILLS = 50
EVERY = 2  # steps between two checkpoints
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def recipe(steps: int = 10**9) -> Recipe:
    return Recipe(
        Data("digits"),
        Network(8, 1, 4, (1, 2), 1, (4,), dropout=0.2, groups=2, classes=10),
        Training(steps, 4, 1e-3, warmup=5, ema_decay=0.99, precision="float32", seed=3),
        Noise(T=30),
        Output(log_every=1, save_every=EVERY, sample_every=10**9, sample_steps=2),
    )


def newest(folder: Path) -> tuple[int, dict]:
    config, tensors = read_checkpoint(run.checkpoints(folder)[0], "training")
    return config["step"], tensors


def serve(path: Path) -> None:
    """For each line on standard input, start a run in a fork and print its process number."""
    torch.set_num_threads(1)
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            run.train(recipe(), path, device="cpu")
        print("started", child, flush=True)
        os.waitpid(child, 0)
        print("ended", child, flush=True)


def wait_for_news(path: Path) -> None:
    """Wait until there is a new checkpoint."""
    before = run.checkpoints(path)[:1]
    deadline = time.monotonic() + 300
    while run.checkpoints(path)[:1] == before:
        assert time.monotonic() < deadline, "the run saves nothing"
        time.sleep(0.002)


@pytest.fixture
def server(tmp_path):
    """The process that starts runs; whatever happens, it and its forks end with the test."""
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [sys.executable, __file__, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    with process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_run_killed_fifty_times_ends_at_the_bits_of_an_uninterrupted_one(tmp_path, server):
    path, rng = tmp_path / "run", random.Random(1)
    reached = 0
    for i in range(KILLS):
        server.stdin.write("go\n")
        server.stdin.flush()
        word, child = server.stdout.readline().split()
        assert word == "started"
        # Every other run may save at least once, so that there is progress on the slowest machine too.
        if i % 2:
            wait_for_news(path)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(int(child), signal.SIGKILL)
        assert server.stdout.readline().startswith("ended")
        found = run.checkpoints(path)
        assert len(found) <= run.KEPT + 1  # one more if it was killed between a save and the removal of the oldest
        if found:
            step, _ = newest(path)
            assert step % EVERY == 0
            assert step >= reached
            reached = step
    assert reached >= EVERY * KILLS // 2

    run.train(recipe(reached + EVERY), path, device="cpu")
    run.train(recipe(reached + EVERY), tmp_path / "whole", device="cpu")
    (step, killed), (same_step, whole) = newest(path), newest(tmp_path / "whole")
    assert step == same_step == reached + EVERY
    assert killed.keys() == whole.keys()
    assert [name for name in killed if not torch.equal(killed[name], whole[name])] == []
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 1))  # no step told twice, none missing
    expected = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == expected


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
