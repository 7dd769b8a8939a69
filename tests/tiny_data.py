"""Data sets of a few dozen images in the original formats, each with the list of checksums that makes them accepted.

``python tests/tiny_data.py FOLDER`` writes them too.
"""

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST = 40, 20  # images in each split; an image folder has all 60


def tiny_data(folder: Path, seed: int = 0) -> Path:
    """Write mnist, fashion-mnist, cifar10 and image-folder (cats and dogs) under a folder, which serves as their root.

    The root of the image folder is its own: ``folder / "image-folder"``.
    """
    rng = np.random.default_rng(seed)
    tiny_idx(folder / "mnist", rng)
    tiny_idx(folder / "fashion-mnist", rng)
    tiny_cifar10(folder / "cifar10", rng)
    tiny_image_folder(folder / "image-folder", rng)
    return folder


def pictures(rng: np.random.Generator, n: int, *shape: int) -> np.ndarray:
    """Noise with a bright square in it, (n, *shape) uint8."""
    images = rng.integers(0, 60, (n, *shape), dtype=np.uint8)
    images[..., 8:20, 8:20] += 190
    return images


def list_checksums(folder: Path) -> None:
    """Write md5sums.txt as ``md5sum`` does."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "md5sums.txt"]
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / "md5sums.txt").write_text("\n".join(lines) + "\n")


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def tiny_idx(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        images, labels = pictures(rng, n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(values), mtime=0))
    list_checksums(folder)


# Pickles as Python 2 and its numpy wrote them: protocol 2, texts as plain bytes.


def py2_text(value: bytes) -> bytes:
    return pickle.BINSTRING + struct.pack("<i", len(value)) + value


def py2_int(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def py2_tuple(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def py2_list(*parts: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(parts) + pickle.APPENDS


def py2_array(shape: tuple[int, ...], values: bytes, dtype: bytes = b"u1", fortran: bool = False) -> bytes:
    empty = py2_tuple(b"cnumpy\nndarray\n", py2_tuple(py2_int(0)), py2_text(b"b"))
    kind = b"cnumpy\ndtype\n" + py2_tuple(py2_text(dtype), py2_int(0), py2_int(1)) + pickle.REDUCE
    kind += (
        py2_tuple(py2_int(3), py2_text(b"|"), *[pickle.NONE] * 3, py2_int(-1), py2_int(-1), py2_int(0)) + pickle.BUILD
    )
    order = pickle.NEWTRUE if fortran else pickle.NEWFALSE
    state = py2_tuple(py2_int(1), py2_tuple(*map(py2_int, shape)), kind, order, py2_text(values))
    return b"cnumpy.core.multiarray\n_reconstruct\n" + empty + pickle.REDUCE + state + pickle.BUILD


def py2_batch(data: bytes, labels: bytes) -> bytes:
    entries = py2_text(b"labels") + labels + py2_text(b"data") + data
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + entries + pickle.SETITEMS + pickle.STOP


def cifar_batch(images: np.ndarray) -> bytes:
    """A batch with the labels 0, 1, ..."""
    labels = py2_list(*(py2_int(i % 10) for i in range(len(images))))
    return py2_batch(py2_array((len(images), 3072), images.tobytes()), labels)


def tiny_cifar10(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            n = TEST if name == "test_batch" else TRAIN // 5
            content = cifar_batch(pictures(rng, n, 3, 32, 32))
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    list_checksums(folder)


def tiny_image_folder(folder: Path, rng: np.random.Generator) -> None:
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for i in range((TRAIN + TEST) // 2):
            width, height = rng.integers(30, 60, 2)
            suffix = ("png", "jpg", "webp")[i % 3]
            pixels = pictures(rng, 3, height, width).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / kind / f"{i:02d}.{suffix}")
    list_checksums(folder)


if __name__ == "__main__":
    print(tiny_data(Path(sys.argv[1])))
