"""What every chapter keeps to, beyond what ruff and nbval look at.

    python -m tools.lint_notebooks book/*.ipynb

A rule is a function from a notebook to complaints. `RULES` lists them; `tests/test_notebooks.py` runs them over the
book and sees each of them fail on a bad notebook.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import nbformat
from nbformat import NotebookNode
from nbformat.validator import iter_validate

from tools import install_cell
from tools.clean_notebooks import clean, text

Rule = Callable[[NotebookNode], Iterator[str]]

MOST_LINES = 25
MOST_OUTPUT = 20_000  # characters that one cell may print into the repository
MOST_IGNORED = 0.1
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
NEEDS_REASON = NOT_COMPARED | {"raises-exception", "nbval-raises-exception"}
REASON = re.compile(r"^# (not compared|skipped|raises): \S", re.MULTILINE)
NBVAL_COMMENT = re.compile(r"^\s*#+\s*(NBVAL|PYTEST_VALIDATE)_\w+", re.MULTILINE)
OPENING = ("What you will be able to do", "What you need", "Time")
CLOSING = ("Summary", "What commonly goes wrong", "Exercises")
DIRECTIVE = re.compile(
    r"^\s*(?:`{3,}|:{3,})\{(?P<name>exercise|solution)(?P<gate>-start|-end)?\}[ \t]*(?P<argument>.*)\n"
    r"(?P<options>(?:\s*:[\w-]+:.*\n)*)",
    re.MULTILINE,
)


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """Position and cell of every code cell."""
    return [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def prose(notebook: NotebookNode) -> str:
    """All Markdown of the notebook."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown") + "\n"


def figures(cell: NotebookNode) -> int:
    """How many Matplotlib figures the cell shows."""
    return sum("<Figure size" in output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def sliders(cell: NotebookNode) -> list[ast.Call]:
    """The calls of `slider(...)` in the cell."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).split(".")[-1] == "slider"]


def install_cell_first(notebook: NotebookNode) -> Iterator[str]:
    """The install cell comes first, is the same in every chapter and is hidden in the book."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "code" or first.source != install_cell.source():
        yield "the first cell is not the install cell: run python -m tools.install_cell on this notebook"
    elif first.metadata.get("tags") != ["remove-cell"]:
        yield "the install cell is not hidden: its tags must be ['remove-cell']"


def executed(notebook: NotebookNode) -> Iterator[str]:
    """Every code cell has run once, from top to bottom: nbval compares nothing where the count is missing."""
    for count, (i, cell) in enumerate(code_cells(notebook), start=1):
        if not cell.source.strip():
            yield f"cell {i} is empty"
        if cell.execution_count != count:
            yield f"cell {i} has execution count {cell.execution_count}, not {count}: run make notebooks"
            return


def stored_clean(notebook: NotebookNode) -> Iterator[str]:
    """No pictures, no widget state, no execution metadata, and no output that is too long to read."""
    copy = nbformat.from_dict(notebook)
    clean(copy)
    if text(copy) != text(notebook):
        yield "holds pictures, widget state or metadata: run python -m tools.clean_notebooks on this notebook"
    for i, cell in code_cells(notebook):
        if "data:image/" in str(cell.outputs):
            yield f"cell {i} stores a picture inside a text output"
        if (length := len(str(cell.outputs))) > MOST_OUTPUT:
            yield f"cell {i} stores {length} characters of output, more than {MOST_OUTPUT}"


def valid(notebook: NotebookNode) -> Iterator[str]:
    """The file follows the notebook format, and every cell has an id of its own."""
    for error in iter_validate(notebook):
        yield f"not a valid notebook: {error.message}"
    ids = Counter(cell.get("id") for cell in notebook.cells)
    for cell_id in (cell_id for cell_id, count in ids.items() if count > 1):
        yield f"several cells have the id {cell_id!r}"


def figures_described(notebook: NotebookNode) -> Iterator[str]:
    """A cell that shows a figure shows one, with a name, a caption and alternative text."""
    for i, cell in code_cells(notebook):
        if not (shown := figures(cell)):
            continue
        if shown > 1:
            yield f"cell {i} shows {shown} figures: give each a cell, so that each has its caption"
        mystnb = cell.metadata.get("mystnb", {})
        figure, image = mystnb.get("figure", {}), mystnb.get("image", {})
        if not figure.get("name", "").startswith("fig-"):
            yield f"cell {i} shows a figure with no name: mystnb.figure.name must begin with 'fig-'"
        if not figure.get("caption", "").strip():
            yield f"cell {i} shows a figure with no caption: set mystnb.figure.caption"
        if not image.get("alt", "").strip():
            yield f"cell {i} shows a figure with no alternative text: set mystnb.image.alt"
        if not cell.source.rstrip().endswith("plt.show()"):
            yield f"cell {i} shows a figure but does not end with plt.show()"


def sliders_described(notebook: NotebookNode) -> Iterator[str]:
    """A slider says what it moves and shows, and a caption or the text directly below says what to see."""
    following = dict(pairwise(range(len(notebook.cells))))
    for i, cell in code_cells(notebook):
        for call in sliders(cell):
            for name in {"description", "alt"} - {keyword.arg for keyword in call.keywords}:
                yield f"cell {i} calls slider(...) with no {name}="
            below = notebook.cells[following[i]] if i in following else None
            captioned = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "").strip()
            if not captioned and (below is None or below.cell_type != "markdown"):
                yield f"cell {i} has a slider with neither a caption nor a text cell directly below"


def exceptions_reasoned(notebook: NotebookNode) -> Iterator[str]:
    """A cell that nbval does not compare, or that may raise, says why; and there are few of them."""
    cells = code_cells(notebook)
    for i, cell in cells:
        if NBVAL_COMMENT.search(cell.source):
            yield f"cell {i} speaks to nbval in a comment: use a tag, so that the lint can count it"
        marked = NEEDS_REASON & set(cell.metadata.get("tags", []))
        if marked and not (REASON.search(cell.source) or str(cell.metadata.get("reason", "")).strip()):
            yield f"cell {i} is tagged {sorted(marked)} with no reason: begin a comment with '# not compared: '"
    ignored = sum(bool(NOT_COMPARED & set(cell.metadata.get("tags", []))) for _, cell in cells)
    if ignored and ignored >= MOST_IGNORED * len(cells):
        yield f"{ignored} of {len(cells)} code cells are not compared: fewer than {MOST_IGNORED:.0%} may be"


def quiet(notebook: NotebookNode) -> Iterator[str]:
    """No cell failed, unless it was meant to, and none wrote to stderr."""
    for i, cell in code_cells(notebook):
        meant = {"raises-exception", "nbval-raises-exception"} & set(cell.metadata.get("tags", []))
        for output in cell.outputs:
            if output.output_type == "error" and not meant:
                yield f"cell {i} stores an error: {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"cell {i} writes to stderr: {output.text[:80]!r}"


def short_cells(notebook: NotebookNode) -> Iterator[str]:
    """A code cell is short; what is long belongs into ddpm_lib."""
    for i, cell in code_cells(notebook):
        lines = len(cell.source.splitlines())
        if lines > MOST_LINES and not install_cell.is_install_cell(cell):
            yield f"cell {i} has {lines} lines, more than {MOST_LINES}"


def exercises_solved(notebook: NotebookNode) -> Iterator[str]:
    """Every exercise has a label and a hidden solution; every gate that opens closes."""
    exercises, solved, gates = [], [], Counter()
    for match in DIRECTIVE.finditer(prose(notebook)):
        name, gate, argument = match["name"], match["gate"] or "", match["argument"].strip()
        options = dict(re.findall(r":([\w-]+):[ \t]*(.*)", match["options"]))
        gates[name] += {"-start": 1, "-end": -1}.get(gate, 0)
        if gate == "-end":
            continue
        if name == "exercise":
            if "label" not in options:
                yield f"the exercise {argument!r} has no :label:"
            exercises.append(options.get("label", "").strip())
        else:
            if "dropdown" not in options.get("class", ""):
                yield f"the solution of {argument!r} is not hidden: give it :class: dropdown"
            solved.append(argument)
    for name in (name for name, open_gates in gates.items() if open_gates):
        yield f"a {{{name}-start}} has no {{{name}-end}}, or the other way round"
    for label, count in Counter(exercises).items():
        if label and count > 1:
            yield f"the exercise label {label!r} is given {count} times"
    for label in exercises:
        if label and label not in solved:
            yield f"the exercise {label!r} has no solution"
    for label in solved:
        if label not in exercises:
            yield f"a solution belongs to {label!r}, which is no exercise of this chapter"


def opened_and_closed(notebook: NotebookNode) -> Iterator[str]:
    """The chapter says at once what it gives, needs and takes; it ends with summary, pitfalls and exercises."""
    words = prose(notebook)
    if len(re.findall(r"^# \S", words, re.MULTILINE)) != 1:
        yield "the chapter must have exactly one title (a heading that begins with a single #)"
    before_first_section = re.split(r"^## ", words, maxsplit=1, flags=re.MULTILINE)[0]
    for phrase in OPENING:
        if phrase not in before_first_section:
            yield f"the opening does not say {phrase!r}"
    headings = [heading.strip() for heading in re.findall(r"^## (.*)$", words, re.MULTILINE)]
    for heading in CLOSING:
        if heading not in headings:
            yield f"there is no section '## {heading}'"


RULES: tuple[Rule, ...] = (
    install_cell_first,
    executed,
    stored_clean,
    valid,
    figures_described,
    sliders_described,
    exceptions_reasoned,
    quiet,
    short_cells,
    exercises_solved,
    opened_and_closed,
)


def complaints(notebook: NotebookNode) -> list[str]:
    """What all rules say about a notebook."""
    return [f"{rule.__name__}: {complaint}" for rule in RULES for complaint in rule(notebook)]


def main(paths: list[str]) -> int:
    found = 0
    for path in paths:
        for complaint in complaints(nbformat.read(path, as_version=4)):
            print(f"{path}: {complaint}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
