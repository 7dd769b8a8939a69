"""Sliders move pictures with no kernel: from a server and from the file system."""

import pytest
from built_book import HTML, pages

SHOWN = "card => [...card.querySelectorAll('img')].find(image => image.offsetParent).src"


def cards(page):
    """The cards of the page's sliders."""
    return page.locator(".widget-subarea:has(.noUi-handle)").all()


def wait_for_another(page, card, picture: str) -> str:
    page.wait_for_function(f"([card, before]) => ({SHOWN})(card) !== before", arg=[card.element_handle(), picture])
    return card.evaluate(SHOWN)


def move_every_slider(page) -> int:
    for card in cards(page):
        handle = card.locator(".noUi-handle")
        height, first = card.bounding_box()["height"], card.evaluate(SHOWN)
        handle.focus()
        at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
        wait_for_another(page, card, first)
        assert card.bounding_box()["height"] == pytest.approx(height, abs=1), "the page jumps when the slider moves"
    return len(cards(page))


def has_slider(path: str) -> bool:
    return "application/vnd.jupyter.widget-view+json" in (HTML / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("width", ["desk", "phone"])
@pytest.mark.parametrize("path", pages())
def test_every_slider_moves_by_keyboard_and_by_play(book, visit, path, width):
    if not has_slider(path):
        return
    visited = visit(path, width)
    page = visited.page
    move_every_slider(page)
    for card in cards(page):
        first = card.evaluate(SHOWN)
        card.get_by_role("button", name="Back to the start").click()
        card.get_by_role("button", name="Play").click()
        second = wait_for_another(page, card, first)
        wait_for_another(page, card, second)
        card.get_by_role("button", name="Pause").click()
    assert all(handle.get_attribute("aria-label") != "value" for handle in page.locator(".noUi-handle").all())
    assert visited.complaints == []


@pytest.mark.parametrize("path", ["book/forward.html", "book/sampling.html"])
def test_chapter_has_a_slider(book, path):
    assert has_slider(path)


def test_chapter_works_from_the_file_system(visit):
    visited = visit("book/forward.html", origin=HTML.as_uri() + "/")
    assert move_every_slider(visited.page) > 0
    assert visited.page.locator("mjx-container").count() > 0
    assert visited.complaints == []
