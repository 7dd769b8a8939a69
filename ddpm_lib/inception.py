"""The Inception network as a judge of samples: what published FIDs and Inception scores are measured with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Inception(nn.Module):
    """Inception-v3 with the weights of the original FID, by the library torch-fidelity.

    Its features and logits go into ``frechet_distance`` (then the FID), ``kernel_distance`` (the KID),
    ``precision_recall`` and ``inception_score``.

    Args:
        weights: a file of torch-fidelity's weights. By default torch-fidelity downloads it on first use, 91 MiB.

    Raises:
        ImportError: torch-fidelity is not installed.

    Source: Heusel et al. (2017); Szegedy et al. (2016).
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception features need one more package: pip install 'ddpm-lib[inception]'") from error
        path = None if weights is None else str(weights)
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of grey or colour images (B, 1 or 3, H, W) in [-1, 1], which are rounded to 8 bits."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 1 or 3, H, W); got {tuple(images.shape)}.")
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(pixels.expand(-1, 3, -1, -1))[0]

    def head(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) of features: those of the Inception score, without the bias, as its authors take them."""
        return features @ self.network.fc.weight.T
