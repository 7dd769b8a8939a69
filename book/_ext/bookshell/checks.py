"""The directive `{equation-checks}`: every labelled equation with the full source of the tests that check it."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

from . import equations


class formula(nodes.Element):
    """Stands for a copy of the equation `label`, which may be on a page not read yet."""


class EquationChecks(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        root = self.env.srcdir
        checks = equations.checks(root)
        checked: dict[str, list[str]] = {}
        for label, page in equations.labels(root).items():
            if label in checks:
                checked.setdefault(page, []).append(label)
        reading_order = [page for page in self.env.external_site_map if page in checked]
        sections = []
        for page in reading_order:
            section = self.section(page)
            for label in checked[page]:
                section.extend(self.entry(label, checks[label]))
            sections.append(section)
        return sections

    def section(self, page: str) -> nodes.section:
        chapter = PurePosixPath(page).name
        section = nodes.section(ids=[f"checks-{chapter}"])
        section += nodes.title(text=chapter.replace("_", " ").capitalize())
        return section

    def entry(self, label: str, checks: list) -> Iterator[nodes.Node]:
        heading = nodes.paragraph(ids=[equations.anchor(label)], classes=["equation-check"])
        heading += nodes.Text("Equation ")
        reference = addnodes.pending_xref(
            refdomain="math", reftype="eq", reftarget=label, refdoc=self.env.docname, refwarn=True
        )
        reference += nodes.literal(text=label)
        heading += reference
        yield heading
        yield formula(label=label)
        for check in checks:
            self.env.note_dependency(check.path)
            place = nodes.paragraph(classes=["equation-test"])
            place += nodes.literal(text=check.name)
            place += nodes.Text(" in ")
            place += nodes.literal(text=f"{check.path}:{check.line}")
            yield place
            yield nodes.literal_block(check.source, check.source, language="python")


class CopyFormulas(SphinxPostTransform):
    """Put each equation beside its test, without number or label."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs) -> None:
        math = self.env.get_domain("math")
        for placeholder in list(self.document.findall(formula)):
            math.data["has_equations"][self.env.docname] = True  # so that the page loads MathJax
            label = placeholder["label"]
            known = math.equations.get(label)
            placeholder.replace_self(self.copy(label, known[0]) if known else [])

    def copy(self, label: str, page: str) -> list[nodes.Node]:
        for block in self.env.get_doctree(page).findall(nodes.math_block):
            if block.get("label") == label:
                return [nodes.math_block(block.rawsource, block.astext(), nowrap=False, number=None, label=None)]
        return []


def setup(app: Sphinx) -> None:
    app.add_node(formula)
    app.add_directive("equation-checks", EquationChecks)
    app.add_post_transform(CopyFormulas)
