"""Whole training runs: on one process or two, stopped, killed, out of numbers or out of disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_lib import CheckpointError, run, save_denoiser
from ddpm_lib.recipe import Data, Network, Noise, Output, Recipe, Training
from ddpm_lib.training import NonFiniteError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
STEPS = 20


def recipe(steps=STEPS, save_every=10**9, **training) -> Recipe:
    options = {"warmup": 5, "ema_decay": 0.9, "precision": "float32", "seed": 3} | training
    return Recipe(
        Data("digits"),
        Network(8, 1, 8, (1, 2), 1, (4,), dropout=0.0, groups=4, classes=10),
        Training(steps, 8, **{"learning_rate": 1e-3} | options),
        Noise(T=100),
        Output(log_every=1, save_every=save_every, sample_every=10**9, sample_steps=2),
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([line["loss"] for line in metrics(folder)], dtype=torch.float64)


def averaged(folder):
    return torch.cat([p.detach().flatten() for p in run.load_run(folder).parameters()])


def apart(folder, other):
    """Relative distance of the averaged weights of two runs."""
    return float((averaged(folder) - averaged(other)).norm() / averaged(other).norm())


def newest_bits(folder):
    return run.checkpoints(folder)[0].name, {k: v.clone() for k, v in run.load_run(folder).state_dict().items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, which also writes the recipe for the others."""
    folder = tmp_path_factory.mktemp("alone")
    assert run.train(recipe(), folder, device="cpu")
    return folder


def command(alone, folder, *overrides):
    options = ["--folder", str(folder), "--device", "cpu", *map(str, overrides)]
    return ["-m", "ddpm_lib", "train", str(alone / "recipe.toml"), *options]


@pytest.fixture
def start(tmp_path):
    """Starts python with arguments, output into a file; whatever happens, what it started ends with the test."""
    started = []

    def go(arguments):
        with (tmp_path / f"output-{len(started)}.txt").open("w") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT, "env": os.environ | ENVIRONMENT}
            started.append(subprocess.Popen([sys.executable, *arguments], start_new_session=True, **streams))
        started[-1].told = (tmp_path / f"output-{len(started) - 1}.txt").read_text
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def torchrun(*arguments):
    return ["-m", "torch.distributed.run", *map(str, arguments)]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.told()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def test_accumulation_changes_nothing(alone, tmp_path):
    run.train(recipe(accumulate=4), tmp_path, device="cpu")
    torch.testing.assert_close(losses(tmp_path), losses(alone), rtol=1e-5, atol=0)
    assert apart(tmp_path, alone) < 1e-5


def test_two_processes_give_the_run_of_one(alone, start, tmp_path):
    process = start(torchrun("--standalone", "--nproc_per_node", 2, *command(alone, tmp_path)))
    assert process.wait(300) == 0, process.told()
    assert len(losses(tmp_path)) == STEPS
    torch.testing.assert_close(losses(tmp_path), losses(alone), rtol=1e-5, atol=0)
    assert apart(tmp_path, alone) < 1e-5


def test_two_nodes_one_of_them_killed_go_on_from_the_last_checkpoint(start, tmp_path):
    """As on a cluster: the other node notices and ends with an error, and the same command is given again on both."""
    steps = 300
    run.train(recipe(steps), tmp_path / "alone", device="cpu")
    folder = tmp_path / "nodes"

    def node(rank):
        rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test")
        rendezvous += ("--rdzv_conf", f"is_host={int(rank == 0)}")
        place = ("--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1)
        return start(torchrun(*place, *rendezvous, *command(tmp_path / "alone", folder, "--save-every", 10)))

    port = free_port()
    first, second = node(0), node(1)
    wait_for(lambda: run.checkpoints(folder), first)
    for doomed in (second.pid, *children(second.pid)):  # torchrun's agent first, or it would start its worker again
        os.kill(doomed, signal.SIGKILL)
    second.wait()
    assert first.wait(300) != 0
    reached = max(line["step"] for line in metrics(folder))
    assert reached < steps, "the run ended before it could be killed"
    port = free_port()
    for process in (node(0), node(1)):
        assert process.wait(300) == 0, process.told()
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))
    torch.testing.assert_close(losses(folder)[:STEPS], losses(tmp_path / "alone")[:STEPS], rtol=1e-5, atol=0)
    assert apart(folder, tmp_path / "alone") < 1e-2  # rounding has grown over 300 steps of training


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_bits(start, tmp_path):
    steps = 400
    run.train(recipe(steps), tmp_path / "whole", device="cpu")
    folder = tmp_path / "stopped"
    process = start(command(tmp_path / "whole", folder))
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 3, process)
    process.terminate()
    assert process.wait(300) == 0, process.told()
    assert "Stopped and saved. The same command goes on." in process.told()
    (saved,) = run.checkpoints(folder)
    assert 3 < int(saved.stem.removeprefix("step-")) < steps
    run.train(recipe(steps), folder, device="cpu")
    name, bits = newest_bits(folder)
    same_name, same_bits = newest_bits(tmp_path / "whole")
    assert name == same_name
    assert all(torch.equal(bits[key], same_bits[key]) for key in same_bits)
    assert metrics(folder)[-1]["loss"] == metrics(tmp_path / "whole")[-1]["loss"]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    run.train(recipe(6, save_every=2), tmp_path, device="cpu")
    newest, before = run.checkpoints(tmp_path)
    _, expected = newest_bits(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    trainer = run.build(recipe(6, save_every=2), torch.device("cpu"))
    run.resume(trainer, tmp_path)
    assert trainer.step == 4
    assert f"{newest}" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    run.train(recipe(6, save_every=2), tmp_path, device="cpu")
    _, again = newest_bits(tmp_path)
    assert all(torch.equal(expected[key], again[key]) for key in expected)
    before.unlink(missing_ok=True)


def test_a_run_of_other_settings_is_left_alone(tmp_path):
    run.train(recipe(4), tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=r"learning_rate is 0\.001 there and 0\.5 here"):
        run.train(recipe(8, learning_rate=0.5), tmp_path, device="cpu")
    assert "learning_rate = 0.001" in (tmp_path / "recipe.toml").read_text()


def test_infinite_losses_stop_the_run_with_the_step_and_advice(tmp_path):
    wild = recipe(300, save_every=1, learning_rate=1e30, warmup=0)
    with pytest.raises(NonFiniteError, match=r"at step \d+; .*lower learning_rate"):
        run.train(wild, tmp_path, device="cpu")
    assert all(value.isfinite().all() for value in run.load_run(tmp_path).state_dict().values())


def test_infinite_losses_can_be_left_out(tmp_path):
    assert run.train(recipe(30, learning_rate=1e30, warmup=0, nonfinite="skip"), tmp_path, device="cpu")
    assert averaged(tmp_path).isfinite().all()


def test_a_full_disk_is_said_and_the_last_checkpoint_kept(start, tmp_path):
    """The system itself refuses files above a size: the checkpoint before the limit stays whole."""
    run.train(recipe(4, save_every=2), tmp_path / "whole", device="cpu")
    size = max(path.stat().st_size for path in run.checkpoints(tmp_path / "whole"))
    folder = tmp_path / "full"
    run.train(recipe(2, save_every=2), folder, device="cpu")
    script = (
        "import resource, runpy, sys; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); "
        "sys.argv[0] = 'ddpm_lib'; runpy.run_module('ddpm_lib', run_name='__main__')"
    )
    arguments = command(tmp_path / "whole", folder)[2:]
    process = start(["-c", script, *arguments])
    assert process.wait(300) != 0
    assert "error: step 4 could not be saved" in process.told()
    assert "Traceback" not in process.told()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000002.safetensors"]
    assert averaged(folder).isfinite().all()


def test_what_the_recipe_says_of_the_images_must_fit():
    wrong = replace(recipe(), network=replace(recipe().network, in_channels=3))
    with pytest.raises(run.RunError, match="shape \\(1, 8, 8\\); the recipe's network takes \\(3, 8, 8\\)"):
        run.build(wrong, torch.device("cpu"))


@pytest.mark.parametrize("given", ["blurred", "coarse"])
def test_a_network_shown_a_part_of_each_image_trains_stops_and_goes_on_to_the_same_bits(given, tmp_path):
    plain = recipe(4)
    shown = replace(plain, data=Data("digits", given=given), network=replace(plain.network, classes=None))
    half = replace(shown, training=replace(shown.training, steps=2))
    run.train(shown, tmp_path / "whole", device="cpu")
    run.train(half, tmp_path / "parts", device="cpu")
    run.train(shown, tmp_path / "parts", device="cpu")
    whole, parts = (newest_bits(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[1][name], parts[1][name]) for name in whole[1])
    assert run.load_run(tmp_path / "whole").network.config["image_channels"] == 1
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 1


def test_a_network_is_shown_what_the_recipe_names():
    """The gradient of a step is that of the loss on the degraded batch, taken here by hand."""
    plain = recipe(1)
    shown = replace(plain, data=Data("digits", given="coarse"), network=replace(plain.network, classes=None))
    trainer = run.build(shown, torch.device("cpu"))
    seen = []
    trainer.denoiser.network.register_forward_pre_hook(lambda network, given: seen.append(given))
    next(trainer.run(1))
    ((_, _, condition),) = seen
    images = trainer.images
    means = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1)
    inside = torch.nn.functional.avg_pool2d(condition, 4).flatten(1)  # near the means: the interpolation smooths
    assert condition.shape == (8, 1, 8, 8)
    nearest = torch.cdist(inside, means).min(1).values
    assert (nearest < torch.cdist(means, means).median() / 3).all()


def test_a_run_may_start_from_the_weights_of_another_model(tmp_path):
    """A run's folder gives its averaged weights, a file and a name the weights that they stand for."""
    run.train(recipe(4), tmp_path / "first", device="cpu")
    first = run.load_run(tmp_path / "first")
    save_denoiser(first, tmp_path / "first.safetensors")
    for source in (tmp_path / "first", tmp_path / "first.safetensors"):
        second = run.build(recipe(4, weights_from=str(source), seed=9), torch.device("cpu"))
        for weights in (second.denoiser, second.ema):
            assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), first.parameters(), strict=True))
    fresh = run.build(recipe(4, seed=3), torch.device("cpu"))
    assert any(not torch.equal(a, b) for a, b in zip(fresh.denoiser.parameters(), first.parameters()))
    assert second.step == 0


def test_a_run_from_other_weights_stops_and_goes_on_to_the_same_bits(tmp_path):
    run.train(recipe(4), tmp_path / "first", device="cpu")
    second = recipe(4, weights_from=str(tmp_path / "first"), seed=9)
    half = replace(second, training=replace(second.training, steps=2))
    run.train(second, tmp_path / "whole", device="cpu")
    run.train(half, tmp_path / "parts", device="cpu")
    run.train(second, tmp_path / "parts", device="cpu")
    whole, parts = (newest_bits(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[1][name], parts[1][name]) for name in whole[1])


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(CheckpointError, match="fashion-mnist does not fit the model"):
        run.build(recipe(4, weights_from="fashion-mnist"), torch.device("cpu"))
