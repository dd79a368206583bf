"""Several processes at one address: one sum of metrics, one pinned version, and none is missed when it dies."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from service.serve import STOP_S
from tests.service.conftest import until
from tests.service.store import instance, make_settings, write_snapshot
from tests.service.test_serve import events, started
from trainer.config import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = make_settings(tmp_path_factory.mktemp("store"), workers=2)
    write_snapshot(settings, seed=1)
    write_snapshot(settings, seed=2)
    return settings


@pytest.fixture(scope="module")
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    with started(settings) as process:
        yield process


@pytest.fixture(scope="module")
def base_url(process: subprocess.Popen[str]) -> str:
    return str(next(events(process))["url"])


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # one that has just died
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def predict(base_url: str) -> int:
    """The version that answers a client of its own."""
    with httpx.Client(base_url=base_url, timeout=20, headers={"Connection": "close"}) as client:
        return int(client.post("/predict", json=instance(0)).raise_for_status().json()["model_version"])


def predictions(base_url: str) -> float:
    text = httpx.get(f"{base_url}/metrics", headers={"Connection": "close"}, timeout=20).text
    (line,) = [line for line in text.splitlines() if line.startswith("tailstream_predictions_total ")]
    return float(line.split()[1])


def test_each_answers_and_is_counted_and_a_dead_one_is_replaced(process: subprocess.Popen[str], base_url: str) -> None:
    assert predict(base_url) == 2
    first, second = workers(process)
    for stopped in (first, second):
        # The other one alone can answer now, once this one has been seen to stand still.
        stopped.suspend()
        until(lambda stopped=stopped: stopped.status() == psutil.STATUS_STOPPED)  # type: ignore[misc]
        for _ in range(3):
            predict(base_url)
        stopped.resume()
    assert predictions(base_url) == 7
    first.kill()
    until(lambda: len(workers(process)) == 2 and first not in workers(process))
    second.suspend()
    assert predict(base_url) == 2  # by the new one, once it is ready
    assert predictions(base_url) == 8  # what the dead one answered is not forgotten
    second.resume()


def test_all_follow_the_pinned_version(process: subprocess.Popen[str], base_url: str) -> None:
    for version, path in ((1, "/models/1/activate"), (2, "/models/latest/activate")):
        assert httpx.post(f"{base_url}{path}", timeout=20).status_code == 200
        for other in workers(process):
            other.suspend()
            until(lambda version=version: predict(base_url) == version)  # type: ignore[misc]
            other.resume()


def test_a_signal_ends_all(process: subprocess.Popen[str], base_url: str) -> None:
    all_workers = workers(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_S) == 0
    assert not any(worker.is_running() for worker in all_workers)


def test_workers_end_when_the_process_that_started_them_is_killed(settings: Settings) -> None:
    with started(settings) as process:
        predict(str(next(events(process))["url"]))
        all_workers = workers(process)
        process.kill()
        until(lambda: not any(worker.is_running() for worker in all_workers))


def test_workers_that_cannot_start_end_the_service(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "store", workers=2, api_keys_file=str(tmp_path / "absent"))
    with started(settings) as process:
        assert process.stderr is not None
        assert process.wait(60) != 0
        assert "api_keys_file" in process.stderr.read()
