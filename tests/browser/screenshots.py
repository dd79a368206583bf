"""Pictures of the page for the README: `python -m tests.browser.screenshots [FOLDER]`, from demos that run."""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests.browser.chromium import chromium, watched
from tests.browser.demo import demo

FOLDER = Path(__file__).parent / "screenshots"
FLIGHTS = ("--rows", "60000", "--rate", "800")
RODENTS = ("--task", "classification", "--rows", "20000", "--rate", "200")
LEARNED = 25_000  # rows, so that the rare labels have been seen and the lines have something to show
PATIENCE_MS = 300_000
MARGIN = 16
COLOURS = 128
FLIGHT = {
    "dep_delay": "45", "distance": "733", "carrier": "UA", "origin": "EWR", "dest": "ORD", "hour": "18",
    "precip": "0.1", "visib": "4", "wind_speed": "21",
}  # fmt: skip
RODENT = {"sex": "F", "weight": "45", "hindfoot_length": "36", "plot_type": "Control"}
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LOOKS = {
    "light": {"viewport": WIDE, "color_scheme": "light"},
    "dark": {"viewport": WIDE, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "light"},
}


def take(page: Page, url: str, record: dict[str, str], file: Path) -> None:
    """Asks for a prediction of a record and takes the whole page."""
    page.goto(url)
    page.locator("#live").wait_for(timeout=PATIENCE_MS)
    for name, value in record.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Predict").click()
    page.wait_for_timeout(3000)
    page.evaluate("document.activeElement.blur(); document.getElementById('fields').scrollTop = 0; scrollTo(0, 0)")
    # Wide ones end with the card of the prediction, so that they fit beside text.
    box = page.locator("#try").evaluate("form => form.parentElement.getBoundingClientRect().toJSON()")
    width = page.evaluate("innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": box["bottom"] + MARGIN} if width > PHONE["width"] else None
    page.screenshot(path=file, full_page=True, clip=clip)
    with Image.open(file) as picture:  # flat colours: a quarter of the bytes, and no eye sees it
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def wait_until_learned(page: Page, url: str, rows: int) -> None:
    page.goto(url)
    page.wait_for_function(
        "rows => Number(document.getElementById('samples').textContent.replaceAll(',', '')) >= rows",
        arg=rows,
        timeout=PATIENCE_MS,
    )


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        (Path(scratch) / "numbers").mkdir()
        with demo(Path(scratch) / "numbers", *FLIGHTS) as found, watched(browser) as waiting:
            wait_until_learned(waiting.page, found.url, LEARNED)
            for name, look in LOOKS.items():
                with watched(browser, **look) as seen:
                    take(seen.page, found.url, FLIGHT, folder / f"{name}.png")
                    assert seen.console_errors == [], seen.console_errors
        (Path(scratch) / "classes").mkdir()
        with demo(Path(scratch) / "classes", *RODENTS) as found, watched(browser) as waiting:
            wait_until_learned(waiting.page, found.url, LEARNED // 4)
            with watched(browser, **LOOKS["light"]) as seen:
                take(seen.page, found.url, RODENT, folder / "classes.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
