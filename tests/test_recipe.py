"""Recipes: each describes the model it says, and what is wrong in one is said."""

from dataclasses import asdict

import pytest
import torch

from ddpm_lib import UNet
from ddpm_lib.recipe import RECIPES, Recipe, recipe_names
from ddpm_lib.training import Trainer
from tests.tiny_models import tiny_denoiser, tiny_images


def parameters(recipe):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**asdict(recipe.network)).parameters())


def test_the_recipes_of_the_issue_are_there():
    expected = ["celebahq-256", "cifar10", "digits", "emoji", "fashion-mnist", "fashion-mnist-blurred"]
    expected += ["fashion-mnist-coarse", "image-folder", "lsun-256", "mnist", "scenes", "scenes-grey"]
    assert recipe_names() == expected


@pytest.mark.parametrize(
    ("name", "count"), [("cifar10", 35_746_307), ("celebahq-256", 113_673_219), ("lsun-256", 113_673_219)]
)
def test_the_papers_models_have_the_papers_size(name, count):
    assert parameters(Recipe.load(name)) == count


def test_cifar10_is_the_papers_run():
    recipe = Recipe.load("cifar10")
    training = recipe.training
    assert (training.steps, training.batch_size, training.learning_rate) == (800_000, 128, 2e-4)
    assert (training.warmup, training.clip_norm, training.ema_decay) == (5000, 1.0, 0.9999)
    assert (training.decay_steps, training.ema_warmup, recipe.network.dropout) == (None, False, 0.1)
    assert (recipe.data.flip, recipe.noise.T, recipe.noise.predicts) == (True, 1000, "eps")
    beta = recipe.denoiser().schedule.beta
    assert float(beta[1]) == pytest.approx(1e-4, rel=1e-12)
    assert float(beta[-1]) == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize("name", recipe_names())
def test_the_trainer_takes_every_recipe(name):
    recipe = Recipe.load(name)
    options = recipe.trainer_options() | {"batch_size": 2, "accumulate": 1}
    trainer = Trainer(tiny_denoiser(), tiny_images(), **options)
    assert trainer.options["learning_rate"] == recipe.training.learning_rate


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_where_its_values_come_from(name):
    assert (RECIPES / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[data]\ndataset = ", "Invalid value"),
        ("[data]\ndataset = 'digits'\n", "network"),
        ("[data]\ncolour = 'red'\n", "colour"),
        ("[weather]\nrain = true\n", "weather"),
        ("data = 3\n", "data"),
        ("[training]\nsteps = 10\n", "missing"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_name(tmp_path, text, named):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.toml") as caught:
        Recipe.load(str(path))
    assert named in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no recipe 'cifar'; there are celebahq-256, cifar10"):
        Recipe.load("cifar")
