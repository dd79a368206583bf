"""A real process: it says where it listens, stops cleanly, and says why it cannot start."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.serve import STOP_S, bind, serve
from tests.service.store import instance, make_settings, write_snapshot
from trainer.config import Settings
from trainer.errors import ConfigError

PROGRAM = """
import sys
from service.serve import serve
from trainer.config import Settings
from trainer.log import configure_logging
configure_logging("json")
serve(Settings.model_validate_json(sys.stdin.read()))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = make_settings(tmp_path / "store")
    write_snapshot(settings)
    return settings


@pytest.fixture
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    with started(settings) as process:
        yield process


@contextmanager
def started(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A service in a process of its own; killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(settings.model_dump_json(by_alias=True))
        process.stdin.close()
        yield process
        if process.poll() is None:
            process.kill()


def events(process: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    assert process.stderr is not None
    for line in process.stderr:
        yield json.loads(line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_is_anything_that_answers_is_an_orderly_end_too(
    process: subprocess.Popen[str], number: signal.Signals
) -> None:
    log = events(process)
    assert next(log)["event"] == "serving"
    process.send_signal(number)
    assert list(log) == []
    assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_exit_code_0(process: subprocess.Popen[str], number: signal.Signals) -> None:
    log = events(process)
    serving = next(log)
    assert serving["event"] == "serving"
    with httpx.Client(base_url=str(serving["url"]), timeout=20) as client:
        # The port is bound before the model is loaded: a request then waits instead of being refused.
        assert client.post("/predict", json=instance(0)).status_code == 200
        process.send_signal(number)
        assert process.wait(20) == 0
    assert [event["event"] for event in log][-2:] == ["model follows the newest snapshot", "stopped"]


def test_pages_that_are_open_do_not_delay_the_end(process: subprocess.Popen[str]) -> None:
    url = str(next(events(process))["url"])
    with httpx.Client(base_url=url, timeout=20) as client, client.stream("GET", "/events") as one:
        with client.stream("GET", "/events") as other:
            lines = [stream.iter_lines() for stream in (one, other)]
            assert [next(stream) for stream in lines] == ["event: page"] * 2
            process.send_signal(signal.SIGTERM)
            # Each ends as an answer does, not by a connection that breaks, and before uvicorn would cut them off.
            for stream in lines:
                assert list(stream)
        assert process.wait(STOP_S) == 0
    assert [event["event"] for event in events(process)][-2:] == ["model follows the newest snapshot", "stopped"]


def test_a_taken_port_is_said(settings: Settings) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        service = settings.service.model_copy(update={"port": port})
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}"):
            serve(settings.model_copy(update={"service": service}))


def test_an_address_of_another_machine_is_said(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7:0"):
        bind("192.0.2.7", 0)


def test_without_keys_other_hosts_are_kept_out_from_the_start(settings: Settings) -> None:
    service = settings.service.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match="API key"):
        serve(settings.model_copy(update={"service": service}))
