"""What is answered when a request cannot be: RFC 9457 problem details that name the instance and the field."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.security import SECURITY_HEADERS

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 1
CLIENT_LEFT: Final = 499  # in the metrics alone: nobody is there to be answered


class Kind(NamedTuple):
    """A sort of problem that a client may want to tell apart."""

    name: str
    status: HTTPStatus
    title: str


NOT_JSON: Final = Kind("not-json", HTTPStatus.BAD_REQUEST, "The body is not JSON")
NOT_HTTP: Final = Kind("not-http", HTTPStatus.BAD_REQUEST, "The request is not HTTP")
SLOW_HEAD: Final = Kind("slow-head", HTTPStatus.REQUEST_TIMEOUT, "The request took too long to begin")
LARGE_HEAD: Final = Kind(
    "large-head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's address and headers are too large"
)
UNAUTHORIZED: Final = Kind("unauthorized", HTTPStatus.UNAUTHORIZED, "An API key is needed")
SLOW_BODY: Final = Kind("slow-body", HTTPStatus.REQUEST_TIMEOUT, "The body took too long")
TOO_LARGE: Final = Kind("too-large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large")
NOT_JSON_TYPE: Final = Kind(
    "unsupported-media-type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json"
)
FOREIGN: Final = Kind("foreign-page", HTTPStatus.FORBIDDEN, "Another site may not ask for this")
MISDIRECTED: Final = Kind("misdirected", HTTPStatus.MISDIRECTED_REQUEST, "The service is not called that")
NO_SUCH_VERSION: Final = Kind("no-such-version", HTTPStatus.NOT_FOUND, "The store keeps no such version")
UNUSABLE_VERSION: Final = Kind("unusable-version", HTTPStatus.CONFLICT, "The version cannot answer")
INVALID: Final = Kind("invalid-request", HTTPStatus.UNPROCESSABLE_ENTITY, "The request cannot be predicted for")
OVERLOADED: Final = Kind("overloaded", HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests are waiting")
STORE: Final = Kind("store", HTTPStatus.SERVICE_UNAVAILABLE, "The snapshot store cannot be used")
NOT_READY: Final = Kind("not-ready", HTTPStatus.SERVICE_UNAVAILABLE, "The service is not ready")


class Fault(NamedTuple):
    """One thing that is wrong with a request, and where."""

    detail: str
    field: str = ""  # dotted path inside the instance, or of the request where `instance` is None
    instance: int | None = None  # place in `instances`, from 0


class Problem(Exception):
    """Ends a request with a problem document.

    Attributes:
        kind: what sort of problem.
        detail: what happened and what to do, for people.
        faults: the places at fault.
    """

    def __init__(self, kind: Kind, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.faults = faults

    def response(self) -> Response:
        """The problem as an answer."""
        headers = {}
        if self.kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["retry-after"] = str(RETRY_AFTER_S)
        if self.kind.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        if self.kind.status == HTTPStatus.REQUEST_TIMEOUT:
            headers["connection"] = "close"  # what comes later is not waited for
        document: dict[str, Any] = {
            "type": f"urn:tailstream:problem:{self.kind.name}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
        }
        if self.faults:
            document["errors"] = [fault._asdict() for fault in self.faults]
        return _respond(document, headers)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem answers of a path, for OpenAPI."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemResponse"}}}
    descriptions = {
        400: "The body is not JSON.",
        401: "An API key is needed.",
        403: "A page of another site asks.",
        404: "The store keeps no such version.",
        408: "The body took too long to arrive.",
        409: "The version is damaged, or of another model than the configuration describes.",
        413: "The body is too large.",
        415: "The body is of another type than JSON.",
        421: "The request was made to a name that is not the service's.",
        422: "The request does not fit; `errors` names the instance and the field.",
        503: "There is no model, the store cannot be used, too many requests wait, or one waited too long.",
    }
    return {status: {"description": descriptions[status], "content": content} for status in statuses}


async def answer_problem(request: Request, error: Exception) -> Response:
    """Handler for problems raised by a route."""
    assert isinstance(error, Problem)
    return error.response()


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Handler for what the framework refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    return _respond(_plain(HTTPStatus(error.status_code), str(error.detail)), error.headers or {})


async def answer_invalid_parameter(request: Request, error: Exception) -> Response:
    """Handler for parameters that do not fit what a route declares."""
    assert isinstance(error, RequestValidationError)
    faults = [Fault(entry["msg"], ".".join(str(part) for part in entry["loc"])) for entry in error.errors()]
    return Problem(INVALID, "; ".join(f"{fault.field}: {fault.detail}" for fault in faults), faults).response()


async def answer_failure(request: Request, error: Exception) -> Response:
    """Handler for failures of our own: nothing of them is shown outside, the log has the rest."""
    response = failure_response()
    # The outermost handler answers outside the middleware that adds these to every other response.
    response.raw_headers.extend(SECURITY_HEADERS)
    return response


def failure_response() -> Response:
    """What is said of a failure of our own."""
    return _respond(_plain(HTTPStatus.INTERNAL_SERVER_ERROR, "The request failed; the service's log says why."), {})


def _plain(status: HTTPStatus, detail: str) -> dict[str, Any]:
    return {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail}


def _respond(document: dict[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(
        msgspec.json.encode(document), status_code=document["status"], headers=dict(headers), media_type=MEDIA_TYPE
    )
