"""What signals do to a trainer, each in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.process import ABORTED, OVERDUE

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
# Waits for the stop, says so, and goes on for as long as its standard input is open: a clean end closes it.
STOPPING = """
import sys
import structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
from trainer.process import _stop_on_signals
with _stop_on_signals(float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.wait(0.05):
        pass
    print("stopping", flush=True)
    sys.stdin.read()
"""


@contextmanager
def started(grace_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", STOPPING, str(grace_s)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            until(process, "ready")
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert any(line.strip() == word for line in process.stdout), f"it ended without {word!r}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_clean_stop(number: signal.Signals) -> None:
    with started(PATIENCE_S) as process:
        process.send_signal(number)
        until(process, "stopping")
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second: signal.Signals) -> None:
    with started(PATIENCE_S) as process:
        process.send_signal(signal.SIGTERM)
        until(process, "stopping")
        process.send_signal(second)
        assert process.wait(PATIENCE_S / 2) == ABORTED == 130


def test_a_stop_that_takes_longer_than_its_grace_is_ended() -> None:
    with started(0.2) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == OVERDUE == 3
