"""Train the U-Net of the book's chapter with one part changed at a time, and measure what each part buys.

    python -m scripts.unet_ablation

writes ``ddpm_lib/datasets/unet_ablation.json``, where the chapter reads it. On one thread that takes about a quarter of
an hour. A run that is stopped goes on with the variants and seeds that the file does not hold yet.
"""

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ddpm_lib import Denoiser, Schedule, Trainer, UNet, digits, frechet_distance, pretrained_classifier, sample
from ddpm_lib.unet import Stage, initialised

RESULTS = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "unet_ablation.json"
NETWORK = {
    "image_size": 8,
    "in_channels": 1,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "dropout": 0.0,
    "groups": 8,
    "classes": 10,
}
SEEDS = (0, 1, 2)
STEPS = 300
OPTIONS = {"batch_size": 32, "learning_rate": 3e-3, "warmup": 50, "decay_steps": STEPS, "ema_decay": 0.99}
SAMPLING = {"steps": 25, "variance": "beta_tilde"}
LOSS_STEPS = (1, 10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)


def blank_skip(width: int, part: Stage, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, embedding = inputs
    return torch.cat([x[:, :width], torch.zeros_like(x[:, width:])], dim=1), embedding


class Nothing(nn.Module):
    """Zero, where a tensor is wanted that may be added to another of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def zero(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def stages(network: UNet) -> list[Stage]:
    return [part for part in network.modules() if isinstance(part, Stage)]


def without_skips(network: UNet) -> None:
    """Zeros arrive where a skip connection did: as many weights, nothing to read."""
    width = network.middle[-1].residual.conv_1.out_channels
    for part in network.up:
        if isinstance(part, Stage):
            part.register_forward_pre_hook(partial(blank_skip, width))
            width = part.residual.conv_1.out_channels


def without_attention(network: UNet) -> None:
    for stage in stages(network):
        stage.attention = nn.Identity()


def without_middle(network: UNet) -> None:
    network.middle = nn.ModuleList()


def without_time(network: UNet) -> None:
    network.time.register_forward_hook(zero)


def one_slow_wave(network: UNet) -> None:
    """sin(steps / 1000) and cos(steps / 1000) in all channels: the step as one number that moves slowly."""
    network.time.frequency.fill_(1e-3)


def told_once(network: UNet) -> None:
    """Time and label reach the first residual block only."""
    for stage in stages(network)[1:]:
        stage.residual.embedding.register_forward_hook(zero)


def without_norm(network: UNet) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())


def ordinary_start(network: UNet) -> None:
    for stage in stages(network):
        initialised(stage.residual.conv_2)


def without_shortcuts(network: UNet) -> None:
    """Residual blocks without the shortcut, started as ordinary layers: near zero they would answer nothing."""
    ordinary_start(network)
    for stage in stages(network):
        stage.residual.shortcut = Nothing()


def unchanged(network: UNet) -> None:
    pass


VARIANTS: dict[str, tuple[dict, Callable[[UNet], None]]] = {
    "full": ({}, unchanged),
    "no skips": ({}, without_skips),
    "no time embedding": ({}, without_time),
    "one slow wave": ({}, one_slow_wave),
    "told once": ({}, told_once),
    "no attention": ({}, without_attention),
    "no middle": ({}, without_middle),
    "no normalisation": ({}, without_norm),
    "no shortcuts": ({}, without_shortcuts),
    "half width": ({"base_channels": 8, "groups": 4}, unchanged),
}


def build(variant: str, seed: int) -> UNet:
    changes, change = VARIANTS[variant]
    torch.manual_seed(seed)
    network = UNet(**NETWORK | changes)
    change(network)
    return network


def macs(network: UNet) -> int:
    """Multiply-accumulates of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    return counter.get_total_flops() // 2


@torch.no_grad()
def losses(denoiser: Denoiser) -> list[float]:
    """Loss on the test digits at each of LOSS_STEPS, the same noise for everyone."""
    images, labels = digits("test")
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    schedule = denoiser.schedule
    return [
        float((denoiser(schedule.q_sample(images, t, eps), t, labels).eps - eps).square().mean()) for t in LOSS_STEPS
    ]


def measure(variant: str, seed: int) -> dict:
    start = time.process_time()
    network = build(variant, seed)
    images, labels = digits("train")
    trainer = Trainer(Denoiser(network, Schedule.linear()), images, labels, **OPTIONS, precision="float32", seed=seed)
    for _ in trainer.run(STEPS):
        pass
    trained = time.process_time() - start
    label = torch.arange(450) % 10
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(trainer.ema, (450, 1, 8, 8), condition=label, generator=generator, **SAMPLING)
    judge = pretrained_classifier()
    features = judge.features(drawn.clamp(-1, 1))
    right = float((judge.head(features).argmax(1) == label).double().mean())
    return {
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "macs": macs(network),
        "test_loss": [round(loss, 5) for loss in losses(trainer.ema)],
        "accuracy": round(right, 4),
        "frechet": round(frechet_distance(features, judge.features(images)), 3),
        "seconds": round(trained, 1),
    }


def settings() -> dict:
    return {
        "network": NETWORK,
        "steps": STEPS,
        "options": OPTIONS,
        "sampling": SAMPLING | {"samples": 450},
        "loss_steps": list(LOSS_STEPS),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done = {(run["variant"], run["seed"]) for run in runs}
    wanted = [(variant, seed) for seed in SEEDS for variant in VARIANTS if (variant, seed) not in done]
    for variant, seed in tqdm(wanted, unit="run"):
        runs.append(measure(variant, seed))
        text = ",\n  ".join(json.dumps(run) for run in runs)
        RESULTS.write_text(f'{{"settings": {json.dumps(settings())},\n "runs": [\n  {text}\n]}}\n')


if __name__ == "__main__":
    main()
