"""The gradient of a trained model of captioned scenes, with and without numbers below 1e-38 flushed to zero.

    OMP_NUM_THREADS=1 python -m benchmarks.denormals MODEL.safetensors [--rounds 10]

Both run in one process, in turn. The ratio is the median over the rounds of (time without / time with).
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from ddpm_lib import capped_loss, load_denoiser
from ddpm_lib.data import as_floats
from ddpm_lib.scenes import scenes
from ddpm_lib.training import flushed_denormals

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    model = load_denoiser(options.model).train()
    model.network.unet.requires_grad_(True)
    images, captions = scenes(BATCH, "test")
    generator = torch.Generator().manual_seed(0)
    x0, tokens = as_floats(images), model.network.encoder.tokenise(captions)
    t, eps = torch.randint(1, 1001, (BATCH,), generator=generator), torch.randn(x0.shape, generator=generator)

    def seconds(mode) -> float:
        start = time.perf_counter()
        with mode():
            capped_loss(model, x0, t, eps, tokens, cap=5).mean().backward()
        return time.perf_counter() - start

    seconds(nullcontext)
    rounds = [(seconds(nullcontext), seconds(flushed_denormals)) for _ in range(options.rounds)]
    without, with_ = (statistics.median(times) for times in zip(*rounds))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"gradient for {BATCH} images: {without:.2f} s, flushed {with_:.2f} s, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
