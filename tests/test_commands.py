"""The command line as a user types it: every recipe trained, killed, resumed, sampled, measured and exported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_lib import load_denoiser, run
from ddpm_lib.__main__ import main
from ddpm_lib.interop import from_diffusers
from ddpm_lib.recipe import Recipe, recipe_names
from tests.tiny_data import tiny_data

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--base-channels", "4", "--groups", "2", "--channel-multipliers", "1", "2", "--blocks-per-level", "1"),
    *("--batch-size", "4", "--warmup", "2", "--T", "40", "--precision", "float32", "--device", "cpu"),
    *("--log-every", "1", "--save-every", "2", "--sample-every", "1000", "--sample-steps", "2"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def said(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def arguments_for(name, data, folder, steps):
    recipe = Recipe.load(name)
    options = ["train", name, *SMALL, "--folder", folder, "--steps", steps]
    size = min(recipe.network.image_size, 32)
    options += ["--image-size", size, "--attention-resolutions", size // 2]
    if recipe.training.decay_steps:
        options += ["--decay-steps", 100]
    if recipe.data.dataset != "digits":
        options += ["--root", data / "image-folder" if recipe.data.dataset == "image-folder" else data]
    return [str(option) for option in options]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_from_the_first_step_to_the_export(name, data, tmp_path, capsys):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    endless = [sys.executable, "-m", "ddpm_lib", *arguments_for(name, data, folder, 10**6)]
    with (
        (tmp_path / "output.txt").open("w") as output,
        subprocess.Popen(endless, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        deadline = time.monotonic() + 300
        while not run.checkpoints(folder):
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    reached = int(run.checkpoints(folder)[0].stem.removeprefix("step-"))

    assert "Finished" in said(capsys, *arguments_for(name, data, folder, reached + 3))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, reached + 4))
    assert (folder / "samples" / f"step-{reached + 3:09}.png").read_bytes().startswith(b"\x89PNG")

    said(capsys, "sample", folder, "--out", tmp_path / "sheet.png", "--number", 4, "--steps", 2)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    recipe = Recipe.load(str(folder / "recipe.toml"))
    dataset, root = recipe.data.dataset, recipe.data.root
    options = [] if root is None else ["--root", root]
    told = said(capsys, "evaluate", folder, dataset, *options, "--number", 10, "--steps", 2)
    assert "loss on held-out images, t = 31 to 40" in told
    assert ("label accuracy, samples" in told) == (dataset in ("digits", "fashion-mnist"))

    for target in ("model.safetensors", "folder", *(["model.onnx"] if name == "digits" else [])):
        said(capsys, "export", folder, tmp_path / target)
    x, t = torch.randn(2, *shape(recipe)), torch.tensor([1, 40])
    ours = run.load_run(folder)
    for other in (load_denoiser(tmp_path / "model.safetensors"), from_diffusers(tmp_path / "folder")):
        with torch.no_grad():
            torch.testing.assert_close(other(x, t).eps, ours(x, t).eps, rtol=0, atol=0)
    assert f"{sum(p.numel() for p in ours.parameters()):,}" in said(capsys, "info", folder)


def shape(recipe):
    return recipe.network.in_channels, recipe.network.image_size, recipe.network.image_size


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(tmp_path, capsys):
    told = said(capsys, "train", "digits", "--dry-run", "--folder", tmp_path / "run", "--device", "cpu")
    assert "396,697" in told
    assert "hours for 4,000 steps" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sample", "nobody"], "the package ships no model 'nobody'"),
        (["info", "missing.safetensors"], "there is no checkpoint at missing.safetensors"),
        (["export", "digits", "model.txt"], "NAME.onnx, NAME.safetensors or a folder; got model.txt"),
        (["train", "missing.toml"], "no recipe 'missing.toml'"),
        (["train", "image-folder", "--device", "cpu"], "image-folder needs root"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value).startswith("error: ")
    assert complaint in str(caught.value)


def test_help_lists_the_fields_of_a_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "cifar10", "--help"])
    told = capsys.readouterr().out
    assert "--learning-rate" in told
    assert "0.0002" in told
