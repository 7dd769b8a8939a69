"""The command line: ``python -m ddpm_lib train RECIPE``, and sample, evaluate, export, info."""

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

try:
    import tyro
except ImportError:
    sys.exit("The command line needs more packages: pip install 'ddpm-lib[train]'")

from . import plots, run
from .checkpoint import save_denoiser, write_file
from .cost import cost
from .data import as_floats, picture
from .degradation import GIVEN, grey
from .evaluation import evaluate as measure
from .guidance import Guided
from .interop import to_diffusers
from .onnx import export_onnx
from .recipe import Recipe, recipe_names
from .sampling import sample as draw_samples
from .training import NonFiniteError

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help="a run's folder, a .safetensors file, a folder in diffusers' layout, the paper's released weights as "
        "converted by pytorch_diffusion (.ckpt), or the name of a shipped model.",
    ),
]


def sample(
    model: Model,
    out: Path = Path("samples.png"),
    number: int = 64,
    steps: int | None = None,
    eta: float = 1.0,
    variance: Literal["beta", "beta_tilde"] = "beta",
    label: int | None = None,
    caption: str | None = None,
    image: Path | None = None,
    given: Literal["coarse", "blurred", "grey"] | None = None,
    weight: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw images and write them as one sheet.

    Args:
        out: the picture.
        number: how many images.
        steps: of the sampler; the full T by default.
        eta: 1 for ancestral sampling, 0 for deterministic DDIM.
        variance: the larger (beta) or the smaller (beta_tilde) of the paper's two.
        label: the class of all images; by default a class-conditional model draws all classes in turn.
        caption: what all images are to show, for a model with a text encoder.
        image: a picture to refine or to paint, for a model that is shown a part of each image; cut to a square.
        given: which part that model is shown: the data.given of its recipe.
        weight: of classifier-free guidance towards label or caption.
        seed: of the noise.
        device: cpu, cuda or mps.
    """
    denoiser = run.load_model(model, device)
    config = denoiser.network.config
    beside = config["image_channels"] is not None
    has = {"label": config["classes"] is not None, "caption": "encoder" in config, "image": beside, "given": beside}
    for option, value in {"label": label, "caption": caption, "image": image, "given": given}.items():
        if value is not None and not has[option]:
            raise ValueError(f"this model is told no {option}: leave --{option} out.")
    condition = None
    if config["classes"] is not None:
        labels = torch.arange(number, device=device) % config["classes"]
        condition = labels if label is None else torch.full_like(labels, label)
    elif caption is not None:
        condition = denoiser.network.encoder.tokenise([caption] * number).to(device)
    elif beside:
        if image is None or given is None:
            raise ValueError("this model is shown a part of each image: say which picture with --image and --given.")
        shown = as_floats(picture(image, config["image_size"]))
        condition = GIVEN[given](shown if config["in_channels"] == 3 else grey(shown))
        condition = condition.expand(number, -1, -1, -1).to(device)
    if weight:
        denoiser = Guided(denoiser, weight)
    shape = (number, config["in_channels"], config["image_size"], config["image_size"])
    generator = torch.Generator().manual_seed(seed)
    images = draw_samples(
        denoiser, shape, steps=steps, eta=eta, variance=variance, condition=condition, generator=generator
    )
    sheet = plots.tile(images.cpu(), columns=config["classes"] or max(1, round(number**0.5)))
    write_file(out, plots.png(sheet, sheet.shape[1]))
    print(out)


def evaluate(
    model: Model,
    dataset: Annotated[
        Literal["digits", "emoji", "mnist", "fashion-mnist", "cifar10", "scenes", "image-folder"], tyro.conf.Positional
    ],
    root: Path | None = None,
    number: int = 1000,
    steps: int | None = 50,
    eta: float = 0.0,
    variance: Literal["beta", "beta_tilde"] = "beta",
    weight: float = 0.0,
    given: Literal["coarse", "blurred", "grey"] | None = None,
    seed: int = 0,
    inception: bool = False,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Measure a model on held-out images, and its samples where the package has a judge for them.

    Args:
        dataset: the data that the model learned.
        root: where its files lie; of an image folder, one with images that were not trained on.
        number: of samples, and of held-out images where there are so many.
        steps: of the sampler.
        eta: 0 for deterministic DDIM, 1 for ancestral sampling.
        variance: the larger (beta) or the smaller (beta_tilde) of the paper's two.
        weight: of classifier-free guidance.
        given: what a model is shown that is shown a part of each image: the data.given of its recipe.
        seed: of all noise.
        inception: judge samples by the Inception network (FID, Inception score); needs 'ddpm-lib[inception]'.
        device: cpu, cuda or mps.
        out: write the figures to this JSON file, too.
    """
    walk = {"steps": steps, "eta": eta, "variance": variance, "weight": weight, "given": given}
    denoiser = run.load_model(model, device)
    figures = measure(denoiser, dataset, root=root, number=number, seed=seed, inception=inception, **walk)
    for name, value in figures.items():
        print(f"{name:42} {value:.4f}")
    if out:
        write_file(out, (json.dumps(figures, indent=2) + "\n").encode())


def export(
    model: Model,
    to: Annotated[Path, tyro.conf.Positional],
    bits: Literal[32, 16, 8] = 32,
    variance: Literal["beta", "beta_tilde"] = "beta",
    clip: bool = True,
) -> None:
    """Write a model for others: NAME.onnx, NAME.safetensors (this library's), or a folder in diffusers' layout.

    Args:
        to: what to write; of a run, the averaged weights.
        bits: in which NAME.safetensors stores each weight; 8 means whole numbers with a scale for each row.
        variance: with which diffusers' pipeline is to sample (the other two files leave that to whoever samples).
        clip: whether that pipeline is to clip its guess of the image to [-1, 1].
    """
    writers = {
        ".onnx": export_onnx,
        ".safetensors": partial(save_denoiser, bits=bits),
        "": partial(to_diffusers, variance=variance, clip=clip),
    }
    if to.suffix not in writers:
        raise ValueError(f"export writes NAME.onnx, NAME.safetensors or a folder; got {to}.")
    writers[to.suffix](run.load_model(model), to)
    print(to)


def info(model: Model) -> None:
    """Say what a model is."""
    denoiser = run.load_model(model)
    print(f"{'parameters':22} {sum(p.numel() for p in denoiser.parameters()):,}")
    print(f"{'predicts':22} {denoiser.predicts}")
    print(f"{'schedule':22} {denoiser.schedule}")
    for name, value in denoiser.network.config.items():
        print(f"{name:22} {value}")


def commands(arguments: list[str]) -> dict:
    """The subcommands; a TOML file among the arguments is one more recipe."""
    names = [*recipe_names(), *(a for a in arguments if a.endswith(".toml"))]
    recipes = tyro.extras.subcommand_type_from_defaults({name: Recipe.load(name) for name in names}, prefix_names=False)
    chosen = next((a for a in arguments[1:] if a in names), "run")

    @tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)
    def train(
        recipe: recipes,
        folder: Path = Path("runs") / Path(chosen).stem,
        device: str | None = None,
        tensorboard: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Train a model, or go on with a run that was stopped.

        Args:
            recipe: what to train; every value can be overridden.
            folder: of the run; a run that is there is gone on with.
            device: cpu, cuda or mps; the best there is by default.
            tensorboard: also write the metrics for TensorBoard.
            dry_run: train nothing; say how large the model is, and what a step and the whole run cost.
        """
        if dry_run:
            for name, value in cost(recipe, device).items():
                print(f"{name:34} {value}")
        elif run.train(recipe, folder, device=device, tensorboard=tensorboard):
            print(f"Finished. Draw from it: python -m ddpm_lib sample {folder}")
        else:
            print("Stopped and saved. The same command goes on.")

    return {"train": train, "sample": sample, "evaluate": evaluate, "export": export, "info": info}


def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ddpm_lib").setLevel(logging.INFO)
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands(arguments),
            prog="python -m ddpm_lib",
            description="Denoising diffusion probabilistic models: train, sample, measure, export.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
    except (ValueError, OSError, ImportError, run.RunError, NonFiniteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
