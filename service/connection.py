"""A connection as uvicorn has it, with limits on what comes before a body: until then no code of ours is asked."""

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.problems import LARGE_HEAD, NOT_HTTP, SLOW_HEAD, Problem
from service.security import SECURITY_HEADERS

LARGEST_HEAD: Final = 65_536  # bytes of a request's first line and headers
SLOWEST_HEAD_S: Final = 10.0  # for them to arrive, and for a new connection to say anything


class Connection(HttpToolsProtocol):
    """Ends when a request's head is too large or too slow; uvicorn would wait for ever, and keep all of it."""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expects a request."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(SLOWEST_HEAD_S, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Parses what came, and looks whether it goes on for too long."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self._refuse(Problem(LARGE_HEAD, f"They may have {LARGEST_HEAD} bytes."))
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(SLOWEST_HEAD_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
        self._head_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Parser callback: a head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Parser callback: a head has ended."""
        self._head_came()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP in the form of every other problem."""
        self._refuse(Problem(NOT_HTTP, msg))

    def _head_came(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if self._in_head:
            self._refuse(Problem(SLOW_HEAD, f"Its headers did not arrive within {SLOWEST_HEAD_S:g} s."))
        else:  # it has said nothing at all
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        self._head_came()
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # in the middle of an answer nothing else can be said
            return
        response = problem.response()
        headers = dict([*response.raw_headers, *SECURITY_HEADERS, (b"connection", b"close")])
        lines = [b"%b: %b\r\n" % header for header in headers.items()]
        status = problem.kind.status
        first = b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode())
        self.transport.write(b"".join([first, *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
