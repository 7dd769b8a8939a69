"""The book's Sphinx extension and the fetching of its scripts, without building a book."""

import base64
import hashlib
import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import vendor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from bookshell import badges, equations, theme  # noqa: E402

EQUATION = (
    '<div class="math" id="equation-eq-a"><span class="eqno">(1.2)'
    '<a class="headerlink" href="#equation-eq-a" title="Link to this equation">#</a></span></div>'
)


@pytest.fixture
def app(monkeypatch):
    """As much of Sphinx as the extension asks for; the equation eq-a has the test test_a."""
    monkeypatch.setattr(equations, "checks", lambda root: {"eq-a": [SimpleNamespace(name="test_a")]})
    builder = SimpleNamespace(get_relative_uri=lambda page, target: "checks.html")
    return SimpleNamespace(srcdir=str(ROOT), builder=builder, config=SimpleNamespace(html_title="Book"))


def test_badge_leads_to_the_check(app):
    context = {"body": EQUATION}
    badges.add_badges(app, "book/forward", "page.html", context, None)
    assert 'class="eq-badge" href="checks.html#check-eq-a"' in context["body"]
    assert 'aria-label="checked: equation (1.2) by test_a"' in context["body"]


def test_no_badge_without_a_check(app):
    body = EQUATION.replace("eq-a", "eq-b")
    context = {"body": body}
    badges.add_badges(app, "book/forward", "page.html", context, None)
    assert context["body"] == body


def test_unchecked_equation_is_a_warning(app, monkeypatch):
    warnings = []
    monkeypatch.setattr(badges, "LOG", SimpleNamespace(warning=lambda *arguments, **_: warnings.append(arguments)))
    domain = SimpleNamespace(equations={"eq-a": ("book/forward", 1), "eq-b": ("book/forward", 2)})
    badges.warn_of_unchecked(app, SimpleNamespace(get_domain=lambda name: domain))
    assert [label for _, label, _ in warnings] == ["eq-b"]


def test_theme_options_keep_those_of_jupyter_book(app):
    config = SimpleNamespace(
        html_theme_options={"repository_url": "x", "navbar_persistent": ["y"]}, templates_path=[], html_title="Book"
    )
    theme.set_options(app, config)
    assert config.html_theme_options["repository_url"] == "x"
    assert config.html_theme_options["navbar_persistent"] == []


def test_repairs_of_the_page(app):
    context = {"body": '<summary aria-label="Toggle hidden content">x</summary><section id="proof-content"><pre>'}
    theme.repair(app, "book/forward", "page.html", context, object())
    assert context["body"] == '<summary>x</summary><section><pre tabindex="0">'


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_vendor_refuses_an_archive_with_another_hash():
    data = archive(a="1")
    right = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    vendor.verify(data, right, "a")
    with pytest.raises(SystemExit, match="Nothing was changed"):
        vendor.verify(data + b"0", right, "a")


def test_vendor_takes_only_what_is_wanted(tmp_path):
    data = archive(**{"LICENSE": "l", "dist/a.js": "a", "dist/b.map": "b"})
    vendor.unpack(data, {"strip": "dist", "files": ["LICENSE", "dist/*.js"]}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LICENSE", "a.js"]
    with pytest.raises(SystemExit, match="no file in the archive"):
        vendor.unpack(data, {"strip": "", "files": ["missing"]}, tmp_path)


def test_no_address_of_a_registry_is_pinned():
    assert "http" not in vendor.PINS.read_text(encoding="utf-8")
