"""Time a training step of the paper's CIFAR-10 model with one option of ``Trainer`` more at each rung.

    python -m benchmarks.speed_ladder

adds this machine's rows to ``ddpm_lib/datasets/speed_ladder.json``, where the chapter "Scaling up" reads them. A row
that the same hardware had before is replaced. The rungs take turns, so that whatever else the machine does meets them
all; the ratios are medians over these rounds. It takes a few minutes.
"""

import copy
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Denoiser, Trainer, best_device, simple_loss
from ddpm_lib.cost import per_image
from ddpm_lib.recipe import Recipe
from ddpm_lib.training import has_bfloat16

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "speed_ladder.json"
ROUNDS = 5
CPU = {"batch": 4, "steps": 1}
GPU = {"batch": 128, "steps": 20}
RUNGS = {  # Trainer's options, each rung on top of the one below; the first is the plain loop
    "plain loop": None,
    "Trainer, float32": {"precision": "float32"},
    "images as uint8": {"images": "uint8"},
    "channels_last": {"channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    "compile": {"compile": True},
}


def plain_loop(denoiser: Denoiser, images: Tensor, batch: int, device: torch.device) -> Iterator[float]:
    """Algorithm 1 as most people write it first, with clipping and a moving average."""
    parameters = list(denoiser.parameters())
    average = copy.deepcopy(denoiser)
    optimiser = torch.optim.Adam(parameters, lr=2e-4, foreach=False)
    while True:
        x0 = images[torch.randint(len(images), (batch,))].to(device)
        t = torch.randint(1, denoiser.schedule.T + 1, (batch,)).to(device)
        eps = torch.randn(x0.shape).to(device)
        loss = simple_loss(denoiser, x0, t, eps).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimiser.step()
        with torch.no_grad():
            for p, q in zip(average.parameters(), parameters):
                p.lerp_(q, 1e-4)
        yield loss.item()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rungs(recipe: Recipe, pixels: Tensor, batch: int, device: torch.device) -> dict[str, Iterator]:
    """One endless training run for each rung, all from the same weights."""
    floats = pixels / 127.5 - 1
    runs, options = {}, {}
    for name, more in RUNGS.items():
        torch.manual_seed(0)
        denoiser = recipe.denoiser().to(device)
        if more is None:
            runs[name] = plain_loop(denoiser, floats, batch, device)
        elif name != "compile" or device.type == "cuda":  # on a CPU it takes minutes, and brings nothing
            options |= more
            kept = {k: v for k, v in options.items() if k != "images"}
            images = pixels if "images" in options else floats
            runs[name] = Trainer(denoiser, images, batch_size=batch, device=device, **kept).run(10**9)
    return runs


def timed(recipe: Recipe, pixels: Tensor, batch: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each rung, one number per round."""
    runs = rungs(recipe, pixels, batch, device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # the first steps load, tune and compile
        for _ in range(max(1, steps // 4)):
            next(run)
    for _ in tqdm(range(ROUNDS), unit="round"):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(steps):
                next(run)
            wait(device)
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def hardware(device: torch.device) -> str:
    """Name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def measure(device: torch.device) -> dict:
    recipe = Recipe.load("cifar10")
    size = CPU if device.type == "cpu" else GPU
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seconds = timed(recipe, pixels, **size, device=device)
    work = 3 * size["batch"] * per_image(recipe)[0]
    rows = []
    for name, values in seconds.items():
        ratio = median(first / value for first, value in zip(seconds["plain loop"], values))
        gigaflops = round(work / median(values) / 1e9, 1)
        rows.append({"rung": name, "seconds": round(median(values), 5), "speed": round(ratio, 3), "gflops": gigaflops})
    return {
        "hardware": hardware(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # above the number of cores: others were at work, too
        "bfloat16_in_hardware": has_bfloat16(device),
        **size,
        "rounds": ROUNDS,
        "torch": torch.__version__.split("+")[0],
        "date": date.today().isoformat(),
        "rungs": rows,
    }


def main() -> None:
    result = measure(best_device())
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    runs = [run for run in runs if run["hardware"] != result["hardware"]] + [result]
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
