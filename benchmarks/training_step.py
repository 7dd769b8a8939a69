"""A training step and a sampling step of the paper's CIFAR-10 model, beside two other libraries: tables in Markdown.

    pip install -c constraints.txt ".[bench]"        # in an environment of its own
    python -m benchmarks.training_step [--batch 8] [--rounds 5] [--device cpu]

Everybody runs in one process. A round times everybody once, in turn, so that a slow moment of the machine hits all
alike. A ratio is the median over the rounds of (their time / our time): above 1, we are faster.

- ours: ``Trainer`` with noise, loss, backward pass, clipping, Adam and moving average.
- diffusers: the loop of its example for unconditional training: its U-Net and scheduler, mean squared error, clipping,
  AdamW, its EMAModel. Its network is ours, of 35.7M parameters; a test shows that their outputs are equal.
- denoising-diffusion-pytorch: the step of its ``Trainer``, without accelerate around it: its GaussianDiffusion, the
  loss read in every step, clipping, Adam, its EMA every tenth step. It has not the paper's network; the nearest one has
  linear attention and less to compute. So a second ratio compares the time per GFLOP.

On a CPU each precision is timed as it comes; on CUDA also with what makes it fast, for diffusers the same as for us.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from ema_pytorch import EMA
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed_ladder import hardware
from ddpm_lib import Denoiser, Schedule, Trainer, UNet, step
from ddpm_lib.training import has_bfloat16

# torchvision loads only with the very build of torch that it was made for, and nothing that is timed needs it.
# diffusers does without; denoising-diffusion-pytorch, which reads and writes image files with it, gets a stand-in.
sys.modules["torchvision"] = None
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402

sys.modules["torchvision"] = MagicMock()
from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # noqa: E402

SIZE = 32
STEPS = {"cpu": 1, "cuda": 20}  # in a round, for each
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16 FLOP/s, from NVIDIA's data sheets (SXM)
Step = Callable[[], object]


@dataclass
class Contestant:
    name: str
    build: Callable[[], Step]
    flops: float  # per image
    against: str | None = None  # whose time its own is divided by


def diffusers_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        dropout=0.1,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
    )


def lucidrains_network() -> Unet:
    return Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1)


def our_training(images: Tensor, batch: int, device: str, **options) -> Step:
    trainer = Trainer(Denoiser(UNet(), Schedule.linear()), images, batch_size=batch, device=device, **options)
    return lambda: next(trainer.run(1))


def diffusers_training(
    images: Tensor, batch: int, device: str, half: bool, channels_last: bool = False, compiled: bool = False
) -> Step:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = diffusers_network().to(device, memory_format=layout)
    scheduler = DDPMScheduler()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=channels_last or None)
    average = EMAModel(model.parameters())
    images = images.to(device)
    network = torch.compile(model) if compiled else model

    def one_step() -> None:
        clean = images[torch.randint(len(images), (batch,), device=device)]
        noise = torch.randn_like(clean)
        steps = torch.randint(1000, (batch,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = F.mse_loss(network(scheduler.add_noise(clean, noise, steps), steps).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(model.parameters())

    return one_step


def lucidrains_training(images: Tensor, batch: int, device: str, half: bool) -> Step:
    diffusion = lucidrains_diffusion(device)
    optimiser = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10).to(device)
    images = images.to(device) / 2 + 0.5

    def one_step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = diffusion(images[torch.randint(len(images), (batch,), device=device)])
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.update()

    return one_step


def lucidrains_diffusion(device: str) -> GaussianDiffusion:
    options = {"image_size": SIZE, "objective": "pred_noise", "beta_schedule": "linear"}
    return GaussianDiffusion(lucidrains_network(), **options).to(device)


def our_sampling(batch: int, device: str, precision: str) -> Step:
    denoiser = Denoiser(UNet(), Schedule.linear()).to(device).eval()
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    return sampling(lambda: step(denoiser(x, 500).clip(), 500, 499, denoiser.schedule), device, precision == "bfloat16")


def diffusers_sampling(batch: int, device: str, half: bool) -> Step:
    model, scheduler = diffusers_network().to(device).eval(), DDPMScheduler(variance_type="fixed_large")
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    return sampling(lambda: scheduler.step(model(x, 499).sample, 499, x), device, half)


def lucidrains_sampling(batch: int, device: str, half: bool) -> Step:
    diffusion = lucidrains_diffusion(device).eval()
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    return sampling(lambda: diffusion.p_sample(x, 499), device, half)


def sampling(one_step: Step, device: str, half: bool) -> Step:
    @torch.no_grad()
    def without_gradients() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            one_step()

    return without_gradients


def flops(network: nn.Module) -> float:
    """Of a forward pass, per image: two for each multiplication with its addition."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def field(task: str, images: Tensor, batch: int, device: str) -> list[Contestant]:
    """Who takes part in a task, 'training' or 'sampling'."""
    passes = 3 if task == "training" else 1  # a backward pass computes twice as much as a forward pass
    our_cost, lucidrains_cost = passes * flops(UNet()), passes * flops(lucidrains_network())
    if task == "training":
        ours, *theirs = (
            partial(f, images, batch, device) for f in (our_training, diffusers_training, lucidrains_training)
        )
    else:
        ours, *theirs = (partial(f, batch, device) for f in (our_sampling, diffusers_sampling, lucidrains_sampling))
    found = []
    for precision in ("float32", "bfloat16"):
        half, name = precision == "bfloat16", f"ours, {precision}"
        found.append(Contestant(name, partial(ours, precision=precision), our_cost))
        found.append(Contestant(f"diffusers, {precision}", partial(theirs[0], half=half), our_cost, name))
        lucidrains = partial(theirs[1], half=half)
        found.append(Contestant(f"denoising-diffusion-pytorch, {precision}", lucidrains, lucidrains_cost, name))
    if task == "training" and device == "cuda":
        for compiled in (False, True):
            name = "ours, bfloat16, channels_last" + ", compiled" * compiled
            ours_fast = partial(ours, precision="bfloat16", channels_last=True, compile=compiled)
            found.append(Contestant(name, ours_fast, our_cost))
            theirs_fast = partial(theirs[0], half=True, channels_last=True, compiled=compiled)
            found.append(Contestant(name.replace("ours", "diffusers"), theirs_fast, our_cost, name))
    return found


def measure(contestants: list[Contestant], rounds: int, device: str) -> tuple[list[list[float]], list[float]]:
    """Seconds per step of each contestant in each round, and the GiB each needs on a GPU; warm-up is not counted."""

    def timed(one_step: Step, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            one_step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    steps, memory = [], []
    for contestant in contestants:
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        steps.append(contestant.build())
        timed(steps[-1], 1 if device == "cpu" else 5)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            timed(steps[-1], 1)
            memory.append((torch.cuda.max_memory_allocated() - before) / 2**30)
    times = [[timed(one_step, STEPS[device]) for one_step in steps] for _ in range(rounds)]
    return [list(column) for column in zip(*times)], memory


def compared(theirs: list[float], ours: list[float]) -> tuple[float, str]:
    """Median over the rounds of their time over ours; and in words, with the lowest and the highest."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(contestants: list[Contestant], times: list[list[float]], memory: list[float], batch: int) -> Iterator[str]:
    """A row for each contestant; ratios to the one that it is held against, with the lowest and highest round."""
    peak = next((peak for name, peak in PEAK.items() if memory and name in torch.cuda.get_device_name()), None)
    columns = ["Library", "ms", "images/s", "GFLOP per image", "GFLOP/s", "time / ours", "time per GFLOP / ours"]
    columns += ["FLOP utilisation", "GiB"] if memory else []
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"
    index = {contestant.name: i for i, contestant in enumerate(contestants)}
    for i, contestant in enumerate(contestants):
        seconds, gflop = statistics.median(times[i]), contestant.flops / 1e9
        row = [contestant.name, f"{seconds * 1e3:.0f}" if seconds > 0.1 else f"{seconds * 1e3:.1f}"]
        row += [f"{batch / seconds:.1f}", f"{gflop:.1f}", f"{batch * gflop / seconds:.0f}"]
        if contestant.against is None:
            row += ["", ""]
        else:
            ours = index[contestant.against]
            ratio, told = compared(times[i], times[ours])
            row += [told, f"{ratio * contestants[ours].flops / contestant.flops:.2f}"]
        if memory:
            row.append(f"{batch * contestant.flops / seconds / peak:.0%}" if peak else "peak not known")
            row.append(f"{memory[i]:.1f}")
        yield f"| {' | '.join(row)} |"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(arguments)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "denoising-diffusion-pytorch"))
    device = torch.device(options.device)
    threads = "" if options.device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{hardware(device)}{threads}; {versions}; batch {options.batch}; {datetime.date.today()}.")
    images = torch.rand(max(64, options.batch), 3, SIZE, SIZE) * 2 - 1
    for task in ("training", "sampling"):
        contestants = field(task, images, options.batch, options.device)
        times, memory = measure(contestants, options.rounds, options.device)
        print(f"\nOne {task} step, median of {options.rounds} rounds:\n")
        print(*table(contestants, times, memory, options.batch), sep="\n", flush=True)
        if task == "training":
            by_name = {contestant.name: column for contestant, column in zip(contestants, times)}
            default = f"ours, {'bfloat16' if has_bfloat16(device) else 'float32'}"
            _, told = compared(by_name["diffusers, float32"], by_name[default])
            print(f"\nAs each comes here: the time of diffusers, float32, over that of {default}: {told}.")


if __name__ == "__main__":
    main(sys.argv[1:])
