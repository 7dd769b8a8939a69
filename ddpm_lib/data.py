"""Images to learn from: digits and emoji that come with the package, public data sets, folders of pictures; points.

The files of public data sets are looked for in ``root``, then in the folder that the environment variable DDPM_DATA
names, then in ``~/.cache/ddpm_lib``, where they are downloaded if they are nowhere. Under each of these they may lie on
their own, in a folder named as the data set, or as torchvision leaves them.

Each file is compared with its md5 whenever it is read. Data of your own in the same format are taken where a list
``md5sums.txt`` beside them has their md5: run ``md5sum * > md5sums.txt`` in their folder.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .download import ORIGINALS, SUMS, DataError, listed, locate, read, read_as
from .scenes import scenes
from .schedule import _positive_int

SPIRAL_MEAN = torch.tensor([-0.4244, 1.9099])
SPIRAL_STD = torch.tensor([4.7820, 4.2307])
TRAIN = 1347  # of the 1,797 digits; the file stores them in a fixed shuffled order

SCENES = {"train": 60_000, "test": 2_000}  # how many are drawn
EMOJI_HELD_OUT = 8  # one in so many of the emoji with a skin tone

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
UNPACKED = 1 << 30  # bytes; no file read here unpacks to more
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def load_images(
    dataset: str, split: str = "train", *, root: str | Path | None = None, image_size: int | None = None
) -> tuple[Tensor, Tensor | list[str] | None]:
    """Images (N, C, H, W) and labels (N,), or captions, or None where there are neither, of a data set by its name.

    ``dataset`` is 'digits', 'emoji', 'mnist', 'fashion-mnist', 'cifar10', 'scenes' or 'image-folder'. Images are uint8
    in 0..255; those of digits are float32 in [-1, 1]. 'image-folder' needs ``root``, its folder, and ``image_size``;
    all its images are the split 'train'. The others have a size of their own, which ``image_size`` may state.

    Raises:
        DataError: the data are absent or damaged.
        ValueError: there is no such data set, split or size.
    """
    if dataset == "image-folder":
        if root is None or image_size is None:
            raise ValueError(f"image-folder needs root and image_size; got {root!r} and {image_size!r}.")
        if split != "train":
            raise ValueError(f"an image-folder has the split 'train' only; got {split!r}.")
        return image_folder(root, image_size)
    loaders = {"mnist": mnist, "fashion-mnist": fashion_mnist, "cifar10": cifar10}
    drawn = {"digits": digits, "emoji": emoji, "scenes": _scenes}
    if dataset not in drawn | loaders:
        known = ", ".join(["digits", "emoji", *loaders, "scenes", "image-folder"])
        raise ValueError(f"dataset must be one of {known}; got {dataset!r}.")
    images, labels = drawn[dataset](split) if dataset in drawn else loaders[dataset](split, root)
    size = images.shape[-1]
    if image_size not in (None, size):
        raise ValueError(
            f"images of {dataset} are {size} x {size}: image_size must be None or {size}; got {image_size}."
        )
    return images, labels


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits of 13 people: images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,) in 0..9.

    ``split`` is 'train' (1,347 images), 'test' (450) or 'all'. Grey levels are whole numbers 0..16 in the source, so
    neighbouring levels lie 1/8 apart.

    Source: Alpaydin and Kaynak (1998), the test part of the UCI set, as in scikit-learn; the file is made by
    ``scripts.digits_data``.
    """
    parts = {"train": slice(None, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}
    if split not in parts:
        raise ValueError(f"split must be 'train', 'test' or 'all'; got {split!r}.")
    with (resources.files(__package__) / "datasets" / "digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        images, labels = stored["images"][parts[split]], stored["labels"][parts[split]]
    return torch.from_numpy(images).float()[:, None] / 8 - 1, torch.from_numpy(labels).long()


def emoji(split: str = "train") -> tuple[Tensor, list[str]]:
    """Faces, hands and persons from a font: pictures (N, 3, 32, 32) uint8 in 0..255 on white, with their names.

    A name such as 'woman firefighter, medium-dark skin tone' joins what is shown with one of five skin tones. ``split``
    is 'train' (1,720 pictures), 'test' (180, each of which 'train' has in other tones) or 'all'.

    Source: Noto Color Emoji (Google), names of Unicode's Common Locale Data Repository; the file is made by
    ``scripts.emoji_data``.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all'; got {split!r}.")
    with (resources.files(__package__) / "datasets" / "emoji.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        images, names = stored["images"], [str(name).replace(":", ",") for name in stored["names"]]
    taken = [i for i, name in enumerate(names) if split in ("all", "test" if _held_out_emoji(name) else "train")]
    return torch.from_numpy(images[taken]).permute(0, 3, 1, 2).contiguous(), [names[i] for i in taken]


def _held_out_emoji(name: str) -> bool:
    return "skin tone" in name and zlib.crc32(name.encode()) % EMOJI_HELD_OUT == 0


def mnist(split: str = "train", root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Handwritten digits: images (N, 1, 28, 28) uint8, labels (N,) in 0..9; N is 60,000 ('train') or 10,000 ('test').

    Source: LeCun, Bottou, Bengio and Haffner (1998), in the original four files.
    """
    return _idx("mnist", "MNIST/raw", split, root)


def fashion_mnist(split: str = "train", root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Pictures of clothes: images (N, 1, 28, 28) uint8, labels (N,) in 0..9; N is 60,000 ('train') or 10,000 ('test').

    Source: Xiao, Rasul and Vollgraf (2017), in the original four files.
    """
    return _idx("fashion-mnist", "FashionMNIST/raw", split, root)


def cifar10(split: str = "train", root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Small photographs: images (N, 3, 32, 32) uint8, labels (N,) in 0..9; N is 50,000 ('train') or 10,000 ('test').

    Source: Krizhevsky (2009), the original ``cifar-10-python.tar.gz``, or the folder that it unpacks to.
    """
    _check_split(split)
    batches = [name for name in CIFAR_BATCHES if name.startswith("data" if split == "train" else "test")]
    ((archive, original),) = ORIGINALS["cifar10"].items()
    folders = (f"cifar10/{CIFAR_FOLDER}", CIFAR_FOLDER, "cifar10", "")
    folder, names = locate(
        "cifar10", [*((place, batches) for place in folders), ("cifar10", [archive]), ("", [archive])], root
    )
    if names == batches:
        contents = {folder / batch: read(folder / batch, CIFAR_BATCHES[batch]) for batch in batches}
    else:
        contents = _unpack(folder / archive, read(folder / archive, original.md5), batches)
    images, labels = zip(*(_read_batch(path, content) for path, content in contents.items()))
    return torch.cat(images), torch.cat(labels)


def image_folder(folder: str | Path, image_size: int) -> tuple[Tensor, Tensor | None]:
    """The png, jpg, jpeg and webp files under a folder, in the order of their paths: (N, 3, size, size) uint8.

    The short side is resized to size = ``image_size`` by Lanczos' filter, which averages what it merges, and the centre
    is cut out. Photographs are turned upright, as their camera noted; what is transparent becomes white. Hidden files
    are passed over, and so are links to folders.

    If all images lie in subfolders, and these are two or more, labels (N,) count the subfolders in the order of their
    names; else labels are None. If the folder holds a list ``md5sums.txt``, each image must be on it: a damaged jpeg
    can look whole, and only its md5 shows it.

    Raises:
        DataError: the folder or its images are absent, or an image is damaged or has more than 8 bits per channel.
    """
    size, folder = _positive_int("image_size", image_size), Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder of images {folder}.")
    paths = [
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise DataError(f"there is no png, jpg, jpeg or webp file in {folder}.")
    sums = {name: md5 for name, md5 in listed(folder).items() if Path(name).suffix.lower() in SUFFIXES}
    if sums and (astray := sorted(sums.keys() ^ set(names))):
        raise DataError(f"{folder / SUMS} lists other images than {folder} holds; {astray[0]} is in one of them only.")
    images = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(lambda name: _read_picture(folder / name, size, sums.get(name)), names)
        for i, picture in enumerate(pictures):
            images[i] = torch.from_numpy(picture).permute(2, 0, 1)
    classes = {name.partition("/")[0]: None for name in names}
    if len(classes) < 2 or not all("/" in name for name in names):
        return images, None
    number = {name: i for i, name in enumerate(sorted(classes))}
    return images, torch.tensor([number[name.partition("/")[0]] for name in names])


def picture(path: str | Path, image_size: int) -> Tensor:
    """One picture, (1, 3, size, size) uint8, resized and cut out as those of an ``image_folder``.

    Raises:
        DataError: it is absent, damaged or has more than 8 bits per channel.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no picture {path}.")
    size = _positive_int("image_size", image_size)
    return torch.from_numpy(_read_picture(Path(path), size, None)).permute(2, 0, 1)[None]


def spiral(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points (n, 2) on a spiral of one and a half turns, with zero mean and unit variances (for n to infinity)."""
    angle = 3 * torch.pi * torch.rand(n, generator=generator).sqrt()
    points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    points = points + 0.3 * torch.randn(n, 2, generator=generator)
    return (points - SPIRAL_MEAN) / SPIRAL_STD


def as_floats(images: Tensor) -> Tensor:
    """Images of bytes, or of floats of any size, as float32 in [-1, 1]."""
    return (images / 127.5 - 1 if images.dtype == torch.uint8 else images).float()


def _scenes(split: str) -> tuple[Tensor, list[str]]:
    _check_split(split)
    return scenes(SCENES[split], split)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}.")


def _idx(dataset: str, raw: str, split: str, root: str | Path | None) -> tuple[Tensor, Tensor]:
    """A split of MNIST or of a data set in its format; ``raw`` is where torchvision keeps its files."""
    _check_split(split)
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
    folder, _ = locate(dataset, [(place, names) for place in (dataset, raw, "")], root)
    images, labels = (_read_idx(folder / name, ORIGINALS[dataset][name].md5) for name in names)
    if images.shape != (len(labels), 28, 28) or len(labels) == 0:
        raise DataError(
            f"{folder} holds {split} images of shape {images.shape} and {len(labels)} labels; images must have the "
            "shape (N, 28, 28), with N labels and N > 0."
        )
    return torch.from_numpy(images)[:, None], _checked_labels(labels.tolist(), folder / names[1])


def _read_idx(path: Path, md5: str) -> np.ndarray:
    """The array in a gzip file of the IDX format: 0, 0, 8 for bytes, the number of sizes; the sizes; the values."""
    content = _gunzip(path, read(path, md5))
    dimensions = 3 if "idx3" in path.name else 1
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise DataError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions: it begins with {content[:4].hex()!r}."
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if math.prod(shape) != len(content) - start:
        raise DataError(f"{path} announces the shape {shape}, but holds {len(content) - start:,} values.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _gunzip(path: Path, content: bytes) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    try:
        unpacked = unzip.decompress(content, UNPACKED)
    except zlib.error as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    if not unzip.eof or unzip.unused_data:
        raise DataError(
            f"{path} is damaged: what it packs does not end where the file ends, or is over {UNPACKED:,} bytes."
        )
    return unpacked


def _unpack(path: Path, content: bytes, batches: list[str]) -> dict[Path, bytes]:
    """Content of the batches in the archive; nothing is written to disk."""
    contents, tar = {}, io.BytesIO(_gunzip(path, content))
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for batch in batches:
                member = archive.getmember(f"{CIFAR_FOLDER}/{batch}")
                if not member.isreg() or member.issparse():
                    raise KeyError(f"{batch} is no ordinary file")
                contents[path / batch] = archive.extractfile(member).read()
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged, or not the archive of CIFAR-10: {error}.") from error
    return contents


class _Inert:
    """Stands for whatever numpy thing a pickle names, or makes by calling one: keeps what it is given, does nothing."""

    def __init__(self, *arguments: object):
        self.arguments = arguments

    def __call__(self, *arguments: object) -> _Inert:
        return _Inert(*arguments)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Reads plain containers, and numpy's arrays as inert descriptions: no code that a pickle names is ever called.

    It is Python's own unpickler in Python, since the one in C reserves as much memory as a wild memo index asks for.
    """

    allowed = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> _Inert:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        return _Inert()


def _read_batch(path: Path, content: bytes) -> tuple[Tensor, Tensor]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        labels = batch[b"labels"]
        _, shape, dtype, fortran, values = batch[b"data"].state
        if not (isinstance(labels, list) and labels and shape == (len(labels), 3072) and dtype.arguments[0] == b"u1"):
            raise ValueError("it does not hold N > 0 labels and (N, 3072) values of type u1")
        images = np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path} is no batch of CIFAR-10: {type(error).__name__}: {error}.") from error
    return torch.tensor(images).view(-1, 3, 32, 32), _checked_labels(labels, path)


def _checked_labels(labels: list, path: Path) -> Tensor:
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise DataError(f"{path} is damaged: its labels are not all in 0..9.")
    return torch.tensor(labels)


def _read_picture(path: Path, size: int, md5: str | None) -> np.ndarray:
    """The centre of an image, (size, size, 3)."""
    content = read_as(path, md5)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as stored:
            if stored.mode.startswith(("I", "F")):
                raise ValueError(f"its mode {stored.mode} has more than 8 bits per channel; convert it to 8 bits")
            image = ImageOps.exif_transpose(stored)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            left, top = ((side - min(image.size)) / 2 for side in image.size)
            box = (left, top, left + min(image.size), top + min(image.size))
            return np.array(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box))
    except Exception as error:  # a damaged image can fail in any way
        raise DataError(f"cannot read the image {path}: {error}.") from error
