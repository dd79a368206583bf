"""The paths of the service and what each answers."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.batcher import Batcher
from service.metrics import ServiceMetrics, age_s
from service.model_info import ModelResponse, model_response
from service.predictor import Question
from service.problems import NOT_JSON_TYPE, NOT_READY, TOO_LARGE, Problem
from service.schemas import PredictResponse, request_model
from service.watcher import Watcher
from trainer.config import Settings

PAGES: Final = Path(__file__).parent / "dashboard"
SWAGGER_UI: Final = Path(str(files("fastapi_offline"))) / "static"


class Ready(BaseModel):
    """The service answers."""

    status: str = "ready"
    model_version: int


class Alive(BaseModel):
    """The process lives."""

    status: str = "alive"


class PredictEndpoint:
    """POST /predict, without the layers that the framework puts around a route: they cost as much as the answer.

    Args:
        watcher: has the model.
        batcher: joins requests.
        decode: reads a body.
        max_body_bytes: largest body.
        metrics: counts instances.
    """

    def __init__(
        self,
        watcher: Watcher,
        batcher: Batcher,
        decode: Callable[[bytes], Question],
        max_body_bytes: int,
        metrics: ServiceMetrics,
    ) -> None:
        self._watcher = watcher
        self._batcher = batcher
        self._decode = decode
        self._max_body_bytes = max_body_bytes
        self._count = metrics.predictions.inc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads, decodes, asks, answers."""
        try:
            self._check(scope)
            body = await self._read(receive)
            if body is None:
                return  # the client left
            question = self._decode(body)
            answer = msgspec.json.encode(await self._batcher.ask(question))
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        self._count(len(question.rows))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _check(self, scope: Scope) -> None:
        """Refuses what need not be read."""
        if self._watcher.predictor is None:
            raise Problem(NOT_READY, f"There is no model yet: {self._watcher.trouble}.")
        for name, value in scope["headers"]:
            if name == b"content-type" and not _is_json(value):
                raise Problem(NOT_JSON_TYPE, f"The Content-Type is {value.decode('latin-1')!r}.")
            if name == b"content-encoding" and value.lower() != b"identity":
                raise Problem(NOT_JSON_TYPE, f"The Content-Encoding is {value.decode('latin-1')!r}; send it as it is.")
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, None if the client left before its end; stops at the limit, whatever a header said."""
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts = bytearray(body)
            while message.get("more_body"):
                message = await receive()
                parts += message.get("body", b"")
                if len(parts) > self._max_body_bytes:
                    raise self._too_large()
            body = bytes(parts)
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        return None if message["type"] == "http.disconnect" else body

    def _too_large(self) -> Problem:
        return Problem(TOO_LARGE, f"A body may have {self._max_body_bytes} bytes; send fewer instances at a time.")


def _is_json(content_type: bytes) -> bool:
    media_type = content_type.partition(b";")[0].strip().lower()
    return media_type == b"application/json" or media_type.endswith(b"+json")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem answers of a path, for OpenAPI."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemResponse"}}}
    descriptions = {
        400: "The body is not JSON.",
        401: "An API key is needed.",
        413: "The body is too large.",
        415: "The body is of another type than JSON.",
        422: "The request does not fit; `errors` names the instance and the field.",
        503: "There is no model, or too many requests wait.",
    }
    return {status: {"description": descriptions[status], "content": content} for status in statuses}


def predict_route(endpoint: PredictEndpoint, settings: Settings) -> APIRoute:
    """POST /predict, described like any route and answered by the endpoint."""
    body_type = request_model(settings.record_schema, settings.service)

    def predict(body: body_type) -> PredictResponse:  # type: ignore[valid-type]
        """Predicts the label of one record, or of many in `instances`, all by the same version of the model."""
        raise NotImplementedError("the endpoint answers")

    route = APIRoute(
        "/predict",
        predict,
        methods=["POST"],
        operation_id="predict",
        summary="Predict labels",
        tags=["predict"],
        response_model=PredictResponse,
        responses=problems(400, 401, 413, 415, 422, 503),
    )
    route.app = endpoint
    return route


def not_ready_because(watcher: Watcher, settings: Settings) -> str | None:
    """Why the service should get no requests, None if it may."""
    predictor = watcher.predictor
    if predictor is None:
        return watcher.trouble or "there is no model"
    manifest, limit_s = predictor.manifest, settings.service.max_model_age_s
    age, lag = age_s(manifest), manifest.lag_records
    if limit_s is not None and age > limit_s and lag != 0:
        behind = "an unknown number of" if lag is None else str(lag)
        return (
            f"model {manifest.version} is {age:.0f} s old, {limit_s:g} s are allowed, and {behind} records wait to be "
            "learned: is the trainer running?"
        )
    return None


def state_router(watcher: Watcher, metrics: ServiceMetrics, settings: Settings) -> APIRouter:
    """What the service says of itself."""
    router = APIRouter()

    @router.get(
        "/model", operation_id="get_model", summary="The model in use", tags=["model"], responses=problems(401, 503)
    )
    async def get_model() -> ModelResponse:
        """What the model in use is, where in the stream it stands, and how well it does."""
        if watcher.predictor is None:
            raise Problem(NOT_READY, f"There is no model yet: {watcher.trouble}.")
        return model_response(watcher.predictor.manifest, watcher.trouble)

    @router.get("/livez", operation_id="get_livez", summary="Alive?", tags=["health"])
    async def get_livez() -> Alive:
        """Whether the process lives."""
        return Alive()

    @router.get(
        "/healthz", operation_id="get_healthz", summary="Ready? (alias)", tags=["health"], responses=problems(503)
    )
    @router.get("/readyz", operation_id="get_readyz", summary="Ready?", tags=["health"], responses=problems(503))
    async def get_readyz() -> Ready:
        """Whether there is a model to predict with that is not too old; if not, why."""
        why = not_ready_because(watcher, settings)
        if why is not None or watcher.predictor is None:
            raise Problem(NOT_READY, f"Not ready: {why}.")
        return Ready(model_version=watcher.predictor.version)

    @router.get(
        "/metrics",
        operation_id="get_metrics",
        summary="Metrics for Prometheus",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}},
    )
    async def get_metrics() -> Response:
        """Metrics of the service, and of the trainer as the newest snapshot has them."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def page_router(watcher: Watcher, settings: Settings) -> APIRouter:
    """The live page, the page of the API, and what they are made of."""
    router = APIRouter(include_in_schema=False)
    fields = {name: feature.model_dump(mode="json") for name, feature in settings.record_schema.features.items()}
    fixed = {
        "label": settings.record_schema.label,
        "features": fields,
        "default_balance": settings.service.default_balance,
        "poll_interval_s": settings.service.poll_interval_s,
    }

    @router.get("/")
    async def get_page() -> Response:
        return FileResponse(PAGES / "index.html")

    @router.get("/docs")
    async def get_docs() -> Response:
        return FileResponse(PAGES / "docs.html")

    @router.get("/dashboard.json")
    async def get_dashboard_state() -> Response:
        """What the page shows; 200 also without a model, as browsers log other answers as errors."""
        predictor = watcher.predictor
        state: Mapping[str, Any] = {
            **fixed,
            "trouble": watcher.trouble,
            "not_ready": not_ready_because(watcher, settings),
            "model": None
            if predictor is None
            else model_response(predictor.manifest, watcher.trouble).model_dump(mode="json", by_alias=True),
        }
        return Response(msgspec.json.encode(state), media_type="application/json")

    return router


def mounts() -> dict[str, StaticFiles]:
    """Folders of static files by their path."""
    return {"/dashboard": StaticFiles(directory=PAGES), "/docs/swagger-ui": StaticFiles(directory=SWAGGER_UI)}
