"""Repairs of sphinx-book-theme 1.3 and of the extensions that write the page, each with its reason."""

import html
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

OPTIONS = {
    # The default is a second search button. Its header bar holds a hidden twin of the sidebar's toggle, and the
    # theme's scripts bind the twin: on a phone the sidebar would not open.
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "show_toc_level": 2,
}

REPAIRS = [
    # A label that contradicts the visible text: the text alone names the control.
    (re.compile(r'<summary aria-label="[^"]*">'), "<summary>"),
    # An entry outside the list of a bibliography role.
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
    # The same id in every theorem, exercise and solution of a page.
    (re.compile(r' id="(?:proof|exercise|solution)-content"'), ""),
    # Code that scrolls sideways must be reachable without a mouse.
    (re.compile(r"<pre>"), '<pre tabindex="0">'),
]


def set_options(app: Sphinx, config: Config) -> None:
    # From here, as html_theme_options in _config.yml would replace what Jupyter Book itself puts there.
    config.html_theme_options = {**config.html_theme_options, **OPTIONS, "logo": {"text": config.html_title}}
    # Beside the theme's own templates: the one that leaves out a script (see there).
    config.templates_path.append(str(Path(__file__).parent / "templates"))


def repair(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    if doctree is None:  # search and index pages have no front matter to describe them
        title = re.sub(r"<[^>]+>", "", context.get("title") or pagename)
        what = html.escape(f"{title}: {app.config.html_title}", quote=True)
        context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{what}">'
    body = context.get("body")
    if body:
        for pattern, replacement in REPAIRS:
            body = pattern.sub(replacement, body)
        context["body"] = body


def setup(app: Sphinx) -> None:
    app.connect("config-inited", set_options)
    app.connect("html-page-context", repair)
