"""Processes that a command starts, watches and stops: each in a session of its own, its output in a file."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trainer.errors import DemoError

LOG_TAIL_LINES: Final = 12
POLL_S: Final = 0.05


class Child:
    """A running process.

    Attributes:
        name: what it is called in messages.
        log: the file that takes its output.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches the parent alone, which stops its children in the right order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def check(self) -> None:
        """Looks whether it still runs.

        Raises:
            DemoError: it has ended; the message has the end of its log.
        """
        if not self.alive:
            raise DemoError(f"the {self.name} ended with code {self._process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log, indented."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (it said nothing)"

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self._process.kill()
        self._process.wait()

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and after `grace_s` SIGKILL; waits for the end."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def leftovers(self) -> int:
        """How many processes of its session outlived it."""
        deadline = time.monotonic() + 1.0  # whoever is still being reaped is no orphan
        while (alive := _session_size(self._process.pid)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return alive


def _session_size(session: int) -> int:
    """Living processes of a session, zombies not counted."""
    size = 0
    try:
        entries = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:  # no /proc: ask for the group as a whole
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return 0
        return 1
    for pid in entries:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        state, _, _, own_session = stat.rpartition(")")[2].split()[:4]
        size += int(own_session) == session and state != "Z"
    return size


def stop_as_by_ctrl_c() -> None:
    """Makes SIGTERM, and SIGHUP of a closed terminal, end the command as Ctrl-C does: it stops what it started."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
