"""A real Chromium, headless, that notes whatever a page should not do."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.service.store import make_settings
from trainer.config import Settings

CHROMIUM = shutil.which("chromium")
# Of its own accord Chromium asks hosts outside for updates; the page alone is to be watched.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@dataclass
class Watched:
    """A page, and what it did."""

    page: Page
    console_errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium (Debian's package of that name)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose store does not exist yet."""
    return make_settings(tmp_path / "store")


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    context = browser.new_context()
    found = Watched(context.new_page())
    found.page.on("console", lambda m: found.console_errors.append(m.text) if m.type == "error" else None)
    found.page.on("pageerror", lambda error: found.console_errors.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request.url))
    yield found
    context.close()
