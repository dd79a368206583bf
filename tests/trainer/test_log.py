"""Log lines: one form for our own events and for other packages' records, on stderr."""

import json
import subprocess
import sys

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


def lines(log_format: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", PROGRAM, log_format], capture_output=True, text=True, check=True)
    assert not run.stdout
    assert "hidden" not in run.stderr
    return run.stderr.splitlines()


def test_json_is_one_object_a_line() -> None:
    for log_format in ("json", "auto"):  # no terminal reads it here
        trained, lost, failed = map(json.loads, lines(log_format))
        assert (trained["event"], trained["partition"], trained["offset"]) == ("trained", 3, 17)
        assert (trained["level"], trained["logger"]) == ("info", "trainer.loop")
        assert trained["timestamp"].endswith("Z")
        assert (lost["event"], lost["level"], lost["logger"]) == ("lost broker", "warning", "kafka.conn")
        assert failed["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_console_is_for_people() -> None:
    first = lines("console")[0]
    assert "trained" in first
    assert "partition=3" in first
    assert "\x1b" not in first  # no colours where no terminal reads
