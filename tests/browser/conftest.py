from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import EXECUTABLE, Watched, chromium
from tests.browser.chromium import watched as watched_page
from tests.service.store import make_settings
from trainer.config import Settings


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if EXECUTABLE is None:
        pytest.skip("there is no chromium (Debian's package of that name)")
    with chromium() as browser:
        yield browser


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose store does not exist yet."""
    return make_settings(tmp_path / "store")


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    with watched_page(browser) as found:
        yield found
