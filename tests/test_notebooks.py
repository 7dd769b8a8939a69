"""Every chapter keeps the rules of the book, and every rule is able to fail."""

from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import equations, install_cell, lint_notebooks
from tools.clean_notebooks import clean, cleaned
from tools.lint_notebooks import RULES

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))

OPENING = """# Noise

```{admonition} Before you start
**What you will be able to do.** Add noise.

**What you need.** A coin.

**Time.** Read 1 minute, run 1 second.
```
"""
EXERCISES = """## Exercises

```{exercise} Heads
:label: ex-heads

How often?
```

```{solution} ex-heads
:class: dropdown

Half the time.
```
"""


@pytest.fixture
def chapter() -> NotebookNode:
    """A small chapter that keeps every rule."""
    figure = new_output("display_data", {"text/plain": "<Figure size 640x480 with 1 Axes>"})
    described = {"figure": {"name": "fig-coin", "caption": "A coin."}, "image": {"alt": "A round thing."}}
    notebook = new_notebook(
        cells=[
            new_markdown_cell(OPENING),
            new_code_cell("print(1)", outputs=[new_output("stream", text="1\n")]),
            new_code_cell("plot()\nplt.show()", outputs=[figure], metadata={"mystnb": described}),
            new_code_cell('slider(frames, labels, description="step", alt="A coin.")'),
            new_markdown_cell("Move it and see."),
            new_markdown_cell("## Summary\n\n## What commonly goes wrong\n"),
            new_markdown_cell(EXERCISES),
        ]
    )
    install_cell.put_first(notebook)
    clean(notebook)
    for count, (_, cell) in enumerate(lint_notebooks.code_cells(notebook), start=1):
        cell.execution_count = count
    return notebook


def replaced(notebook: NotebookNode, old: str, new: str) -> None:
    assert any(old in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)


def tagged(notebook: NotebookNode, *tags: str) -> None:
    notebook.cells[2].metadata.tags = list(tags)


def printed(notebook: NotebookNode, output: NotebookNode) -> None:
    notebook.cells[2].outputs.append(output)


# Each line: the rule, what its complaint says, and the smallest change that breaks it.
BROKEN = [
    ("install_cell_first", "not the install cell", lambda n: n.cells.pop(0)),
    ("install_cell_first", "not the install cell", lambda n: replaced(n, "import sys", "import sys, json")),
    ("install_cell_first", "not hidden", lambda n: n.cells[0].metadata.clear()),
    ("executed", "count None", lambda n: n.cells[3].update(execution_count=None)),
    ("executed", "count 7, not 2", lambda n: n.cells[2].update(execution_count=7)),
    ("executed", "empty", lambda n: n.cells[2].update(source="\n")),
    ("stored_clean", "pictures", lambda n: n.cells[3].outputs[0].data.update({"image/png": "iVBORw0KGgo="})),
    ("stored_clean", "widget state", lambda n: n.metadata.update(widgets={"state": {}})),
    ("stored_clean", "metadata", lambda n: n.cells[2].metadata.update(execution={"iopub.status.busy": "now"})),
    ("stored_clean", "inside a text output", lambda n: printed(n, new_output("stream", text="data:image/png;base64,"))),
    ("stored_clean", "characters of output", lambda n: printed(n, new_output("stream", text="1" * 20_001))),
    ("valid", "not a valid notebook", lambda n: n.cells[2].pop("source")),
    ("valid", "the id", lambda n: n.cells[2].update(id="install")),
    ("figures_described", "no name", lambda n: n.cells[3].metadata.mystnb.figure.pop("name")),
    ("figures_described", "no name", lambda n: n.cells[3].metadata.mystnb.figure.update(name="coin")),
    ("figures_described", "no caption", lambda n: n.cells[3].metadata.mystnb.figure.update(caption=" ")),
    ("figures_described", "no alternative text", lambda n: n.cells[3].metadata.mystnb.image.pop("alt")),
    ("figures_described", "no alternative text", lambda n: n.cells[3].metadata.clear()),
    ("figures_described", "2 figures", lambda n: n.cells[3].outputs.append(n.cells[3].outputs[0])),
    ("figures_described", "plt.show()", lambda n: replaced(n, "plot()\nplt.show()", "plot();")),
    ("sliders_described", "no description", lambda n: replaced(n, ', description="step"', "")),
    ("sliders_described", "no alt", lambda n: replaced(n, ', alt="A coin."', "")),
    ("sliders_described", "directly below", lambda n: n.cells.insert(5, new_code_cell("1"))),
    ("exceptions_reasoned", "no reason", lambda n: tagged(n, "nbval-skip")),
    ("exceptions_reasoned", "no reason", lambda n: tagged(n, "raises-exception")),
    ("exceptions_reasoned", "in a comment", lambda n: replaced(n, "print(1)", "# NBVAL_SKIP\nprint(1)")),
    ("exceptions_reasoned", "1 of 4", lambda n: tagged(n, "nbval-ignore-output")),
    ("quiet", "ValueError", lambda n: printed(n, new_output("error", ename="ValueError", evalue="no", traceback=[]))),
    ("quiet", "stderr", lambda n: printed(n, new_output("stream", name="stderr", text="careful"))),
    ("short_cells", "26 lines", lambda n: n.cells[2].update(source="a\n" * 26)),
    ("exercises_solved", "no :label:", lambda n: replaced(n, ":label: ex-heads\n", "")),
    ("exercises_solved", "has no solution", lambda n: replaced(n, "{solution} ex-heads", "{note}")),
    ("exercises_solved", "no exercise of this", lambda n: replaced(n, "{solution} ex-heads", "{solution} ex-tails")),
    ("exercises_solved", "not hidden", lambda n: replaced(n, ":class: dropdown", "")),
    ("exercises_solved", "2 times", lambda n: n.cells.append(n.cells[-1])),
    ("exercises_solved", "has no {solution-end}", lambda n: replaced(n, "{solution} ex", "{solution-start} ex")),
    ("opened_and_closed", "exactly one title", lambda n: replaced(n, "# Noise\n", "Noise\n")),
    ("opened_and_closed", "'What you need'", lambda n: replaced(n, "What you need", "Needed")),
    ("opened_and_closed", "'Time'", lambda n: replaced(n, "**Time.**", "")),
    ("opened_and_closed", "'## Summary'", lambda n: replaced(n, "## Summary", "## The end")),
    ("opened_and_closed", "'## What commonly goes wrong'", lambda n: replaced(n, "commonly goes", "went")),
]


def test_a_good_chapter_keeps_every_rule(chapter):
    assert lint_notebooks.complaints(chapter) == []


@pytest.mark.parametrize(("name", "says", "change"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_the_rule_sees_its_fault(chapter, name, says, change):
    change(chapter)
    rule = getattr(lint_notebooks, name)
    assert any(says in complaint for complaint in rule(chapter))


def test_every_rule_is_seen_to_fail():
    assert {rule.__name__ for rule in RULES} == {name for name, _, _ in BROKEN}


@pytest.mark.parametrize("where", ["comment", "metadata"])
def test_a_reason_may_stand_in_a_comment_or_in_the_metadata(chapter, where):
    tagged(chapter, "raises-exception")
    if where == "comment":
        chapter.cells[2].source = "# raises: t = 0 is the data\n" + chapter.cells[2].source
    else:
        chapter.cells[2].metadata.reason = "t = 0 is the data"
    assert list(lint_notebooks.exceptions_reasoned(chapter)) == []


def test_cleaning_keeps_text_and_counts_and_is_stable(chapter, tmp_path):
    path = tmp_path / "chapter.ipynb"
    chapter.cells[3].outputs[0].data["image/png"] = "iVBORw0KGgo="
    chapter.cells[2].outputs = [new_output("stream", text=piece) for piece in ("1\n", "2\n")]
    chapter.metadata.widgets = {"state": {}}
    nbformat.write(chapter, path)
    path.write_text(cleaned(path), encoding="utf-8")
    result = nbformat.read(path, as_version=4)
    assert [cell.execution_count for _, cell in lint_notebooks.code_cells(result)] == [1, 2, 3, 4]
    assert [output.text for output in result.cells[2].outputs] == ["1\n2\n"]
    assert result.cells[3].outputs[0].data == {"text/plain": "<Figure size 640x480 with 1 Axes>"}
    assert "widgets" not in result.metadata
    assert cleaned(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_chapter_keeps_the_rule(path, rule):
    assert list(rule(nbformat.read(path, as_version=4))) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_chapter_is_stored_clean(path):
    assert cleaned(path) == path.read_text(encoding="utf-8"), "run python -m tools.clean_notebooks on this chapter"


def test_figure_names_are_unique():
    names = Counter(
        cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for path in CHAPTERS
        for cell in nbformat.read(path, as_version=4).cells
    )
    assert [name for name, count in names.items() if name and count > 1] == []


def test_equation_labels_are_unique():
    counts = Counter(label for label, _ in equations.occurrences(ROOT))
    assert [label for label, count in counts.items() if count > 1] == []


def test_every_labelled_equation_is_checked():
    checked = equations.checks(ROOT)
    assert {label: page for label, page in equations.labels(ROOT).items() if label not in checked} == {}


def test_every_check_belongs_to_a_labelled_equation():
    labelled = equations.labels(ROOT)
    assert {label: found for label, found in equations.checks(ROOT).items() if label not in labelled} == {}


PAGE = """
$$a$$ (eq-inline-fence)

```python
shown = "$$b$$ (eq-shown)"
```

````{prf:proof}
$$
c
$$ (eq-in-proof)

```{math}
:label: eq-directive
d
```

```
$$e$$ (eq-shown-in-proof)
```
````

:::{exercise}
:label: ex-not-an-equation
$$f$$ and $$g$$ (eq-colon-fence)
:::
"""


def test_the_scan_finds_labels_and_not_code():
    assert equations.labels_in(PAGE) == ["eq-inline-fence", "eq-in-proof", "eq-directive", "eq-colon-fence"]


def test_the_scan_reads_pages_and_tests(tmp_path):
    (tmp_path / "book" / "_build").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "book" / "notation.md").write_text("$$a$$ (eq-a)\n")
    (tmp_path / "book" / "_build" / "copy.md").write_text("$$a$$ (eq-a)\n")
    notebook = new_notebook(cells=[new_markdown_cell("$$b$$ (eq-b)"), new_code_cell('"$$c$$ (eq-c)"')])
    nbformat.write(notebook, tmp_path / "book" / "forward.ipynb")
    source = '@pytest.mark.equation("eq-b")\n@pytest.mark.equation("eq-a")\ndef test_b():\n    assert True'
    (tmp_path / "tests" / "test_b.py").write_text(f"import pytest\n\n\n{source}\n")
    assert equations.labels(tmp_path) == {"eq-b": "book/forward", "eq-a": "book/notation"}
    found = equations.checks(tmp_path)
    assert found == {label: [equations.Check(label, "tests/test_b.py", 4, "test_b", source)] for label in found}
    assert set(found) == {"eq-a", "eq-b"}


def test_the_scan_refuses_a_label_that_it_cannot_read(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_b.py").write_text("@pytest.mark.equation(LABEL)\ndef test_b():\n    pass\n")
    with pytest.raises(ValueError, match=r"test_b.py:1: pytest.mark.equation\(LABEL\) must name one label"):
        equations.checks(tmp_path)
