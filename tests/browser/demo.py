"""A running `tailstream demo` to look at."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.broker import free_port

WAIT_S = 120.0


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[str]:
    """The address of its page, once it predicts."""
    port = free_port()
    output = folder / "demo.txt"
    command = [sys.executable, "-m", "service", "demo", "--port", str(port), "--data-dir", str(folder / "demo")]
    with output.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + WAIT_S
        while "first prediction" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(WAIT_S)
