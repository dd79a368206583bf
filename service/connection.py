"""A connection as uvicorn has it, with limits on what comes before a body, and a short way for most predictions.

Until a request's head is there no code of ours is asked, so what is too large or too slow must be refused here.

A request for POST /predict that comes in one piece is answered without uvicorn's task, cycle and messages for it: they
cost more than everything else about it. What comes in several pieces, names a version, or finds an answer still being
written on its connection goes uvicorn's way, to the same endpoint; so does every other request.
"""

import asyncio
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import structlog
from fastapi import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.problems import CLIENT_LEFT, LARGE_HEAD, NOT_HTTP, SLOW_HEAD, Kind, Problem, failure_response
from service.security import SECURITY_HEADERS

if TYPE_CHECKING:  # it imports torch, which a process that only watches workers does without
    from service.predict import PredictEndpoint
    from service.predictor import Answer

LARGEST_HEAD: Final = 65_536  # bytes of a request's first line and headers
MOST_KEPT: Final = 256  # refusals as they are sent
SLOWEST_HEAD_S: Final = 10.0  # for them to arrive, and for a new connection to say anything
ANSWER_HEAD: Final = b"".join(
    [
        STATUS_LINE[200],
        *(b"%b: %b\r\n" % header for header in ((b"content-type", b"application/json"), *SECURITY_HEADERS)),
    ]
)

log = structlog.stdlib.get_logger(__name__)


class Connection(HttpToolsProtocol):
    """Ends when a request's head is too large or too slow; uvicorn would wait for ever, and keep all of it."""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _whole: bytes | None = None  # the body of a prediction, as far as it has come; None for other requests
    _answering: "_Answering | None" = None

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
        elif self._whole is not None:  # it does not come in one piece
            body, self._whole = self._whole, None
            if not self.transport.is_closing():
                super().on_headers_complete()
                super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more, and has nothing predicted."""
        self._head_came()
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.end()
            self._endpoint.give_up(answering.answer)
            self._endpoint.count(CLIENT_LEFT, time.perf_counter() - answering.begun_s)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Parser callback: a head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Parser callback: a head has ended."""
        self._head_came()
        if self._is_plain_prediction():
            self._whole = b""
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Parser callback: a part of a body."""
        if self._whole is None:
            super().on_body(body)
        else:
            self._whole += body

    def on_message_complete(self) -> None:
        """Parser callback: a request has ended."""
        if self._whole is None:
            super().on_message_complete()
        else:
            body, self._whole = self._whole, None
            self._predict(body)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP in the form of every other problem."""
        self._refuse(Problem(NOT_HTTP, msg))

    # Heads

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
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            response = problem.response()
            response.headers["connection"] = "close"
            self._write(response.status_code, _rendered(response))
        self.transport.close()  # in the middle of an answer nothing else can be said

    # Predictions

    @property
    def _endpoint(self) -> "PredictEndpoint":
        endpoint: PredictEndpoint = self.config.app.predict  # type: ignore[union-attr]
        return endpoint

    def _is_plain_prediction(self) -> bool:
        return (
            self.url == self._endpoint.url
            and self.parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.expect_100_continue
            and not self.flow.write_paused
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
        )

    def _predict(self, body: bytes) -> None:
        begun_s = time.perf_counter()
        try:
            answer = self._endpoint.begin(self.headers, body)
        except Problem as problem:
            self._say_no(problem, begun_s)
        except Exception as error:
            self._say_no(error, begun_s)
        else:
            self._answering = answering = _Answering(answer, begun_s)
            self.cycle = answering  # type: ignore[assignment]  # so that what comes meanwhile waits its turn
            answer.add_done_callback(self._predicted)
            if self._endpoint.is_behind:
                answering.timer = self.loop.call_later(self._endpoint.timeout_s, self._predicted_too_late)

    def _predicted(self, answer: "asyncio.Future[Answer]") -> None:
        answering = self._answering
        if answering is None or answering.answer is not answer:
            return  # it was given up
        error = answer.exception()
        if error is not None:
            self._say_no(error, answering.begun_s)
            return
        if not self.transport.is_closing():
            told = self._endpoint.told(answer.result())
            close = b"" if answering.keep_alive else b"connection: close\r\n"
            head = (ANSWER_HEAD, self._default_head(), close, len(told), told)
            self.transport.write(b"%b%b%bcontent-length: %d\r\n\r\n%b" % head)
        self._endpoint.count(200, time.perf_counter() - answering.begun_s)
        self._next_request()

    def _predicted_too_late(self) -> None:
        answering, self._answering = self._answering, None
        if answering is not None:
            self._endpoint.give_up(answering.answer)
            self._answering = answering
            self._say_no(self._endpoint.too_slow(), answering.begun_s)

    def _say_no(self, error: BaseException, begun_s: float) -> None:
        if isinstance(error, Problem):
            status = int(error.kind.status)
            said = _refusal(error.kind, error.detail) if not error.faults else _rendered(error.response())
        else:
            log.error("a prediction failed", exc_info=error)
            response = failure_response()
            status, said = response.status_code, _rendered(response)
        if not self.transport.is_closing():
            self._write(status, said)
        self._endpoint.count(status, time.perf_counter() - begun_s)
        self._next_request()

    def _next_request(self) -> None:
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.end()
            if not answering.keep_alive:  # the service stops
                self.transport.close()
        self.on_response_complete()

    def _write(self, status: int, said: bytes) -> None:
        self.transport.write(b"%b%b%b" % (STATUS_LINE[status], self._default_head(), said))

    def _default_head(self) -> bytes:
        return b"".join([b"%b: %b\r\n" % header for header in self.server_state.default_headers])


@lru_cache(maxsize=MOST_KEPT)
def _refusal(kind: Kind, detail: str) -> bytes:
    """A problem without faults: under overload most requests get the same ones, and must cost little beside answers."""
    return _rendered(Problem(kind, detail).response())


def _rendered(response: Response) -> bytes:
    """Headers of its own and body."""
    headers = (b"%b: %b\r\n" % header for header in (*response.raw_headers, *SECURITY_HEADERS))
    return b"%b\r\n%b" % (b"".join(headers), bytes(response.body))


class _Answering:
    """A prediction under way; stands where uvicorn has the cycle of a request, with what uvicorn asks of that."""

    message_event = asyncio.Event()  # that nobody waits for
    response_started = False
    disconnected = False

    def __init__(self, answer: "asyncio.Future[Answer]", begun_s: float) -> None:
        self.answer = answer
        self.begun_s = begun_s
        self.timer: asyncio.TimerHandle | None = None
        self.response_complete = False
        self.keep_alive = True

    def end(self) -> None:
        self.response_complete = True
        if self.timer is not None:
            self.timer.cancel()
