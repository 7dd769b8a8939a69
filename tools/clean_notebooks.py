"""Keep in a notebook what a reader of a change needs: code, text, text outputs and execution counts.

    python -m tools.clean_notebooks book/*.ipynb            cleans in place
    python -m tools.clean_notebooks --check book/*.ipynb    only says which files are not clean

Pictures, widget state and execution metadata go: the book computes them when it is built. Text outputs and counts
stay: nbval compares every chapter with them.
"""

import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

KEPT_OUTPUT = ("text/plain", "text/html", "text/latex", "text/markdown")
KEPT_CELL_METADATA = ("tags", "mystnb", "reason")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def clean(notebook: NotebookNode) -> None:
    """Clean the notebook in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in KEPT_CELL_METADATA if key in cell.metadata})
        cell.source = cell.source.rstrip("\n")
        cell.pop("attachments", None)
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = NotebookNode()
            if "data" in output:
                output.data = NotebookNode({kind: output.data[kind] for kind in KEPT_OUTPUT if kind in output.data})
        if "outputs" in cell:
            cell.outputs = merged(cell.outputs)


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with pieces of one stream that the kernel happened to send apart put together again."""
    result: list[NotebookNode] = []
    for output in outputs:
        last = result[-1] if result else None
        if last and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def text(notebook: NotebookNode) -> str:
    """The notebook as the file that is committed."""
    return nbformat.writes(notebook, version=4, indent=1, sort_keys=True, ensure_ascii=False).rstrip("\n") + "\n"


def cleaned(path: str | Path) -> str:
    """The clean text of the notebook in `path`."""
    notebook = nbformat.read(path, as_version=4)
    clean(notebook)
    return text(notebook)


def write(notebook: NotebookNode, path: str | Path) -> None:
    """Clean the notebook and write it."""
    clean(notebook)
    Path(path).write_text(text(notebook), encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> int:
    only_check = "--check" in arguments
    unclean = 0
    for path in map(Path, (argument for argument in arguments if argument != "--check")):
        result = cleaned(path)
        if path.read_text(encoding="utf-8") != result:
            unclean += 1
            if only_check:
                print(f"{path}: not clean; mend it with: python -m tools.clean_notebooks {path}")
            else:
                path.write_text(result, encoding="utf-8", newline="\n")
                print(f"{path}: cleaned")
    return 1 if only_check and unclean else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
