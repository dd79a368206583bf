"""A real Chromium, headless, that notes whatever a page should not do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

EXECUTABLE = shutil.which("chromium")
# Of its own accord Chromium asks hosts outside for updates; the page alone is to be watched.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@dataclass
class Watched:
    """A page, and what it did."""

    page: Page
    console_errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def foreign(self) -> list[str]:
        """Requests to another host than the page's own; it is the first that was asked for."""
        own = "{0.scheme}://{0.netloc}/".format(urlsplit(self.requests[0])) if self.requests else ""
        return [url for url in self.requests if not url.startswith((own, "data:"))]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, **context: Any) -> Iterator[Watched]:
    """A page of a context of its own; `context` is what Playwright's new_context takes."""
    opened = browser.new_context(**context)
    found = Watched(opened.new_page())
    found.page.on("console", lambda m: found.console_errors.append(m.text) if m.type == "error" else None)
    found.page.on("pageerror", lambda error: found.console_errors.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request.url))
    try:
        yield found
    finally:
        opened.close()
