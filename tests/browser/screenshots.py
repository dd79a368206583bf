"""Pictures of the page for the README: `python -m tests.browser.screenshots [FOLDER]`, from a demo that runs."""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page

from tests.browser.chromium import chromium, watched
from tests.browser.demo import demo

FOLDER = Path(__file__).parents[2] / "docs"
ROWS = "60000"
RATE = "1500"  # a second: the lines have something to show by the time all are learned
SHOWN_S = 30.0
FLIGHT = {
    "dep_delay": "45", "distance": "733", "carrier": "UA", "origin": "EWR", "dest": "ORD", "hour": "18",
    "precip": "0.1", "visib": "4", "wind_speed": "21",
}  # fmt: skip
LOOKS = {
    "page-light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "page-dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def fill_in(page: Page) -> None:
    for name, value in FLIGHT.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Balance", exact=False).first.fill("0.5")
    page.get_by_role("button", name="Predict").click()
    page.evaluate("document.activeElement.blur(); document.getElementById('fields').scrollTop = 0; scrollTo(0, 0)")


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        demo(Path(scratch), "--rows", ROWS, "--rate", RATE) as url,
        chromium() as browser,
    ):
        for name, look in LOOKS.items():
            with watched(browser, **look) as found:
                found.page.goto(url)
                found.page.locator("#live").wait_for()
                fill_in(found.page)
                found.page.wait_for_timeout(SHOWN_S * 1000)
                found.page.screenshot(path=folder / f"{name}.png", full_page=True)
                assert found.console_errors == [], found.console_errors


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
