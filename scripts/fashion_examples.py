"""Write the Fashion-MNIST test images that the package ships: ``python -m scripts.fashion_examples``."""

from pathlib import Path

import numpy as np

from ddpm_lib import fashion_mnist

TARGET = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "fashion_examples.npz"
EACH = 10


def main() -> None:
    images, labels = fashion_mnist("test")
    first = np.stack([(labels == c).nonzero()[:EACH, 0].numpy() for c in range(10)], axis=1).flatten()
    np.savez_compressed(TARGET, images=images[first, 0].numpy(), labels=labels[first].numpy().astype(np.uint8))


if __name__ == "__main__":
    main()
