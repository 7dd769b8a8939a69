"""Train a text encoder before any picture is drawn: ``python -m scripts.text_encoder FILE``.

Three ways to learn to read captioned scenes; the last two need no labels, and serve for emoji, too:

- ``objects``: the feature of each word is to describe the object that the word belongs to, 1 for its shape, colour,
  size and place and 0 for what it is not, and to tell the background, the order and the number. It uses what only the
  maker of the data knows.
- ``pictures``: tell which of 256 pictures a caption belongs to, as CLIP does (Radford et al. 2021), beside a small
  network that reads the pictures. It uses pairs of picture and caption, and nothing else.
- ``words``: guess hidden words, as BERT does (Devlin et al. 2019). It uses captions alone.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_lib.checkpoint import save_text_encoder
from ddpm_lib.data import emoji
from ddpm_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    LONGEST,
    RADII,
    RELATIONS,
    SHAPE_WORDS,
    SHAPES,
    VOCABULARY,
    Scene,
    captioned_scenes,
    plural,
    scenes,
)
from ddpm_lib.text import TextEncoder, in_words

SCENES = 60_000
BATCH = 256
LEARNING_RATE = 2e-3
DROPOUT = 0.1  # while it learns; without, it takes a colour and a shape never seen together for one seen
HIDDEN = 0.2  # share of words hidden in 'words'
Loss = Callable[[Tensor], Tensor]  # of the places of a batch in the training set

SHAPE_OF = {form: shape for shape, words in SHAPE_WORDS.items() for word in words for form in (word, plural(word))}
OF_A_SCENE = [BACKGROUNDS, RELATIONS, "1234"]  # questions, each with all that may answer it
OF_AN_OBJECT = [SHAPES, COLOURS, RADII, [(order, rank) for order in RELATIONS for rank in ("first", "middle", "last")]]


def marks(questions: Iterable[Iterable], said: Iterable) -> list[float]:
    """All possible answers to the questions, 1 for those that are given and 0 for the others."""
    return [float(word == answer) for words, answer in zip(questions, said) for word in words]


def described(scene: Scene, caption: str) -> list[list[float]]:
    """What the feature of each of LONGEST words is to tell: 22 numbers of the word's object, 10 of the scene.

    A word belongs to the next object that the caption names; behind the last one it belongs to none.
    """
    of_scene, rows = marks(OF_A_SCENE, (scene.background, scene.order, str(len(scene.items)))), []
    words = in_words(caption)
    for end, word in enumerate(words, start=1):
        if word in SHAPE_OF:
            named = (SHAPE_OF[word], words[end - 2])
            i, item = next((i, item) for i, item in enumerate(scene.items) if (item.shape, item.colour) == named)
            rank = "first" if i == 0 else "last" if i == len(scene.items) - 1 else "middle"
            of_object = marks(OF_AN_OBJECT, (*named, item.size, (scene.order, rank)))
            rows += [of_object + of_scene] * (end - len(rows))
    return rows + [marks(OF_AN_OBJECT, 4 * [None]) + of_scene] * (LONGEST - len(rows))


def objects(encoder: TextEncoder, tokens: Tensor, _: Tensor) -> tuple[nn.Module, Loss]:
    wanted = torch.tensor([described(scene, caption) for scene, caption in captioned_scenes(SCENES)])
    part = wanted.shape[2]

    def loss(batch: Tensor) -> Tensor:
        return (encoder(tokens[batch])[..., :part] - wanted[batch]).square().sum(2).mean()

    return nn.Module(), loss


def pictures(encoder: TextEncoder, tokens: Tensor, images: Tensor) -> tuple[nn.Module, Loss]:
    eye = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 128)),
    )
    parts = nn.ModuleDict({"eye": eye, "words": nn.Linear(encoder.width, 128)})
    parts.register_parameter("log_scale", nn.Parameter(torch.tensor(2.5)))

    def loss(batch: Tensor) -> Tensor:
        seen = F.normalize(eye(images[batch] / 127.5 - 1), dim=1)
        read = F.normalize(parts["words"](encoder(tokens[batch]).mean(1)), dim=1)
        alike, own = parts.log_scale.exp() * seen @ read.T, torch.arange(len(batch))
        return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2

    return parts, loss


def words(encoder: TextEncoder, tokens: Tensor, _: Tensor) -> tuple[nn.Module, Loss]:
    head = nn.Linear(encoder.width, len(encoder.number) + 1)

    def loss(batch: Tensor) -> Tensor:
        whole = tokens[batch]
        hidden = (torch.rand(whole.shape) < HIDDEN) & (whole > 0)
        return F.cross_entropy(head(encoder(whole.masked_fill(hidden, 0)))[hidden], whole[hidden])

    return head, loss


OBJECTIVES = {"objects": objects, "pictures": pictures, "words": words}


def train(
    objective: str, steps: int, width: int, layers: int, seed: int = 0, dataset: str = "scenes"
) -> Iterator[tuple[TextEncoder, float]]:
    """The encoder after each step, with the loss of that step; to be used when all steps are done."""
    images, captions = scenes(SCENES) if dataset == "scenes" else emoji()
    torch.manual_seed(seed)
    encoder = TextEncoder(*language(dataset), width, layers)
    tokens = encoder.tokenise(captions)
    extra, loss = OBJECTIVES[objective](encoder, tokens, images)
    parameters = [*encoder.parameters(), *extra.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    set_dropout(encoder, DROPOUT)
    for _ in range(steps):
        value = loss(torch.randint(len(captions), (BATCH,)))
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        yield encoder, value.item()
    set_dropout(encoder, 0.0)


def language(dataset: str) -> tuple[list[str], int]:
    """The words of all captions, and how many the longest has."""
    if dataset == "scenes":
        return VOCABULARY, LONGEST
    captions = [in_words(name) for name in emoji("all")[1]]
    return sorted({word for words in captions for word in words}), max(map(len, captions))


def set_dropout(encoder: TextEncoder, share: float) -> None:
    for part in encoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dataset", default="scenes", choices=("scenes", "emoji"))
    parser.add_argument("--objective", default="objects", choices=OBJECTIVES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    learning = train(options.objective, options.steps, options.width, options.layers, dataset=options.dataset)
    bar = tqdm(learning, total=options.steps)
    for encoder, value in bar:  # noqa: B007
        bar.set_postfix(loss=f"{value:.4f}", refresh=False)
    save_text_encoder(encoder.eval(), options.file)
    print(f"{options.file}: loss {value:.4f}")


if __name__ == "__main__":
    main()
