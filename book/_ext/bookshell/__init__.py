"""Sphinx extension of this book: the theme's repairs, and equations that name the tests that check them."""

from sphinx.application import Sphinx

from . import badges, checks, theme


def setup(app: Sphinx) -> dict:
    theme.setup(app)
    badges.setup(app)
    checks.setup(app)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
