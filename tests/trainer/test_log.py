import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import structlog

from trainer.log import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    own = {name: logging.getLogger(name).level for name in ("trainer", "service")}
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level
    for name, before in own.items():
        logging.getLogger(name).setLevel(before)


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


def test_configuring_twice_does_not_say_everything_twice(lines: Callable[[], list[str]]) -> None:
    configure_logging("json")
    configure_logging("json")
    structlog.get_logger("trainer").info("once")
    assert len(lines()) == 1
