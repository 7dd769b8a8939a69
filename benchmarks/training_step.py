"""A training step and a sampling step of the paper's CIFAR-10 model, beside diffusers: ratios from one process run.

    python -m benchmarks.training_step [--batch 8] [--rounds 5] [--device cpu]

Each round times one step of everybody, in turn, so that a slow moment of the machine hits all alike. A ratio is the
median over the rounds of (their time / our time): above 1 we are faster. All train the same network (35.7M parameters,
equal outputs, as tests show) on the same random images.

- ours: ``Trainer`` with noise, loss, backward pass, clipping, Adam and moving average; at its own precision and fixed.
- diffusers: the loop of its example for unconditional training: its U-Net and scheduler, mean squared error, clipping,
  AdamW, its EMAModel; in float32 as the example comes, and under bfloat16 autocast.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from ddpm_lib import Denoiser, Schedule, Trainer, UNet, step

SIZE = 32


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ours(images: torch.Tensor, batch: int, device: str, **options) -> Callable[[], None]:
    torch.manual_seed(0)
    trainer = Trainer(Denoiser(UNet(), Schedule.linear()), images, batch_size=batch, device=device, **options)
    return lambda: next(trainer.run(1))


def theirs_network(device: str) -> UNet2DModel:
    torch.manual_seed(0)
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
    ).to(device)


def theirs(images: torch.Tensor, batch: int, device: str, half: bool) -> Callable[[], None]:
    model = theirs_network(device)
    scheduler = DDPMScheduler()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = EMAModel(model.parameters())
    images = images.to(device)
    autocast = torch.autocast(device, torch.bfloat16) if half else nullcontext()

    def one_step() -> None:
        clean = images[torch.randint(len(images), (batch,), device=device)]
        noise = torch.randn_like(clean)
        steps = torch.randint(1000, (batch,), device=device)
        with autocast:
            loss = F.mse_loss(model(scheduler.add_noise(clean, noise, steps), steps).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(model.parameters())

    return one_step


def our_sampling(batch: int, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(), Schedule.linear()).to(device).eval()
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)

    def one_step() -> None:
        with torch.no_grad():
            step(denoiser(x, 500).clip(), 500, 499, denoiser.schedule)

    return one_step


def their_sampling(batch: int, device: str) -> Callable[[], None]:
    model, scheduler = theirs_network(device).eval(), DDPMScheduler(variance_type="fixed_large")
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)

    def one_step() -> None:
        with torch.no_grad():
            scheduler.step(model(x, 499).sample, 499, x)

    return one_step


def measure(contestants: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; a first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, one_step in contestants.items():
            synchronise(device)
            start = time.perf_counter()
            one_step()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def table(times: dict[str, list[float]], pairs: list[tuple[str, str]], batch: int) -> Iterator[str]:
    for name, values in times.items():
        yield f"{name:28} {statistics.median(values) * 1e3:8.0f} ms {batch / statistics.median(values):8.2f} images/s"
    for our, their in pairs:
        ratios = [b / a for a, b in zip(times[our], times[their])]
        yield f"{their} / {our}: {statistics.median(ratios):.2f}   (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    batch, device = options.batch, options.device
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}; torch {torch.__version__}, diffusers {diffusers.__version__}; batch {batch}")
    images = torch.rand(64, 3, SIZE, SIZE) * 2 - 1
    training = {
        "ours, auto": ours(images, batch, device),
        "ours, float32": ours(images, batch, device, precision="float32"),
        "ours, bfloat16": ours(images, batch, device, precision="bfloat16"),
        "diffusers, float32": theirs(images, batch, device, half=False),
        "diffusers, bfloat16": theirs(images, batch, device, half=True),
    }
    pairs = [("ours, auto", "diffusers, float32"), ("ours, float32", "diffusers, float32")]
    pairs += [("ours, bfloat16", "diffusers, bfloat16")]
    print("\nTraining step")
    print(*table(measure(training, options.rounds, device), pairs, batch), sep="\n")
    training.clear()
    sampling = {"ours": our_sampling(batch, device), "diffusers": their_sampling(batch, device)}
    print("\nSampling step")
    print(*table(measure(sampling, options.rounds, device), [("ours", "diffusers")], batch), sep="\n")


if __name__ == "__main__":
    main()
