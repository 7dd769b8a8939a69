"""What `tools/equations.py` reads from the files: the labelled equations of every page, and the tests of each."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType

PAGE = "book/checks"  # the page that shows every check


def anchor(label: str) -> str:
    return f"check-{label}"


@cache
def scanner(root: Path) -> ModuleType:
    """The scanner is a script of the repository, not of an installed package: it is found beside the book."""
    sys.path.insert(0, str(root))
    try:
        from tools import equations
    finally:
        sys.path.remove(str(root))
    return equations


@cache
def checks(root: Path) -> dict[str, list]:
    """Label -> tests."""
    return scanner(root).checks(root)


@cache
def labels(root: Path) -> dict[str, str]:
    """Label -> page, in the order of each page."""
    return scanner(root).labels(root)
