"""Train the Fashion-MNIST classifier that the package ships: ``python -m scripts.fashion_mnist_classifier``.

It sees the 60,000 training images, mirrored half of the time and shifted by up to two pixels; the 10,000 test images
only measure it. The run takes about a quarter of an hour on one core.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Classifier
from ddpm_lib.checkpoint import write_checkpoint
from ddpm_lib.data import fashion_mnist

from .digits_data import TARGET

EPOCHS, BATCH, SHIFT = 6, 128, 2


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """The batch, each image mirrored or not, and all of them shifted by up to two pixels both ways."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(mirrored, (SHIFT,) * 4, value=-1.0)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    return padded[:, :, down : down + 28, right : right + 28]


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(to_float(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return int(sum(right)) / len(images)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = fashion_mnist("train")
    model = Classifier(image_size=28)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    total = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=total)
    for _ in tqdm(range(EPOCHS), unit="epoch"):
        model.train()
        for index in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(augment(to_float(images[index]))), labels[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    path = TARGET.parent.parent / "models" / "fashion-mnist-classifier.safetensors"
    write_checkpoint(path, "classifier", model.config, model.state_dict())
    print(f"accuracy: train {accuracy(model, images, labels):.4f}, test {accuracy(model, *fashion_mnist('test')):.4f}")


if __name__ == "__main__":
    main()
