"""Draw the picture of the README, the shipped model undoing noise: ``python -m scripts.picture``."""

import torch

from ddpm_lib import plots, pretrained, sample_steps

from .digits import ROOT

SHOWN = (1000, 600, 450, 350, 280, 220, 170, 120, 70, 30)


def main() -> None:
    generator = torch.Generator().manual_seed(4)
    label = torch.tensor([0, 2, 3, 5, 8, 9])
    states = list(sample_steps(pretrained("digits"), (6, 1, 8, 8), condition=label, generator=generator))
    columns = [state.x_t for state in states if state.t in SHOWN] + [states[-1].x_s]
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    (ROOT / "book" / "assets" / "denoising.png").write_bytes(plots.png(plots.tile(rows, len(columns)), width=980))


if __name__ == "__main__":
    main()
