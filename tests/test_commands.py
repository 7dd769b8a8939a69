"""The command line as a user types it: every recipe trained, killed, resumed, sampled, measured and exported."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_denoiser

from ddpm_lib import Schedule, load_denoiser, pretrained, run, save_denoiser
from ddpm_lib.__main__ import main
from ddpm_lib.degradation import GIVEN
from ddpm_lib.interop import diffusers_sampling, from_diffusers, to_diffusers
from ddpm_lib.names import names
from ddpm_lib.recipe import Recipe, recipe_names
from tests.tiny_data import tiny_data

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--base-channels", "4", "--groups", "2", "--channel-multipliers", "1", "2", "--blocks-per-level", "1"),
    *("--batch-size", "4", "--warmup", "2", "--T", "40", "--precision", "float32", "--device", "cpu"),
    *("--log-every", "1", "--save-every", "2", "--sample-every", "1000", "--sample-steps", "2"),
]


FEW_SCENES = {"train": 200, "test": 20}
COMMAND = f"import sys; from ddpm_lib import __main__, data; data.SCENES = {FEW_SCENES}; __main__.main(sys.argv[1:])"


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr("ddpm_lib.data.SCENES", FEW_SCENES)


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
    if recipe.data.dataset not in ("digits", "scenes"):
        options += ["--root", data / "image-folder" if recipe.data.dataset == "image-folder" else data]
    return [str(option) for option in options]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_from_the_first_step_to_the_export(name, data, tmp_path, capsys):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    endless = [sys.executable, "-c", COMMAND, *arguments_for(name, data, folder, 10**6)]
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

    given = Recipe.load(str(folder / "recipe.toml")).data.given
    shown = ["--given", given] if given else []
    of_picture = ["--image", folder / "samples" / f"step-{reached + 3:09}.png"] if given else []
    said(capsys, "sample", folder, "--out", tmp_path / "sheet.png", "--number", 4, "--steps", 2, *shown, *of_picture)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    recipe = Recipe.load(str(folder / "recipe.toml"))
    dataset, root = recipe.data.dataset, recipe.data.root
    options = [] if root is None else ["--root", root]
    told = said(capsys, "evaluate", folder, dataset, *options, "--number", 10, "--steps", 2, *shown)
    assert "loss on held-out images, t = 31 to 40" in told
    assert ("label accuracy, samples" in told) == (dataset in ("digits", "fashion-mnist") and not given)
    assert ("captions shown, samples" in told) == (dataset in ("emoji", "scenes") and not given)
    assert ("PSNR, samples" in told) == bool(given)

    others = {"model.safetensors": load_denoiser}
    plain = recipe.network.patch_size == 1 and not recipe.network.lean
    if plain and recipe.data.text_encoder is None:
        others["folder"] = from_diffusers
    else:
        with pytest.raises(SystemExit, match=r"diffusers' UNet2DModel (has no patches|is told what to draw)"):
            main(["export", str(folder), str(tmp_path / "folder")])
    x, t = torch.randn(2, *shape(recipe)), torch.tensor([1, 40])
    ours = run.load_run(folder)
    seen = [GIVEN[given](x)] if given else []
    for target, read in others.items():
        said(capsys, "export", folder, tmp_path / target)
        with torch.no_grad():
            exported = read(tmp_path / target)
            torch.testing.assert_close(exported(x, t, *seen).eps, ours(x, t, *seen).eps, rtol=0, atol=0)
    assert f"{sum(p.numel() for p in ours.parameters()):,}" in said(capsys, "info", folder)


def shape(recipe):
    return recipe.network.in_channels, recipe.network.image_size, recipe.network.image_size


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(tmp_path, capsys):
    told = said(capsys, "train", "digits", "--dry-run", "--folder", tmp_path / "run", "--device", "cpu")
    assert "396,697" in told
    assert "hours for 4,000 steps" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_costed(name, data, tmp_path, capsys):
    assert "hours for" in said(capsys, *arguments_for(name, data, tmp_path / "run", 1), "--dry-run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One network in every form that a MODEL argument may have."""
    folder = tmp_path_factory.mktemp("models")
    options = {"image_size": 16, "base_channels": 32, "groups": 32, "channel_multipliers": (1,)}
    denoiser = tiny_denoiser(Schedule.linear(1000), **options, attention_resolutions=(16,))
    save_denoiser(denoiser, folder / "run" / "checkpoints" / "step-000000001.safetensors")
    save_denoiser(denoiser, folder / "ours.safetensors")
    to_diffusers(denoiser, folder / "diffusers")
    theirs = names(denoiser.network, "port")
    released = {theirs[name]: value for name, value in denoiser.network.state_dict().items()}
    save_file(released, folder / "released.safetensors")
    torch.save(released, folder / "released.ckpt")
    return folder, denoiser


@pytest.mark.parametrize("form", ["run", "ours.safetensors", "diffusers", "released.safetensors", "released.ckpt"])
def test_a_model_is_taken_in_every_form(models, form, tmp_path, capsys):
    folder, denoiser = models
    found = run.load_model(str(folder / form))
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(found(x, 500).eps, denoiser.eval()(x, 500).eps)
    assert "image_size             16" in said(capsys, "info", folder / form)
    said(capsys, "sample", folder / form, "--out", tmp_path / "sheet.png", "--number", 1, "--steps", 1)
    said(capsys, "export", folder / form, tmp_path / "again.safetensors")
    assert torch.equal(load_denoiser(tmp_path / "again.safetensors").network.stem.bias, denoiser.network.stem.bias)


@pytest.mark.parametrize("form", ["ours.safetensors", "diffusers", "released.ckpt"])
def test_a_run_starts_from_the_weights_of_a_model_in_every_form(models, form):
    folder, denoiser = models
    recipe = Recipe.load("digits")
    options = {"image_size": 16, "base_channels": 32, "groups": 32, "channel_multipliers": (1,), "classes": None}
    network = replace(recipe.network, **options, attention_resolutions=(16,), blocks_per_level=1, dropout=0.0)
    recipe = replace(
        recipe,
        network=network,
        training=replace(recipe.training, weights_from=str(folder / form)),
    )
    images = torch.zeros(128, 1, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_images", lambda *_, **__: (images, None))
        trainer = run.build(recipe, torch.device("cpu"))
    assert torch.equal(trainer.denoiser.network.stem.weight, denoiser.network.stem.weight)


def test_export_says_how_the_pipeline_of_diffusers_samples(tmp_path, capsys):
    said(capsys, "export", "digits", tmp_path / "default")
    said(capsys, "export", "digits", tmp_path / "other", "--variance", "beta_tilde", "--no-clip")
    assert diffusers_sampling(tmp_path / "default") == {"variance": "beta", "clip": True}
    assert diffusers_sampling(tmp_path / "other") == {"variance": "beta_tilde", "clip": False}


def test_export_stores_weights_in_half_the_space_or_a_quarter(tmp_path, capsys):
    for bits in ("32", "16", "8"):
        said(capsys, "export", "digits", tmp_path / f"{bits}.safetensors", "--bits", bits)
    whole, half, quarter = ((tmp_path / f"{bits}.safetensors").stat().st_size for bits in (32, 16, 8))
    assert half < 0.52 * whole
    assert quarter < 0.29 * whole


def test_export_writes_onnx_where_the_name_says_so(tmp_path, capsys, monkeypatch):
    """By the function that has tests of its own, and takes half a minute."""
    asked = []
    monkeypatch.setattr("ddpm_lib.__main__.export_onnx", lambda *arguments: asked.append(arguments))
    said(capsys, "export", "digits", tmp_path / "model.onnx")
    ((denoiser, path),) = asked
    assert path == tmp_path / "model.onnx"
    assert torch.equal(denoiser.network.stem.weight, pretrained("digits").network.stem.weight)


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "info"])
def test_help_lists_every_form_of_a_model(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for form in ("run's folder", ".safetensors", "diffusers' layout", "pytorch_diffusion (.ckpt)", "shipped model"):
        assert form in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sample", "nobody"], "the package ships no model 'nobody'"),
        (["info", "missing.safetensors"], "there is no checkpoint at missing.safetensors"),
        (["info", "missing.ckpt"], "there is no checkpoint at missing.ckpt"),
        (["export", "digits", "."], ". is there already"),
        (["export", "digits", "model.txt"], "NAME.onnx, NAME.safetensors or a folder; got model.txt"),
        (["train", "missing.toml"], "no recipe 'missing.toml'"),
        (["train", "image-folder", "--device", "cpu"], "image-folder needs root"),
        (["train", "digits", "--dry-run", "--snr-scale", "0.5"], "snr_scale belongs to the cosine schedule"),
        (["sample", "digits", "--caption", "a red circle"], "this model is told no caption: leave --caption out"),
        (["sample", "scenes", "--label", "3"], "this model is told no label: leave --label out"),
        (["sample", "digits", "--image", "any.png"], "this model is told no image: leave --image out"),
        (["sample", "digits", "--given", "grey"], "this model is told no given: leave --given out"),
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
