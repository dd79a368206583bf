"""Requests at a rate: python -m tests.benchmarks.serve.offered PORT ROWS RATE SECONDS CLIENTS.

Unlike wrk's clients, which send as soon as they are answered, these keep to a rate as far as there are clients that do
not wait for an answer. Prints the times of all answers by their status, as JSON.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections import defaultdict
from typing import Any

import uvloop

from tests.benchmarks.serve.net import body
from tests.benchmarks.serve.processes import LOAD_CORE

LENGTH = re.compile(rb"content-length: (\d+)")


class Connection(asyncio.Protocol):
    """One connection, with one request at a time.

    Args:
        times_s: gets the time of each answer, by status; 0 for a connection that was lost.
        free: gets the connection whenever it may send again.
    """

    def __init__(self, times_s: dict[int, list[float]], free: list["Connection"]) -> None:
        self._times_s = times_s
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
            self._free.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._note(0)

    def _note(self, status: int) -> None:
        if self._sent is not None:
            self._times_s[status].append(time.perf_counter() - self._sent)
            self._sent = None


async def offer(port: int, request: bytes, rate: float, seconds: float, clients: int) -> dict[int, list[float]]:
    """Sends so many requests a second."""
    loop = asyncio.get_running_loop()
    times_s: dict[int, list[float]] = defaultdict(list)
    free: list[Connection] = []
    for _ in range(clients):
        _, connection = await loop.create_connection(lambda: Connection(times_s, free), "127.0.0.1", port)
        free.append(connection)
    start = time.perf_counter()
    number = 0
    while (now := time.perf_counter() - start) < seconds:
        while free and number < now * rate:
            free.pop().send(request)
            number += 1
        number = max(number, int(now * rate) - clients)  # what nobody was there to send is not made up for
        await asyncio.sleep(0.0005)
    patience = time.monotonic() + 30
    while len(free) < clients and time.monotonic() < patience:
        await asyncio.sleep(0.05)
    return times_s


def main() -> None:
    port, rows, rate, seconds, clients = (float(argument) for argument in sys.argv[1:])
    os.sched_setaffinity(0, LOAD_CORE)
    content = body(int(rows))
    head = (
        f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    print(json.dumps(uvloop.run(offer(int(port), head.encode() + content, rate, seconds, int(clients)))))


if __name__ == "__main__":
    main()
