"""A training run killed at any moment goes on from a whole checkpoint, to the same bits.

One subprocess imports torch, then starts each training run as a fork of itself: twenty starts are twenty forks.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_lib import Denoiser, Schedule, Trainer, UNet
from ddpm_lib.checkpoint import read_checkpoint

KILLS = 20
EVERY = 2  # steps between two checkpoints
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def new_trainer() -> Trainer:
    torch.manual_seed(0)
    network = UNet(4, 1, 4, (1, 2), 1, (2,), dropout=0.2, groups=2, classes=3)
    images = torch.rand(10, 1, 4, 4) * 2 - 1
    options = {"batch_size": 4, "warmup": 5, "precision": "float32", "seed": 3}
    return Trainer(Denoiser(network, Schedule.linear(30)), images, torch.arange(10) % 3, **options)


def train_until_killed(path: Path) -> None:
    """Go on from the checkpoint if there is one, and save every few steps, for ever."""
    trainer = new_trainer()
    if path.exists():
        trainer.resume(path)
    print("at", trainer.step, flush=True)
    while True:
        for _ in trainer.run(EVERY):
            pass
        trainer.save(path)


def serve(path: Path) -> None:
    """For each line on standard input, start a run in a fork and print its process number."""
    torch.set_num_threads(1)
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            train_until_killed(path)
        print("started", child, flush=True)
        os.waitpid(child, 0)
        print("ended", child, flush=True)


def wait_for_news(path: Path) -> None:
    """Wait until there is a new file."""
    before = path.exists() and path.stat().st_mtime_ns
    deadline = time.monotonic() + 300
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "the run saves nothing"
        time.sleep(0.002)


@pytest.fixture
def server(tmp_path):
    """The process that starts runs; whatever happens, it and its forks end with the test."""
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [sys.executable, __file__, tmp_path / "run.safetensors"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    with process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_run_killed_twenty_times_ends_at_the_bits_of_an_uninterrupted_one(tmp_path, server):
    path, rng = tmp_path / "run.safetensors", random.Random(1)
    started_at = []
    for i in range(KILLS):
        server.stdin.write("go\n")
        server.stdin.flush()
        said = dict(server.stdout.readline().split() for _ in range(2))  # in whichever order they come
        assert said.keys() == {"started", "at"}
        step = int(said["at"])
        started_at.append(step)
        # Every other run may save at least once, so that there is progress on the slowest machine too.
        if i % 2:
            wait_for_news(path)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(int(said["started"]), signal.SIGKILL)
        assert server.stdout.readline().startswith("ended")
        if path.exists():
            config, _ = read_checkpoint(path, "training")
            assert config["step"] % EVERY == 0
            assert config["step"] >= step
    config, killed = read_checkpoint(path, "training")
    assert started_at == sorted(started_at)
    assert config["step"] >= EVERY * KILLS // 2

    whole = new_trainer()
    for _ in whole.run(config["step"]):
        pass
    whole.save(tmp_path / "whole.safetensors")
    _, uninterrupted = read_checkpoint(tmp_path / "whole.safetensors", "training")
    assert killed.keys() == uninterrupted.keys()
    assert [name for name in killed if not torch.equal(killed[name], uninterrupted[name])] == []


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
