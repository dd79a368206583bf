"""A running `tailstream demo` to look at."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.broker import free_port
from trainer.config import load

WAIT_S = 240.0  # on a machine that has much else to do


@dataclass(frozen=True)
class Demo:
    """Where it answers, and the process that started its parts."""

    url: str
    metrics_port: int  # the trainer's
    process: psutil.Process

    def part(self, *command: str) -> psutil.Process:
        """The process of a part, by words of its command."""
        (found,) = [child for child in self.process.children() if set(command) <= set(child.cmdline())]
        return found


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[Demo]:
    """A demo once it predicts; stopped at the end."""
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
        settings = load(folder / "demo" / "tailstream.toml")
        yield Demo(f"http://127.0.0.1:{port}", settings.trainer.metrics_port, psutil.Process(process.pid))
    finally:
        process.terminate()  # SIGINT is ignored by what a shell started in the background
        process.wait(WAIT_S)
