import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chromium import EXECUTABLE, Watched, chromium
from tests.browser.chromium import watched as watched_page
from tests.service.store import make_settings
from trainer.config import Settings

# By default 5 s, which a machine that has much else to do may need for a page.
expect.set_options(timeout=30_000)


@dataclass
class Report:
    """What `make test-browser JSON=F` writes; the figures are measured for it alone."""

    console_errors: list[str] = field(default_factory=list)
    foreign_requests: list[str] = field(default_factory=list)
    accessibility: list[str] = field(default_factory=list)  # serious faults that axe-core found
    panels: list[dict[str, Any]] = field(default_factory=list)
    alerts_tested: list[str] = field(default_factory=list)
    cpu_percent: float | None = None  # of one core, for one open tab
    first_paint_ms: float | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--browser-json", type=Path, help="measure the page, too, and write what was seen to this file")


@pytest.fixture(scope="session")
def report_file(request: pytest.FixtureRequest) -> Path | None:
    return request.config.getoption("browser_json", default=None)


@pytest.fixture(scope="session")
def report(report_file: Path | None) -> Iterator[Report]:
    report = Report()
    yield report
    if report_file is not None:
        report_file.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Gone before other modules' tests: while Playwright runs, its event loop does, and there can be no other."""
    if EXECUTABLE is None:
        pytest.skip("there is no chromium (Debian's package of that name)")
    with chromium() as browser:
        yield browser


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose store does not exist yet."""
    return make_settings(tmp_path / "store")


@pytest.fixture
def watched(browser: Browser, report: Report) -> Iterator[Watched]:
    """A page that may ask its own host only."""
    with watched_page(browser) as found:
        yield found
        report.foreign_requests += found.foreign()
        report.console_errors += found.console_errors
    assert found.foreign() == []
