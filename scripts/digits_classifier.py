"""Train the digit classifier that the package ships: ``python -m scripts.digits_classifier``.

It sees the 1,347 training digits, shifted by up to one pixel and with a little noise; the 450 test digits only
measure it. The run takes a minute or two on one core.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import Classifier, digits
from ddpm_lib.checkpoint import write_checkpoint

from .digits_data import TARGET

EPOCHS, BATCH = 150, 64


def augment(images: Tensor) -> Tensor:
    """Each image shifted by -1, 0 or 1 pixels both ways, with noise of deviation 0.1."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(0, 3, (2, len(images)))
    shifted = torch.stack([p[:, i : i + 8, j : j + 8] for p, i, j in zip(padded, down, right)])
    return shifted + 0.1 * torch.randn_like(shifted)


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = digits("train")
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    total = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=total)
    for _ in tqdm(range(EPOCHS), unit="epoch"):
        model.train()
        for index in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(augment(images[index])), labels[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    path = TARGET.parent.parent / "models" / "digits-classifier.safetensors"
    write_checkpoint(path, "classifier", model.config, model.state_dict())
    print(f"accuracy: train {accuracy(model, images, labels):.4f}, test {accuracy(model, *digits('test')):.4f}")


if __name__ == "__main__":
    main()
