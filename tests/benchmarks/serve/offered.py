"""Requests at a rate: python -m tests.benchmarks.serve.offered PORT RATE SECONDS CLIENTS < BODY.

Unlike wrk's clients, which send as soon as they are answered, these keep to a rate as far as there are clients that do
not wait for an answer. A time counts from when a request was sent. Prints the times of all answers by their status, and
how often there was each answer, as JSON.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from typing import Any, NamedTuple

import uvloop

from tests.benchmarks.serve.processes import LOAD_CORE, python

LENGTH = re.compile(rb"content-length: (\d+)")
PATIENCE_S = 30.0  # for the last answers


class Offered(NamedTuple):
    """What became of the requests."""

    times_s: dict[int, list[float]]  # of the answers, by status; 0 for a connection that was lost
    answers: Counter[str]  # how often each was given


def offer(port: int, body: bytes, *, rate: float, seconds: float, clients: int) -> Offered:
    """Offers so many requests a second from a process of its own."""
    command = python("-m", "tests.benchmarks.serve.offered", *map(str, (port, rate, seconds, clients)))
    with tempfile.TemporaryFile() as output:
        subprocess.run(command, input=body, stdout=output, check=True)
        output.seek(0)
        said = json.load(output)
    return Offered({int(status): times for status, times in said["times_s"].items()}, Counter(said["answers"]))


class Connection(asyncio.Protocol):
    """One connection, with one request at a time.

    Args:
        found: gets what becomes of each request.
        free: gets the connection whenever it may send again.
    """

    def __init__(self, found: Offered, free: deque["Connection"]) -> None:
        self._found = found
        self._free = free
        self._received = b""
        self._sent: float | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes) -> None:
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, answer = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if separator and length and len(answer) >= int(length[1]):
            self._received = b""
            self._note(int(head[9:12]))
            self._found.answers[answer.decode()] += 1
            self._free.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._note(0)

    def _note(self, status: int) -> None:
        if self._sent is not None:
            self._found.times_s[status].append(time.perf_counter() - self._sent)
            self._sent = None


async def send_all(port: int, request: bytes, rate: float, seconds: float, clients: int) -> Offered:
    """Sends so many requests a second."""
    loop = asyncio.get_running_loop()
    found = Offered(defaultdict(list), Counter())
    free: deque[Connection] = deque()  # all take turns: the service closes a connection that is not used
    for _ in range(clients):
        _, connection = await loop.create_connection(lambda: Connection(found, free), "127.0.0.1", port)
        free.append(connection)
    start = time.perf_counter()
    number = 0
    while (now := time.perf_counter() - start) < seconds:
        while free and number < now * rate:
            free.popleft().send(request)
            number += 1
        number = max(number, int(now * rate) - clients)  # what nobody was there to send is not made up for
        await asyncio.sleep(0.0005)
    patience = time.monotonic() + PATIENCE_S
    while len(free) < clients and time.monotonic() < patience:
        await asyncio.sleep(0.05)
    return found


def main() -> None:
    port, rate, seconds, clients = (float(argument) for argument in sys.argv[1:])
    os.sched_setaffinity(0, LOAD_CORE)
    content = sys.stdin.buffer.read()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(content)
    found = uvloop.run(send_all(int(port), head + content, rate, seconds, int(clients)))
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    main()
