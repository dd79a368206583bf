"""The events that open pages show: first all of it, then what changes; they end with the service, at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service import live
from service.history import FIRST_STEP_S
from service.watcher import Watcher
from tests.service.conftest import running, until
from tests.service.store import METRICS, write_snapshot
from trainer.config import Settings
from trainer.snapshot import SnapshotStore


@contextmanager
def events(client: httpx.Client) -> Iterator[Iterator[tuple[str, Any]]]:
    """Kind and data of each event, as they come."""
    with client.stream("GET", "/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield _parsed(response.iter_lines())


def _parsed(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for line in lines:
        kind = line.removeprefix("event: ")
        yield kind, json.loads(next(lines).removeprefix("data: "))
        assert next(lines) == ""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "INTERVAL_S", 0.02)


def test_a_page_first_hears_everything(client: httpx.Client, settings: Settings) -> None:
    with events(client) as found:
        kind, page = next(found)
        assert kind == "page"
        assert list(page["features"]) == list(settings.record_schema.features)
        assert (page["label"], page["topic"]) == ("arr_delay", "flights")
        assert next(found)[0] == "history"
        kind, model = next(found)
        assert kind == "model"
        assert (model["version"], model["samples"], model["lag_records"]) == (1, 320, 42)
        assert (model["loss"], model["metrics"]) == ("bmc", METRICS)
        assert model["newest"] == [{"time_s": 1.7e9, "label": 3.0, "prediction": 4.0}]
        kind, now = next(found)
        assert kind == "now"
        assert (now["trouble"], now["not_ready"], now["pinned"]) == (None, None, None)
        assert now["age_s"] >= 0
        assert now["freshness_s"] > 1e6
        assert next(found)[0] == "now"  # the model has not changed, so it is not sent again


def test_every_page_hears_of_the_first_snapshot_and_of_the_next(empty: Settings) -> None:
    with running(empty) as client, events(client) as one, events(client) as other:
        for found in (one, other):
            assert [next(found)[0] for _ in range(3)] == ["page", "history", "model"]
            kind, now = next(found)
            assert (kind, now["age_s"]) == ("now", None)
            assert "no snapshot" in now["trouble"]
        for version in (1, 2):
            write_snapshot(empty, seed=version)
            for found in (one, other):
                model = next(data for kind, data in found if kind == "model")
                assert model["version"] == version


def test_a_beat_is_looked_up_once_for_all_pages_and_not_at_all_for_none(settings: Settings) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    async def beats(page: AsyncGenerator[bytes]) -> None:
        for _ in range(10):
            await anext(page)

    async def watch() -> None:
        watched = live.Live(Watcher(SnapshotStore(settings.store.path), settings), {}, look)
        following = asyncio.create_task(watched.follow())
        pages = [watched.events() for _ in range(5)]
        await asyncio.gather(*map(beats, pages))
        assert 9 <= looks <= 11
        for page in pages:
            await page.aclose()
        before = looks
        await asyncio.sleep(5 * live.INTERVAL_S)
        assert looks == before
        following.cancel()

    asyncio.run(watch())


def test_a_look_that_fails_is_logged_and_the_next_one_comes(settings: Settings) -> None:
    looks: list[str | None] = []

    def look() -> str | None:
        looks.append(None)
        if len(looks) == 2:
            raise OSError("on purpose")
        return None

    async def watch() -> None:
        watched = live.Live(Watcher(SnapshotStore(settings.store.path), settings), {}, look)
        following = asyncio.create_task(watched.follow())
        page = watched.events()
        for _ in range(5):
            await anext(page)
        following.cancel()

    with capture_logs() as said:
        asyncio.run(watch())
    assert [line["event"] for line in said] == ["the live page could not be brought up to date"]


def test_a_page_that_opens_hears_of_the_time_before(empty: Settings) -> None:
    for seed in (1, 2):
        write_snapshot(empty, seed=seed, drift_alarms=seed)
    store = SnapshotStore(empty.store.path)
    first, second = (store.manifest(version).created_s for version in store.versions())
    with running(empty) as client:
        until(lambda: _history(client) != {})
        history = _history(client)
    kept = [first, second] if second >= first + FIRST_STEP_S else [first]
    assert history["time_s"] == kept
    assert history["drift_alarms"] == [1, 2][: len(kept)]
    assert history["mae.0"] == [10.0] * len(kept)


def _history(client: httpx.Client) -> Any:
    with events(client) as found:
        return dict(next(found) for _ in range(2))["history"]


def test_more_pages_than_there_is_room_for_are_refused(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_STREAMS", 1)
    with events(client) as found:
        next(found)
        response = client.get("/events")
        assert response.status_code == 503
        assert "1 pages are open" in response.json()["detail"]
    until(lambda: client.get("/livez").status_code == 200)
