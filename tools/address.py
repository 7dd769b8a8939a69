"""Carry the public address of the repository to every file that shows it.

    make address REPOSITORY=owner/name

The address stands in `pyproject.toml`; every other place follows it. While it is unset, the owner is one that GitHub
cannot have, so that no link leads to a stranger. `make address REPOSITORY=owner--not--set/ddpm-book` unsets it.
"""

import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNSET = "owner--not--set/ddpm-book"
# pyproject.toml comes last: the old address is read from it, so a run that was cut short can be run again.
PLACES = ("_config.yml", "CITATION.cff", "README.md", "book/**/*.md", "book/**/*.ipynb", "pyproject.toml")
# GitHub: letters, digits and single hyphens inside, at most 39 characters for an owner; "." and "_" too in a name.
OWNER = re.compile(r"(?=.{1,39}\Z)[A-Za-z0-9]+(-[A-Za-z0-9]+)*\Z")
NAME = re.compile(r"(?=.{1,100}\Z)(?!\.{1,2}\Z)(?!.*\.git\Z)[A-Za-z0-9._-]+\Z")


def current(root: Path = ROOT) -> str:
    """The address that `pyproject.toml` gives, as owner/name."""
    url = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    return url.removeprefix("https://github.com/")


def validated(repository: str) -> str:
    """`repository` itself, if GitHub can have it or it is the unset address."""
    owner, _, name = repository.partition("/")
    if repository != UNSET and not (OWNER.match(owner) and NAME.match(name)):
        raise ValueError(
            f"{repository!r} is not a GitHub repository: write owner/name, the owner in letters, digits and single "
            f"hyphens (at most 39), the name in letters, digits, '.', '_' and '-' (at most 100)"
        )
    return repository


def site(repository: str) -> str:
    """Where GitHub Pages publishes the book: owner.github.io/name, or the root if the name is owner.github.io."""
    owner, _, name = repository.partition("/")
    host = f"https://{owner.lower()}.github.io/"
    return host if name.lower() == f"{owner.lower()}.github.io" else f"{host}{name}/"


def carried(text: str, old: str, new: str) -> str:
    """`text` with the addresses of `old`, repository and site, turned into those of `new`."""
    text = text.replace(site(old), site(new))
    hosts = r"(?<=github\.com/)|(?<=research\.google\.com/github/)|(?<=githubusercontent\.com/)"
    ends_here = r"(?![\w-]|\.(?!git\b)\w)"
    return re.sub(f"(?:{hosts}){re.escape(old)}{ends_here}", new, text)


def places(root: Path = ROOT) -> Iterator[Path]:
    """The files that show the address."""
    for pattern in PLACES:
        for path in sorted(root.glob(pattern)):
            if not any(part.startswith((".", "_build")) for part in path.relative_to(root).parts):
                yield path


def set_address(repository: str, root: Path = ROOT) -> list[Path]:
    """Carry `repository` to every place, and give the files that changed."""
    new, old = validated(repository), current(root)
    changed = []
    for path in places(root):
        text = path.read_bytes().decode("utf-8")
        # Text that was written while the address was unset follows too.
        mended = carried(carried(text, UNSET, new), old, new) if new != UNSET else carried(text, old, new)
        if mended != text:
            write(path, mended)
            changed.append(path)
    return changed


def write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old text or the new, never half of one."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text.encode("utf-8"))
    try:
        os.chmod(file.name, path.stat().st_mode)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"The address is {current()}. To change it: make address REPOSITORY=owner/name")
        return 0 if not arguments else 2
    try:
        changed = set_address(arguments[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in changed:
        print(f"changed {path.relative_to(ROOT)}")
    print(f"The address is {current()}; the book will be at {site(current())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
