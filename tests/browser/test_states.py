"""The page in every state, light, dark and at phone width: axe-core finds no serious fault, nothing is cut off."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import Watched
from tests.browser.chromium import watched as watched_page
from tests.browser.conftest import Report
from tests.service.conftest import running
from tests.service.store import METRICS, learned, make_settings, write_learned, write_snapshot
from trainer.config import Settings

pytestmark = pytest.mark.timeout(300)

LIGHT = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE = {"width": 360, "height": 740}
CONTRAST = {"resultTypes": ["violations"], "runOnly": ["color-contrast"]}
REGIONS = {
    "low": -50.0,
    "high": 50.0,
    "rows": [1, 20, 400, 30, 2],
    **{name: [9.0, 5.0, 2.0, 5.0, None] for name in ("0", "1", "median")},
}
NEWEST = [{"time_s": 1.7e9 + i, "label": 2.0 * i - 40, "prediction": 1.5 * i - 30} for i in range(40)]


@pytest.fixture
def page(browser: Browser, report: Report) -> Iterator[Page]:
    with watched_page(browser, **LIGHT) as found:
        yield found.page
        report.foreign_requests += found.foreign()
    assert found.foreign() == []


def is_sound(page: Page, report: Report) -> None:
    """No serious fault in the light, none of contrast in the dark, nothing wider than the window of a phone."""
    faults = Axe().run(page).response["violations"]
    page.emulate_media(color_scheme="dark")
    faults += Axe().run(page, options=CONTRAST).response["violations"]
    page.emulate_media(color_scheme="light")
    serious = [
        f"{fault['id']} ({fault['impact']}): {fault['help']}: {[node['html'][:200] for node in fault['nodes']]}"
        for fault in faults
        if fault["impact"] in ("serious", "critical")
    ]
    report.accessibility += serious
    assert serious == []
    for size in (PHONE, LIGHT["viewport"]):
        page.set_viewport_size(size)
        wide, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= window


def with_regions() -> dict[str, Any]:
    return {window: {**found, "regions": REGIONS} for window, found in METRICS.items()}


def fresh(settings: Settings, seed: int = 0, **changes: Any) -> None:
    write_snapshot(settings, seed=seed, metrics=with_regions(), newest=NEWEST, newest_append_s=time.time(), **changes)


def test_live(settings: Settings, page: Page, report: Report) -> None:
    fresh(settings, seed=1)
    fresh(settings, seed=2)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#status")).to_have_text("live")
        expect(page.locator("#answer .point")).to_be_visible()
        expect(page.locator("#versions tr")).to_have_count(2)
        is_sound(page, report)
        expect(page.locator("#drift-legend")).to_be_hidden()
        fresh(settings, seed=3, drift_alarms=1)
        expect(page.locator("#drift-legend")).to_be_visible()


def test_classes(tmp_path: Path, page: Page, report: Report) -> None:
    settings = make_settings(tmp_path / "store", task="classification")
    newest = [{"time_s": 1.0, "label": "late", "prediction": "on time"}]
    write_learned(settings, learned(settings, 128), newest=newest)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#answer .point")).to_be_visible()
        expect(page.locator("#newest li")).to_have_text("✗ late, not on time")
        is_sound(page, report)


def test_before_the_first_snapshot_and_after_it(settings: Settings, page: Page, report: Report) -> None:
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#status")).to_have_text("waiting")
        expect(page.locator("#empty")).to_contain_text("there is no snapshot in")
        expect(page.locator("#live")).to_be_hidden()
        is_sound(page, report)
        fresh(settings)
        expect(page.locator("#live")).to_be_visible()
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.locator("#answer .point")).to_be_visible()


def test_when_the_trainer_is_gone(
    settings: Settings, page: Page, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.live.age_s", lambda manifest: 340.0)
    fresh(settings, lag_records=1200)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#status")).to_have_text("trainer silent")
        expect(page.locator("#notice")).to_contain_text("No new snapshot for 6 min, though 1,200 records were waiting")
        expect(page.locator("#live")).to_be_visible()
        is_sound(page, report)


def test_when_the_service_is_gone_and_comes_back(settings: Settings, page: Page, report: Report) -> None:
    fresh(settings)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#status")).to_have_text("live")
    expect(page.locator("#status")).to_have_text("no connection")
    expect(page.locator("#notice")).to_contain_text("What is shown is how things were before")
    is_sound(page, report)


def test_when_a_key_is_asked_for(tmp_path: Path, page: Page, report: Report) -> None:
    (tmp_path / "keys").write_text("alice:a-long-key-1\n")
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "keys"))
    fresh(settings)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#key-form")).to_be_visible()
        is_sound(page, report)
        page.keyboard.press("Tab")
        page.get_by_label("API key").fill("a-long-key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("live")


def test_by_keyboard_everything_is_reached_and_seen_to_be(settings: Settings, page: Page) -> None:
    fresh(settings, seed=1)
    fresh(settings, seed=2)
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.get_by_role("button", name="Roll back to version 1")).to_be_visible()
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, seen = page.evaluate(
                """() => {
                  const at = document.activeElement;
                  const shown = at.matches("input[type=radio]") ? at.nextElementSibling : at;
                  return [at.id || at.name || at.textContent, getComputedStyle(shown).outlineStyle !== "none"];
                }"""
            )
            if name in reached or not seen:
                assert seen or name.strip().startswith("Tailstream"), f"{name}: where the focus is cannot be seen"
                break
            reached.append(name)
    for needed in ("API", "Metrics", "window", "followed", "field-0", "balance", "interval", "Predict", "Roll back"):
        assert needed in reached, reached


def test_the_page_of_the_api_asks_no_other_host(settings: Settings, watched: Watched) -> None:
    fresh(settings)
    with running(settings) as client:
        watched.page.goto(f"{client.base_url}/docs")
        expect(watched.page.locator(".opblock").first).to_be_visible()
    assert watched.console_errors == []
