"""Every page, on a phone and on a desk, in both themes."""

import re

import pytest
from built_book import AXE, HTML, pages

# Glyphs of formulas are drawn by style sheets and hold no text; what is read aloud is the MathML beside them.
WHOLE_PAGE = "{include: [['html']], exclude: [['mjx-math']]}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", ["phone", "desk"])
@pytest.mark.parametrize("path", [*pages(), "search.html", "genindex.html"])
def test_page_is_quiet_fits_and_is_accessible(visit, path, width, theme):
    visited = visit(path, width, theme)
    page = visited.page
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth") <= 0
    assert violations(page) == []
    assert visited.complaints == []


def violations(page) -> list[str]:
    if not AXE.exists():
        pytest.fail("axe-core is missing: run python tools/vendor.py")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(f"axe.run({WHOLE_PAGE}, {{resultTypes: ['violations']}})")["violations"]
    return [
        f"{violation['impact']} {violation['id']}: {' '.join(map(str, node['target']))} {node['html'][:120]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("path", pages())
def test_formulas_are_typeset_and_images_described(visit, path):
    page = visit(path).page
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert page.locator("article .math:not(:has(mjx-container))").all_inner_texts() == []
    alternatives = page.eval_on_selector_all("article img", "images => images.map(image => image.alt)")
    assert [alt for alt in alternatives if len(alt.split()) < 3 or re.search(r"\.(png|svg)$", alt)] == []


@pytest.mark.parametrize("path", pages())
def test_displayed_formulas_fit_a_phone(visit, path):
    page = visit(path, "phone").page
    page.evaluate("document.querySelectorAll('mjx-assistive-mml').forEach(copy => copy.remove())")
    wide = "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.parentElement.id)"
    assert page.eval_on_selector_all("div.math mjx-container", wide) == []


@pytest.mark.parametrize("path", pages())
def test_links_inside_the_book_lead_somewhere(book, path):
    page = HTML / path
    for href in re.findall(r'<a class="(?:reference internal|eq-badge)" href="([^"]+)"', page.read_text("utf-8")):
        file, _, anchor = href.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), href
        assert not anchor or f'id="{anchor}"' in target.read_text("utf-8"), href


@pytest.mark.parametrize("path", pages())
def test_numbered_equations_have_a_badge(book, path):
    text = (HTML / path).read_text("utf-8")
    assert text.count('class="eqno"') == text.count('class="eq-badge"')


def test_sidebar_opens_on_a_phone(visit):
    page = visit("book/forward.html", "phone").page
    link = page.locator('.bd-sidebar-primary a[href="backward.html"], dialog a[href="backward.html"]').first
    assert not link.is_visible()
    page.locator(".primary-toggle:visible").click()
    link.wait_for(state="visible")
    link.click()
    page.wait_for_url("**/book/backward.html")


def test_reference_preview_shows_the_equation(visit):
    page = visit("book/checks.html").page
    page.locator(".equation-check a").first.hover()
    page.locator(".preview mjx-container").first.wait_for(state="visible")
    page.keyboard.press("Escape")
    page.locator(".preview").wait_for(state="detached")


def test_search_finds_a_chapter(visit):
    page = visit("search.html?q=posterior").page
    page.locator("#search-results li a").first.wait_for(state="visible")
