"""Real servers on free ports, in threads of the test's own process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.serve import Server, bind, server_config, url
from tests.service.store import TASKS, make_settings, write_snapshot
from trainer.config import Settings

PATIENCE_S = 20.0
for_both_tasks = pytest.mark.parametrize("task", TASKS)


@contextmanager
def running(settings: Settings) -> Iterator[httpx.Client]:
    """A server of these settings, and a client of it."""
    with bind(settings.service.host, 0) as listener:
        server = Server(server_config(create_app(settings), settings.service))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started
            with httpx.Client(base_url=url(listener), timeout=PATIENCE_S) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Waits for a condition that must come true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings whose store holds one snapshot; for tests that leave it as it is."""
    settings = make_settings(tmp_path_factory.mktemp("store"))
    write_snapshot(settings)
    return settings


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    with running(settings) as client:
        yield client


@pytest.fixture
def task() -> str:
    """What is learned; tests marked `for_both_tasks` are run with each."""
    return "regression"


@pytest.fixture
def empty(tmp_path: Path, task: str) -> Settings:
    """Settings whose store does not exist yet."""
    return make_settings(tmp_path / "store", task=task)
