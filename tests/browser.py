"""A real browser for tests of pages: Debian's Chromium, driven by Playwright. Without it those tests are skipped."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Starts the browser. Skips the test if there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("Debian's package chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page in the browser, with what it asked for and what it complained about."""

    def __init__(self, browser: Any, address: str, *, width: int = 1280, scheme: str = "light") -> None:
        """Opens the page, and waits until a report says that all its figures are drawn."""
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    @property
    def addresses_asked(self) -> list[str]:
        """Addresses that were asked for beside data in the page itself."""
        return [address for address in self.requests if not address.startswith(("data:", "blob:"))]

    @property
    def num_figures(self) -> int:
        """Number of figures in which something is drawn."""
        lines = ".scatterlayer .trace path, .barlayer path"
        return self.page.evaluate(
            f"[...document.querySelectorAll('.plot')].filter(p => p.querySelector('{lines}')).length"
        )

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def keep_screenshot(self, name: str) -> None:
        """Keeps a picture of the whole page, to look at after the test."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
