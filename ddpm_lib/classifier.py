"""A small classifier of images, used only to judge samples: it reads their label and gives their features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import fit_state, read_checkpoint, shipped


class Classifier(nn.Module):
    """Three convolutions and two linear layers on square grey images in [-1, 1], for 10 classes."""

    def __init__(self, image_size: int = 8, width: int = 32, features: int = 64):
        super().__init__()
        self.config = {"image_size": image_size, "width": width, "features": features}
        self.conv_1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv_3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(2 * width * (image_size // 4) ** 2, features)
        self.head = nn.Linear(features, 10)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64), in which Frechet distances are measured, of images (B, 1, image_size, image_size)."""
        h = F.max_pool2d(F.relu(self.conv_3(self._middle(images))), 2)
        return F.relu(self.linear(self.dropout(h.flatten(1))))

    def spatial_features(self, images: Tensor) -> Tensor:
        """Seven channels of the middle layer, place by place, (B, 7 (image_size / 2)^2): they know where things are.

        Source: Nash et al. (2021), who take as many from the Inception network for the sFID.
        """
        return self._middle(images)[:, :7].flatten(1)

    def _middle(self, images: Tensor) -> Tensor:
        size = self.config["image_size"]
        if images.shape[1:] != (1, size, size):
            raise ValueError(
                f"this classifier reads images of shape (B, 1, {size}, {size}); got {tuple(images.shape)}."
            )
        h = F.relu(self.conv_1(images))
        return F.max_pool2d(F.relu(self.conv_2(h)), 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.features(images))


def pretrained_classifier(name: str = "digits") -> Classifier:
    """A trained classifier that the package ships, in evaluation mode, with frozen weights.

    ``name`` is 'digits' or 'fashion-mnist'.
    """
    path = shipped(f"{name}-classifier")
    config, tensors = read_checkpoint(path, "classifier")
    model = Classifier(**config)
    fit_state(model, tensors, str(path))
    return model.eval().requires_grad_(False)
