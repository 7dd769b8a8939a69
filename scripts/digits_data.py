"""Write the digits that the package ships, from scikit-learn's copy: ``python -m scripts.digits_data``."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "digits.npz"


def main() -> None:
    source = load_digits()
    order = np.random.RandomState(0).permutation(len(source.target))  # the source has runs of one writer
    images = source.images.astype(np.uint8)[order]
    np.savez_compressed(TARGET, images=images, labels=source.target.astype(np.uint8)[order])


if __name__ == "__main__":
    main()
