"""The first code cell of every chapter: it installs `ddpm_lib` where it is missing, as in Colab.

    python -m tools.install_cell book/*.ipynb

puts the cell first in each notebook, or renews it there.
"""

import sys

import nbformat
from nbformat import NotebookNode

from tools.address import current
from tools.clean_notebooks import write

TEMPLATE = """\
# Install ddpm_lib where it is missing, as in Colab. A torch or numpy that is already there stays as it is.
import os
import subprocess
import sys
from importlib import metadata, util

REPOSITORY = "https://github.com/{repository}"

if util.find_spec("ddpm_lib") is None:
    package = os.environ.get("DDPM_LIB", f"ddpm-lib @ {{REPOSITORY}}/archive/refs/heads/main.zip")
    if "--not--set" in package:
        raise RuntimeError("ddpm_lib is missing, and this copy of the book has no address: set DDPM_LIB to its wheel.")
    keep = [f"{{name}}=={{metadata.version(name)}}" for name in ("torch", "numpy") if util.find_spec(name)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *keep], check=True)"""


def source() -> str:
    """The text of the cell, with the address of the repository."""
    return TEMPLATE.format(repository=current())


def is_install_cell(cell: NotebookNode) -> bool:
    """Whether a cell is the install cell, of this or of another address or version."""
    return cell.cell_type == "code" and cell.source.startswith(TEMPLATE.split(".", 1)[0])


def put_first(notebook: NotebookNode) -> None:
    """Make the install cell the first cell of the notebook."""
    if not (notebook.cells and is_install_cell(notebook.cells[0])):
        notebook.cells.insert(0, nbformat.v4.new_code_cell(id="install"))
    notebook.cells[0].source = source()
    notebook.cells[0].metadata = NotebookNode(tags=["remove-cell"])


def main(paths: list[str]) -> None:
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        put_first(notebook)
        write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
