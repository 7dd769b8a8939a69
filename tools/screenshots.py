"""Photograph pages of the built book, at the widths of a desk and of a phone, in the light and in the dark theme.

    python tools/screenshots.py FOLDER [PAGE ...]         (a page: book/forward.html)

Without pages it takes every one of the book. It needs Chromium on the machine.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HTML = Path(__file__).resolve().parent.parent / "_build" / "html"
WIDTHS = {"desk": (1440, 900), "phone": (360, 740)}


def main(folder: str, *pages: str) -> None:
    pages = pages or sorted(str(path.relative_to(HTML)) for path in HTML.glob("book/*.html"))
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            for name, (width, height) in WIDTHS.items():
                view = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                for page in pages:
                    view.goto((HTML / page).as_uri(), wait_until="load")
                    view.wait_for_timeout(1500)  # formulas and sliders draw themselves after the page has loaded
                    target = Path(folder, f"{Path(page).stem}-{name}-{theme}.png")
                    view.screenshot(path=target, full_page=True)
                    print(target)
                view.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
