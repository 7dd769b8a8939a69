"""Train the classifier of noisy digits that the package ships: ``python -m scripts.noisy_classifier``.

It sees the 1,347 training digits at all steps of the linear schedule; the 450 test digits only measure it. The run
takes a minute or two on one core, and prints the table of the model card.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm_lib import NoisyClassifier, Schedule, digits
from ddpm_lib.checkpoint import write_checkpoint

from .digits_data import TARGET

STEPS, BATCH = 6000, 128


def quality(model: NoisyClassifier, schedule: Schedule, images: Tensor, labels: Tensor, t: int) -> tuple[float, float]:
    """Accuracy, and mean cross-entropy in nats, on images noised to step t, with ten draws of the noise."""
    generator = torch.Generator().manual_seed(t)
    images, labels = images.repeat(10, 1, 1, 1), labels.repeat(10)
    x_t = schedule.q_sample(images, t, torch.randn(images.shape, generator=generator))
    with torch.no_grad():
        logits = model(x_t, t)
    return float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits, labels))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    schedule, (images, labels) = Schedule.linear(), digits("train")
    model = NoisyClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=STEPS)
    for _ in tqdm(range(STEPS), unit="step"):
        index = torch.randint(len(images), (BATCH,))
        t = torch.randint(1, schedule.T + 1, (BATCH,))
        x_t = schedule.q_sample(images[index], t, torch.randn(BATCH, 1, 8, 8))
        loss = F.cross_entropy(model(x_t, t), labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    path = TARGET.parent.parent / "models" / "digits-noisy-classifier.safetensors"
    write_checkpoint(path, "noisy classifier", model.config, model.state_dict())
    held_out = digits("test")
    print("| t | accuracy on training digits | on test digits | cross-entropy, training | test |")
    for t in (1, 50, 100, 200, 300, 400, 500, 600, 800, 1000):
        (a, a_loss), (b, b_loss) = quality(model, schedule, images, labels, t), quality(model, schedule, *held_out, t)
        print(f"| {t} | {a:.1%} | {b:.1%} | {a_loss:.2f} | {b_loss:.2f} |")


if __name__ == "__main__":
    main()
