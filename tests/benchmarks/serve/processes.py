"""Servers in processes of their own on one core, and wrk on another."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

START_S = 90.0
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = {CORES[0]}, {CORES[-1]}
REPORT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local file = io.open("{body}", "rb")
wrk.body = file:read("*all")
file:close()
done = function(summary, latency, requests)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format('\\n{{"requests": %d, "us": %d, "p99_us": %d, "failed": %d, "refused": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(99.0), failed, summary.errors.status))
end
"""


class Load(NamedTuple):
    """What wrk measured."""

    requests: int
    requests_per_s: float
    p99_ms: float
    failed: int  # connections, reads, writes, timeouts, and answers that are not 2xx


def cpu_s(pid: int) -> float:
    """CPU time that a server has taken so far, its children's too."""
    server = psutil.Process(pid)
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(of.user + of.system for of in times)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


@contextmanager
def on_cores(
    command: Sequence[str], log: Path, port: int | None = None, cores: set[int] = SERVER_CORE
) -> Iterator[int]:
    """A process, once it answers at a port if it has one; gives its id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        deadline = time.monotonic() + START_S
        while port is not None and not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        # A server may have children: all of them are in its session.
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def wrk(port: int, body: bytes, clients: int, seconds: int) -> Load:
    """Load by so many clients, each with one request at a time."""
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("wrk makes the load, and it is not installed: apt install wrk")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(body)
        (Path(folder) / "report.lua").write_text(REPORT.format(body=Path(folder) / "body"))
        options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "-s", f"{folder}/report.lua"]
        run = subprocess.run(
            [program, *options, f"http://127.0.0.1:{port}/predict"],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, LOAD_CORE),
        )
    said = json.loads(run.stdout.strip().splitlines()[-1])
    return Load(
        said["requests"], said["requests"] / said["us"] * 1e6, said["p99_us"] / 1e3, said["failed"] + said["refused"]
    )
