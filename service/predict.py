"""POST /predict: from a request's bytes to the answer's, by few steps, as this is what a service does all day."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

import msgspec
import structlog
from fastapi import FastAPI, Query, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from service.auth import Keys
from service.batcher import Batcher
from service.body import Bodies
from service.hosts import Hosts
from service.metrics import ServiceMetrics
from service.predictor import Answer, Predictor, Question
from service.problems import (
    CLIENT_LEFT,
    INVALID,
    NOT_READY,
    OVERLOADED,
    Fault,
    Problem,
    described,
    failure_response,
)
from service.schemas import request_model, response_model
from service.security import SECURITY_HEADERS
from service.versions import LARGEST_VERSION, VersionNumber, Versions
from service.watcher import Watcher
from trainer.config import ServiceSettings, Settings

PATH: Final = "/predict"
INLINE_BYTES: Final = 1 << 19  # a longer body takes over 5 ms to decode, and is not decoded on the event loop
_VERSION: Final = TypeAdapter[int](VersionNumber)
_HEADERS: Final = [(b"content-type", b"application/json"), *SECURITY_HEADERS]

log = structlog.stdlib.get_logger(__name__)


class Service(FastAPI):
    """The application, with a way of its own for POST /predict.

    The framework's layers around a route cost several times what the answer does.

    Attributes:
        predict: answers POST /predict.
    """

    predict: "PredictEndpoint"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            await self.predict(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class PredictEndpoint:
    """Checks, reads, decodes, asks, answers and counts.

    Args:
        watcher: has the model.
        batcher: joins requests.
        versions: has the models that a request may name instead.
        bodies: reads a body.
        decode: understands it.
        hosts: what the service may be called; None for anything.
        keys: who may ask; None for everybody.
        settings: how long a request may wait.
        metrics: counts requests and instances.

    Attributes:
        url: of requests that `begin` may be asked about.
        timeout_s: longest time that an answer may take.
    """

    url = PATH.encode()

    def __init__(
        self,
        watcher: Watcher,
        batcher: Batcher,
        versions: Versions,
        bodies: Bodies,
        decode: Callable[[bytes], Question],
        hosts: Hosts | None,
        keys: Keys | None,
        settings: ServiceSettings,
        metrics: ServiceMetrics,
    ) -> None:
        self._watcher = watcher
        self._batcher = batcher
        self._versions = versions
        self._bodies = bodies
        self._decode = decode
        self._hosts = hosts
        self._keys = keys
        self.timeout_s = settings.request_timeout_s
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    def close(self) -> None:
        """Waits for what is being decoded."""
        self._thread.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        start = time.perf_counter()
        status = 500
        try:
            answer = await self._answer(scope, receive)
            if answer is None:
                status = CLIENT_LEFT
                return
            status = 200
            headers = [*_HEADERS, (b"content-length", b"%d" % len(answer))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})
        except Problem as problem:
            status = problem.kind.status
            await _respond(problem.response(), scope, receive, send)
        except Exception:
            log.exception("a prediction failed")
            await _respond(failure_response(), scope, receive, send)
        finally:
            self.count(status, time.perf_counter() - start)

    def begin(self, headers: list[tuple[bytes, bytes]], body: bytes) -> asyncio.Future[Answer]:
        """The first half of what a call does, for a request that came whole and names no version: nothing is awaited.

        Raises:
            Problem: there will be no answer.
        """
        self._admit(headers)
        self._check_ready()
        self._batcher.check_room()
        self._bodies.check(headers)
        self._bodies.check_size(body)
        return self._batcher.ask(self._decode(body))

    def give_up(self, answer: asyncio.Future[Answer]) -> None:
        """Nobody waits any more for an answer that `begin` gave."""
        self._batcher.forget(answer)

    @property
    def is_behind(self) -> bool:
        """Whether what has just begun may wait for long."""
        return self._batcher.is_behind

    def told(self, answer: Answer) -> bytes:
        """An answer as it is sent; its instances are counted."""
        self._metrics.predictions.inc(len(answer.predictions))
        return msgspec.json.encode(answer)

    def too_slow(self) -> Problem:
        """What is said when the time is up."""
        return Problem(OVERLOADED, f"There was no answer within {self.timeout_s:g} s; try again later.")

    def count(self, status: int, seconds: float) -> None:
        """Counts one request, with the time that it took."""
        self._metrics.observe(PATH, "POST", status, seconds)

    def _admit(self, headers: list[tuple[bytes, bytes]]) -> None:
        if self._hosts is not None:
            self._hosts.check(headers)
        if self._keys is not None:
            self._metrics.count_key(self._keys.check(headers))

    def _check_ready(self) -> None:
        if self._watcher.predictor is None:
            raise Problem(NOT_READY, f"There is no model yet: {self._watcher.trouble}.")

    async def _answer(self, scope: Scope, receive: Receive) -> bytes | None:
        """The answer's body; None if the client left."""
        headers = scope["headers"]
        self._admit(headers)
        version = _asked_version(scope["query_string"]) if scope["query_string"] else None
        if version is None:
            self._check_ready()
        self._batcher.check_room()
        self._bodies.check(headers)
        body = await self._bodies.read(receive)
        if body is None:
            return None
        question = await self._question(body)
        predictor = None if version is None else await self._predictor(version)
        answer = await self._ask(question, predictor, receive)
        return None if answer is None else self.told(answer)

    async def _question(self, body: bytes) -> Question:
        if len(body) <= INLINE_BYTES:
            return self._decode(body)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, body)

    async def _predictor(self, version: int) -> Predictor:
        current = self._watcher.predictor
        if current is not None and current.version == version:
            return current
        return await self._versions.predictor(version)

    async def _ask(self, question: Question, predictor: Predictor | None, receive: Receive) -> Answer | None:
        """The answer; None if the client left before it came."""
        answer = self._batcher.ask(question, predictor)
        if not self._batcher.is_behind:
            return await answer
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((answer, left), timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not answer.done():
                self._batcher.forget(answer)
        if not answer.cancelled():
            return answer.result()
        if left.done() and not left.cancelled():
            return None
        raise self.too_slow()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    response.raw_headers.extend(SECURITY_HEADERS)
    await response(scope, receive, send)


def _asked_version(query: bytes) -> int | None:
    """The version that a query names, None where it names none; other parameters are ignored."""
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("version")
    if values is None:
        return None
    try:
        return _VERSION.validate_python(values[0] if len(values) == 1 else values)
    except ValidationError as error:
        fault = Fault(error.errors()[0]["msg"], "query.version")
        raise Problem(INVALID, f"{fault.field}: {fault.detail}", [fault]) from None


def predict_route(settings: Settings) -> APIRoute:
    """POST /predict as the API's description has it, and other methods' 405."""
    body_type = request_model(settings)

    def predict(
        body: body_type,  # type: ignore[valid-type]
        # Optional, but never null: a query has no null.
        version: Annotated[
            int,  # noqa: RUF013
            Query(ge=1, le=LARGEST_VERSION, description="Answer by this kept version instead of the one in use."),
        ] = None,  # type: ignore[assignment]
    ) -> Any:
        """Predicts the label of one record, or of many in `instances`, all by the same version of the model."""
        raise NotImplementedError("the endpoint answers")

    return APIRoute(
        PATH,
        predict,
        methods=["POST"],
        operation_id="predict",
        summary="Predict labels",
        tags=["predict"],
        response_model=response_model(settings),
        responses=described(400, 401, 404, 408, 409, 413, 415, 422, 503),
    )
