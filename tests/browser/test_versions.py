"""Rolling back from the page, in a real browser."""

from pathlib import Path

from playwright.sync_api import expect

from tests.browser.chromium import Watched
from tests.service.conftest import running, until
from tests.service.store import make_settings, write_snapshot
from trainer.config import Settings


def test_a_version_is_rolled_back_to_and_let_go(settings: Settings, watched: Watched) -> None:
    for seed in (1, 2, 3):
        write_snapshot(settings, seed=seed)
    page = watched.page
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#status")).to_have_text("live")
        expect(page.locator("#versions tr")).to_have_count(3)
        page.get_by_role("button", name="Roll back to version 1").click()
        expect(page.locator("#version")).to_have_text("#1")
        expect(page.locator("#status")).to_have_text("pinned")
        assert client.get("/model").json()["pinned"] == 1
        expect(page.get_by_role("button", name="Use version 3")).to_be_visible()
        page.get_by_role("button", name="Follow the newest").press("Enter")
        expect(page.locator("#version")).to_have_text("#3")
        expect(page.locator("#follow")).to_be_hidden()
        until(lambda: client.get("/model").json()["pinned"] is None)
    assert watched.console_errors == []


def test_the_page_asks_for_the_key_before_it_rolls_back(tmp_path: Path, watched: Watched) -> None:
    (tmp_path / "keys").write_text("alice:a-long-key-1\n")
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "keys"))
    for seed in (1, 2):
        write_snapshot(settings, seed=seed)
    page = watched.page
    with running(settings) as client:
        page.goto(str(client.base_url))
        expect(page.locator("#versions tr")).to_have_count(0)
        page.get_by_label("API key").fill("a-long-key-1")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name="Roll back to version 1").click()
        expect(page.locator("#version")).to_have_text("#1")
    # Chromium itself notes each answer 401, which the page cannot keep it from.
    assert {text for text in watched.console_errors if "401 (Unauthorized)" not in text} == set()
    watched.console_errors.clear()
