"""Log lines: one form for our own events and for other packages' records, on stderr."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from trainer.log import LogFormat, configure_logging

PROGRAM = """
import logging, sys
import structlog
from trainer.log import configure_logging
configure_logging(sys.argv[1])
own = structlog.stdlib.get_logger("trainer.loop")
own.debug("hidden")
own.info("trained", partition=3, offset=17)
logging.getLogger("uvicorn.error").info("hidden")
logging.getLogger("kafka.conn").warning("lost %s", "broker")
try:
    1 / 0
except ZeroDivisionError:
    own.exception("failed")
"""


def lines_of_a_program(log_format: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", PROGRAM, log_format], capture_output=True, text=True, check=True)
    assert not run.stdout
    assert "hidden" not in run.stderr
    return run.stderr.splitlines()


def test_json_is_one_object_a_line() -> None:
    for log_format in ("json", "auto"):  # no terminal reads it here
        trained, lost, failed = map(json.loads, lines_of_a_program(log_format))
        assert (trained["event"], trained["partition"], trained["offset"]) == ("trained", 3, 17)
        assert (trained["level"], trained["logger"]) == ("info", "trainer.loop")
        assert trained["timestamp"].endswith("Z")
        assert (lost["event"], lost["level"], lost["logger"]) == ("lost broker", "warning", "kafka.conn")
        assert failed["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_console_is_for_people() -> None:
    first = lines_of_a_program("console")[0]
    assert "trained" in first
    assert "partition=3" in first
    assert "\x1b" not in first  # no colours where no terminal reads


# In this process, where a terminal can be pretended


pytestmark = pytest.mark.usefixtures("logging_is_put_back")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What was written to stderr; nothing may be on stdout, which is for what commands answer."""

    def read() -> list[str]:
        out, err = capsys.readouterr()
        assert out == ""
        return [line for line in err.splitlines() if line]

    return read


def test_an_event_is_one_line_of_json_with_its_facts_as_keys(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    structlog.get_logger("trainer.loop").info("resumed", version=7, samples=96, path="a b\nc")
    (line,) = lines()
    event = json.loads(line)
    assert (event["event"], event["version"], event["samples"], event["path"]) == ("resumed", 7, 96, "a b\nc")
    assert (event["level"], event["logger"]) == ("info", "trainer.loop")
    assert event["timestamp"].endswith("Z")


def test_what_other_packages_log_has_the_same_form_from_warning_on(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    logging.getLogger("kafka.client").info("nobody asked")
    logging.getLogger("uvicorn.error").warning("%s is away", "it", extra={"partition": 3})
    logging.getLogger("trainer.loop").info("own")
    logging.getLogger("service.app").debug("too fine")
    events = [json.loads(line) for line in lines()]
    assert [(event["event"], event["level"]) for event in events] == [("it is away", "warning"), ("own", "info")]
    assert (events[0]["logger"], events[0]["partition"]) == ("uvicorn.error", 3)


def test_an_exception_stays_on_its_line(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    try:
        raise KeyError("offset")
    except KeyError:
        structlog.get_logger("trainer").exception("stopped")
    (line,) = lines()
    assert json.loads(line)["exception"][0]["exc_type"] == "KeyError"


@pytest.mark.parametrize(
    ("format", "terminal", "json_"),
    [("auto", False, True), ("auto", True, False), ("console", False, False), ("json", True, True)],
)
def test_the_form_is_for_whoever_reads_it(
    format: LogFormat, terminal: bool, json_: bool, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure_logging(format)
    structlog.get_logger("trainer").info("resumed", version=7)
    (line,) = lines()
    assert line.startswith("{") == json_
    assert "resumed" in line
    assert ("\x1b[" in line) == (terminal and not json_)


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_traceback_shows_no_values_among_which_are_passwords(
    format: LogFormat, terminal: bool, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure_logging(format)

    def connect(options: dict[str, str]) -> None:
        raise ConnectionError("refused")

    try:
        connect({"sasl_plain_password": "".join(["hun", "ter2"])})  # not as the line of code reads, which is shown
    except ConnectionError:
        structlog.get_logger("trainer").exception("stopped")
    said = "\n".join(lines())
    assert "refused" in said
    assert "connect" in said
    assert "hunter2" not in said


def test_a_line_of_json_begins_with_what_people_read_first(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    structlog.get_logger("trainer").info("resumed", version=7)
    (line,) = lines()
    assert list(json.loads(line)) == ["timestamp", "level", "event", "version", "logger"]


def test_what_json_does_not_know_is_written_as_text(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    structlog.get_logger("trainer").info("resumed", store=Path("/snapshots"))
    (line,) = lines()
    assert json.loads(line)["store"] == "/snapshots"


def test_configuring_twice_does_not_say_everything_twice(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    configure_logging("json")
    structlog.get_logger("trainer").info("once")
    assert len(lines()) == 1
