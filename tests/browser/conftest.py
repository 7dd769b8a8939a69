"""The built book in a headless Chromium, served from a port of this machine."""

import shutil
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import pytest
from built_book import HTML

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDTHS = {"phone": 360, "desk": 1440}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def book():
    """Address of the built book."""
    if chromium() is None:
        pytest.skip("browser tests need Chromium: install the package chromium")
    if not (HTML / "book" / "intro.html").exists():
        pytest.skip("browser tests need the built book: run make book first")
    handler = partial(QuietHandler, directory=HTML)
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # a page opens more connections at once than the default of 5


class QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="session")
def browser(book):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def contexts(browser):
    """One window for each width and theme."""
    windows = {}
    for width, theme in product(WIDTHS, ("light", "dark")):
        window = browser.new_context(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=theme)
        window.set_default_timeout(180_000)
        windows[width, theme] = window
    return windows


@dataclass
class Visit:
    """A page that is open, and what went wrong while it was."""

    page: object
    complaints: list[str] = field(default_factory=list)

    def open(self, address: str, origin: str) -> None:
        page, complaints = self.page, self.complaints
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("console", lambda m: complaints.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("response", lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda request: self.check(request.url, origin))
        page.goto(address, wait_until="load")
        self.settle()

    def check(self, url: str, origin: str) -> None:
        if not url.startswith((origin, "data:", "blob:")):
            self.complaints.append(f"external: {url}")

    def settle(self) -> None:
        """Wait until formulas are typeset and sliders are drawn."""
        self.page.evaluate("async () => { await window.MathJax?.startup?.promise }")
        self.page.wait_for_function(
            """() => document.querySelectorAll('.noUi-handle[aria-label]').length
                  >= document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]').length"""
        )


@pytest.fixture
def visit(book, contexts):
    """A function that opens a page at a width and in a theme."""
    opened = []

    def go(path: str, width: str = "desk", theme: str = "light", origin: str = book) -> Visit:
        visited = Visit(contexts[width, theme].new_page())
        opened.append(visited)
        visited.open(origin + path, origin)
        return visited

    yield go
    for visited in opened:
        visited.page.close()
