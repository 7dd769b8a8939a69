"""Run chapters from top to bottom and store their text outputs in place.

    python -m tools.run_notebooks book/forward.ipynb ...

A chapter that fails is left as it was.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools.clean_notebooks import write
from tools.install_cell import put_first

CELL_TIMEOUT = 600


def run(notebook: NotebookNode, folder: Path) -> None:
    """Execute every cell in a fresh kernel that works in `folder`."""
    NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def main(paths: list[str]) -> int:
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        put_first(notebook)
        start = time.perf_counter()
        try:
            run(notebook, path.parent)
        except CellExecutionError as error:
            print(f"{path}: stopped, the file is as it was\n{error}", file=sys.stderr)
            return 1
        write(notebook, path)
        print(f"{path}: {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
