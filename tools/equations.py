"""Which equations the book labels, and which tests check them.

An equation is labelled `$$ ... $$ (eq-forward-step)`, or by the `:label:` of a `{math}` directive. A test function
checks it when it carries `@pytest.mark.equation("eq-forward-step")`. Both lists are read from the text of the files:
nothing is imported and nothing is run.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})\s*(.*)")
LITERAL_DIRECTIVE = re.compile(r"\{(code|code-block|code-cell|literalinclude|sourcecode)\}")
LABEL_OPTION = re.compile(r"\s*:label:\s*(\S+)")
DOLLAR_MATH = re.compile(r"\$\$.*?\$\$(?:[ \t]*\(([^()\s]+)\))?", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """A test function that checks the equation `label`."""

    label: str
    path: str  # relative to the root, with forward slashes
    line: int  # where `source` begins
    name: str
    source: str  # the function with its decorators


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Name (`book/forward`) and Markdown text of every page of the book."""
    for path in sorted(Path(root, "book").rglob("*")):
        inside = path.relative_to(root)
        if path.suffix not in {".md", ".ipynb"} or any(part.startswith((".", "_")) for part in inside.parts):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield inside.with_suffix("").as_posix(), text


def labels_in(text: str) -> list[str]:
    """Labels of the equations in a Markdown text, in order; those shown inside code blocks do not count."""
    found: list[tuple[int, str]] = []
    visible: list[str] = []
    fences: list[tuple[str, bool, bool]] = []  # marker, whether the content is code, whether it is a math directive
    for number, line in enumerate(text.splitlines()):
        match = FENCE.match(line)
        marker, info = match.groups() if match else ("", "")
        if fences:
            opened, is_code, is_math = fences[-1]
            if marker.startswith(opened) and not info:
                fences.pop()
                visible.append("")
                continue
            if is_math and (option := LABEL_OPTION.match(line)):
                found.append((number, option[1]))
            if is_code or is_math:
                visible.append("")
                continue
        if marker and not (marker[0] == "`" and "`" in info):
            is_math = info.startswith("{math}")
            is_code = bool(LITERAL_DIRECTIVE.match(info)) or (marker[0] != ":" and not info.startswith("{"))
            fences.append((marker, is_code, is_math))
            line = ""
        visible.append(line)
    shown = "\n".join(visible)
    for match in DOLLAR_MATH.finditer(shown):
        if match[1]:
            found.append((shown.count("\n", 0, match.end()), match[1]))
    return [label for _, label in sorted(found, key=lambda pair: pair[0])]


def occurrences(root: Path) -> list[tuple[str, str]]:
    """Every labelled equation of the book with its page, in order, repeated labels included."""
    return [(label, page) for page, text in pages(root) for label in labels_in(text)]


def labels(root: Path) -> dict[str, str]:
    """The page (`book/forward`) of every labelled equation."""
    return dict(occurrences(root))


def checks(root: Path) -> dict[str, list[Check]]:
    """The tests that check each equation."""
    found: dict[str, list[Check]] = {}
    for path in sorted(Path(root, "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.equation"):
                    continue
                label = _label(decorator, path)
                line = min(d.lineno for d in node.decorator_list)
                source = dedent("\n".join(text.splitlines()[line - 1 : node.end_lineno]))
                check = Check(label, path.relative_to(root).as_posix(), line, node.name, source)
                found.setdefault(label, []).append(check)
    return found


def _label(decorator: ast.Call, path: Path) -> str:
    match decorator.args:
        case [ast.Constant(value=str(label))] if not decorator.keywords:
            return label
    raise ValueError(
        f"{path.name}:{decorator.lineno}: {ast.unparse(decorator)} must name one label, written out as a string"
    )
