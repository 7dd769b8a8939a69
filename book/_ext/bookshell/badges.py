"""The badge "checked" on every numbered equation, and a warning where there is nothing to link to."""

import html
import re

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

from . import equations

LOG = logging.getLogger(__name__)
NUMBER = re.compile(
    r'(<span class="eqno">\((?P<number>[^)<]*)\)'
    r'<a class="headerlink" href="#equation-(?P<label>[^"]+)"[^>]*>[^<]*</a>)(</span>)'
)


def add_badges(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    checks = equations.checks(app.srcdir)

    def with_badge(match: re.Match) -> str:
        label = match["label"]
        if label not in checks:
            return match[0]
        address = f"{app.builder.get_relative_uri(pagename, equations.PAGE)}#{equations.anchor(label)}"
        tests = ", ".join(check.name for check in checks[label])
        title = html.escape(f"checked: equation ({match['number']}) by {tests}", quote=True)
        badge = f'<a class="eq-badge" href="{address}" aria-label="{title}" title="{title}">checked</a>'
        return match[1] + badge + match[4]

    if context.get("body"):
        context["body"] = NUMBER.sub(with_badge, context["body"])


def warn_of_unchecked(app: Sphinx, env: BuildEnvironment) -> None:
    checks = equations.checks(app.srcdir)
    for label, (page, _) in env.get_domain("math").equations.items():
        if label not in checks:
            LOG.warning(
                "no test checks the equation %r: mark one with @pytest.mark.equation(%r)",
                label, label, location=page, type="bookshell", subtype="unchecked",
            )  # fmt: skip


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", add_badges)
    app.connect("env-check-consistency", warn_of_unchecked)
