"""A training run in a folder: resumable, watched, and the same on one process or many.

The folder holds ``recipe.toml``, ``metrics.jsonl``, ``samples/`` and ``checkpoints/``. The newest checkpoint is the
truth: a run goes on from it, and its model is read from it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import tomli_w
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from . import plots
from .checkpoint import CheckpointError, fit_state, load_denoiser, pretrained, shipped_names, write_file
from .data import as_floats, load_images
from .degradation import GIVEN
from .interop import from_diffusers
from .prediction import Denoiser
from .recipe import Recipe
from .released import PICKLES, from_pytorch_diffusion, is_port
from .sampling import sample
from .training import Trainer, TrainStep, best_device

KEPT = 2  # checkpoints


class RunError(RuntimeError):
    """A training run could not start or go on; what it had saved is whole."""


def train(recipe: Recipe, folder: Path, *, device: str | None = None, tensorboard: bool = False) -> bool:
    """Train, from the newest checkpoint in ``folder`` if there is one; True at the end, False if asked to stop before.

    Under ``torchrun`` every process calls this, with one folder that all can read. SIGTERM and SIGINT end the run at
    the next look (every ``log_every`` steps with several processes), after a checkpoint.
    """
    with processes(device) as place:
        trainer = build(recipe, place)
        first = trainer.rank == 0
        resume(trainer, folder)
        if first:
            _keep_recipe(recipe, folder)
        with _asked_to_stop() as asked, _reporter(recipe, folder, trainer, tensorboard) as report:
            while trainer.step < recipe.training.steps:
                log = next(trainer.run(1))
                looking = log.step % recipe.output.log_every == 0 or log.step == recipe.training.steps
                stop = _any_process(asked(), place) if looking or trainer.world == 1 else False
                report(log, looking)
                if log.step % recipe.output.save_every == 0 or log.step == recipe.training.steps or stop:
                    save(trainer, folder)
                if first and (log.step % recipe.output.sample_every == 0 or log.step == recipe.training.steps):
                    draw(trainer, recipe, folder)
                if stop:
                    break
    return trainer.step >= recipe.training.steps


def build(recipe: Recipe, device: torch.device) -> Trainer:
    """The trainer of a recipe, with its data, before the first step."""
    size = recipe.network.image_size
    images, labels = load_images(recipe.data.dataset, root=recipe.data.root, image_size=size)
    if images.shape[1:] != (recipe.network.in_channels, size, size):
        raise RunError(
            f"the images of {recipe.data.dataset} have shape {tuple(images.shape[1:])}; the recipe's network takes "
            f"{(recipe.network.in_channels, size, size)}: set in_channels and image_size."
        )
    torch.manual_seed(recipe.training.seed)
    denoiser = recipe.denoiser()
    if recipe.training.weights_from is not None:
        start = load_model(recipe.training.weights_from).network.state_dict()
        fit_state(denoiser.network, start, recipe.training.weights_from)
    conditions = _conditions(recipe, denoiser, labels)
    return Trainer(denoiser, images, conditions, **recipe.trainer_options(), device=device)


def _conditions(recipe: Recipe, denoiser: Denoiser, labels: Tensor | list[str] | None) -> Tensor | Callable | None:
    """What the network is told about each image: the labels, the tokens of the captions, or what is seen of it."""
    dataset, classes = recipe.data.dataset, recipe.network.classes
    if recipe.data.given is not None:
        return GIVEN[recipe.data.given]
    if recipe.data.text_encoder is not None:
        if not isinstance(labels, list):
            raise RunError(f"the recipe has a text_encoder, but {dataset} has no captions.")
        return denoiser.network.encoder.tokenise(labels)
    if classes is None:
        return None
    if not isinstance(labels, Tensor):
        raise RunError(f"the recipe has classes = {classes}, but {dataset} has no labels.")
    return labels


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def resume(trainer: Trainer, folder: Path) -> None:
    """Go on from the newest checkpoint that is whole; a fresh folder leaves the trainer as it is."""
    errors = []
    for path in checkpoints(folder):
        try:
            trainer.resume(path)
        except CheckpointError as error:
            errors.append(error)
        else:
            break
    else:
        if errors:
            raise errors[0]
    if errors and trainer.rank == 0:
        tqdm.write(f"{errors[0]}\nGoing on from step {trainer.step}, the checkpoint before it.")
    steps = [torch.zeros((), dtype=torch.long, device=trainer.device) for _ in range(trainer.world)]
    if trainer.world > 1:
        dist.all_gather(steps, torch.tensor(trainer.step, device=trainer.device))
        if len({int(step) for step in steps}) > 1:
            raise RunError(f"the processes would go on from different steps: do all of them see the folder {folder}?")
    if trainer.rank == 0:
        _cut_metrics(folder / "metrics.jsonl", trainer.step)


def save(trainer: Trainer, folder: Path) -> None:
    """Write a checkpoint, then remove all but the newest two; the first process does it for all."""
    if trainer.rank > 0:
        trainer.check_finite()
        return
    try:
        trainer.save(folder / "checkpoints" / f"step-{trainer.step:09}.safetensors")
    except OSError as error:
        last = next(iter(checkpoints(folder)), "none yet")
        raise RunError(f"step {trainer.step} could not be saved: {error}. Last good checkpoint: {last}.") from error
    for path in checkpoints(folder)[KEPT:]:
        path.unlink()


def load_run(folder: Path, device: str | torch.device = "cpu") -> Denoiser:
    """The averaged denoiser of the newest whole checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder / 'checkpoints'}.")
    for path in found[:-1]:
        try:
            return load_denoiser(path, device)
        except CheckpointError:
            continue
    return load_denoiser(found[-1], device)


def load_model(name: str, device: str | torch.device = "cpu") -> Denoiser:
    """The denoiser that a MODEL argument means: a path, or the name of a model that the package ships.

    A path is that of a run's folder, of a .safetensors file, of a folder in diffusers' layout, or of the paper's
    released weights (see ``from_pytorch_diffusion``).
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        return load_run(path, device)
    if path.is_dir() and name not in shipped_names():
        return from_diffusers(path).to(device)
    if path.suffix in PICKLES or (path.suffix == ".safetensors" and is_port(path)):
        return from_pytorch_diffusion(path).to(device)
    return load_denoiser(path, device) if path.suffix == ".safetensors" else pretrained(name, device)


def draw(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """A sheet of samples of the averaged model: always from the same noise, so that sheets can be compared."""
    classes = recipe.network.classes
    number = 64 if classes is None else classes * max(1, 64 // classes)
    condition = trainer.conditions
    if classes is not None:
        condition = torch.arange(number, device=trainer.device) % classes
    elif condition is not None:
        number = min(number, len(trainer.images))
        some = trainer.images[:number]
        condition = condition(as_floats(some)) if callable(condition) else condition[:number]
    size = recipe.network.image_size
    noise = torch.randn(number, recipe.network.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with trainer.autocast:
        images = sample(
            trainer.ema, x_T=noise.to(trainer.device), steps=recipe.output.sample_steps, eta=0.0, condition=condition
        )
    sheet = plots.tile(images.float().cpu(), columns=classes or 8)
    write_file(folder / "samples" / f"step-{trainer.step:09}.png", plots.png(sheet, sheet.shape[1]))


@contextmanager
def processes(device: str | None) -> Iterator[torch.device]:
    """This process's device; under ``torchrun``, with the group of processes formed."""
    if "WORLD_SIZE" not in os.environ:
        yield torch.device(device) if device else best_device()
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


def _any_process(asked: bool, device: torch.device) -> bool:
    if not dist.is_initialized():
        return asked
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come; a second one ends the process as usual."""
    came = []

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reporter(recipe: Recipe, folder: Path, trainer: Trainer, tensorboard: bool) -> Iterator[Callable]:
    """What the first process does with each step: the progress bar, and a line of metrics at each look."""
    if trainer.rank > 0:
        yield lambda log, looking: None
        return
    batch = recipe.training.batch_size
    losses: list[Tensor] = []
    then = time.perf_counter()
    board = _tensorboard(folder) if tensorboard else None
    with (
        tqdm(total=recipe.training.steps, initial=trainer.step, unit="step", dynamic_ncols=True) as bar,
        (folder / "metrics.jsonl").open("a", encoding="utf-8") as file,
    ):

        def report(log: TrainStep, looking: bool) -> None:
            nonlocal then
            losses.append(log.losses.mean())
            bar.update()
            if not looking:
                return
            values = {
                "step": log.step,
                "loss": float(torch.stack(losses).mean()),
                "grad_norm": float(log.grad_norm),
                "learning_rate": log.learning_rate,
            }
            now = time.perf_counter()
            values["images_per_second"] = batch * len(losses) / (now - then)
            losses.clear()
            then = now
            file.write(json.dumps(values) + "\n")
            file.flush()
            bar.set_postfix(
                loss=f"{values['loss']:.4f}",
                grad=f"{values['grad_norm']:.2f}",
                images=f"{values['images_per_second']:.0f}/s",
            )
            if board:
                for name in values.keys() - {"step"}:
                    board.add_scalar(name, values[name], log.step)

        yield report
    if board:
        board.close()


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard.") from error
    return SummaryWriter(folder / "tensorboard")


def _keep_recipe(recipe: Recipe, folder: Path) -> None:
    parts = {name: {k: _plain(v) for k, v in part.items() if v is not None} for name, part in asdict(recipe).items()}
    write_file(folder / "recipe.toml", tomli_w.dumps(parts).encode())


def _plain(value):
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _cut_metrics(path: Path, step: int) -> None:
    """Forget what was written after the checkpoint that the run goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # half a line of a killed process
    write_file(path, "".join(kept).encode())
