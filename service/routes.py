"""The paths of the service and what each answers."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

import msgspec
from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.batcher import Batcher
from service.metrics import ServiceMetrics, age_s
from service.model_info import ModelResponse, model_response
from service.predictor import Predictor, Question
from service.problems import INVALID, NOT_JSON_TYPE, NOT_READY, TOO_LARGE, Fault, Problem, described
from service.schemas import PredictResponse, request_model
from service.versions import LARGEST_VERSION, VersionNumber, Versions
from service.watcher import Watcher
from trainer.config import Settings

PAGES: Final = Path(__file__).parent / "dashboard"
SWAGGER_UI: Final = Path(str(files("fastapi_offline"))) / "static"
_VERSION: Final = TypeAdapter[int](VersionNumber)


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
        versions: has the models that a request may name instead.
        decode: reads a body.
        max_body_bytes: largest body.
        metrics: counts instances.
    """

    def __init__(
        self,
        watcher: Watcher,
        batcher: Batcher,
        versions: Versions,
        decode: Callable[[bytes], Question],
        max_body_bytes: int,
        metrics: ServiceMetrics,
    ) -> None:
        self._watcher = watcher
        self._batcher = batcher
        self._versions = versions
        self._decode = decode
        self._max_body_bytes = max_body_bytes
        self._count = metrics.predictions.inc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads, decodes, asks, answers."""
        try:
            version = _asked_version(scope["query_string"]) if scope["query_string"] else None
            self._check(scope, version)
            body = await self._read(receive)
            if body is None:
                return  # the client left
            question = self._decode(body)
            predictor = None if version is None else await self._predictor(version)
            answer = msgspec.json.encode(await self._batcher.ask(question, predictor))
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        self._count(len(question.rows))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _predictor(self, version: int) -> Predictor:
        current = self._watcher.predictor
        if current is not None and current.version == version:
            return current
        return await self._versions.predictor(version)

    def _check(self, scope: Scope, version: int | None) -> None:
        """Refuses what need not be read."""
        if version is None and self._watcher.predictor is None:
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


def _is_json(content_type: bytes) -> bool:
    media_type = content_type.partition(b";")[0].strip().lower()
    return media_type == b"application/json" or media_type.endswith(b"+json")


def predict_route(endpoint: PredictEndpoint, settings: Settings) -> APIRoute:
    """POST /predict, described like any route and answered by the endpoint."""
    body_type = request_model(settings.record_schema, settings.service)

    def predict(
        body: body_type,  # type: ignore[valid-type]
        # Optional, but never null: a query has no null.
        version: Annotated[
            int,  # noqa: RUF013
            Query(ge=1, le=LARGEST_VERSION, description="Answer by this kept version instead of the one in use."),
        ] = None,  # type: ignore[assignment]
    ) -> PredictResponse:
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
        responses=described(400, 401, 404, 409, 413, 415, 422, 503),
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
        "/model", operation_id="get_model", summary="The model in use", tags=["model"], responses=described(401, 503)
    )
    async def get_model() -> ModelResponse:
        """What the model in use is, where in the stream it stands, and how well it does."""
        if watcher.predictor is None:
            raise Problem(NOT_READY, f"There is no model yet: {watcher.trouble}.")
        return model_response(watcher.predictor.manifest, watcher.trouble, watcher.pinned)

    @router.get("/livez", operation_id="get_livez", summary="Alive?", tags=["health"])
    async def get_livez() -> Alive:
        """Whether the process lives."""
        return Alive()

    @router.get(
        "/healthz", operation_id="get_healthz", summary="Ready? (alias)", tags=["health"], responses=described(503)
    )
    @router.get("/readyz", operation_id="get_readyz", summary="Ready?", tags=["health"], responses=described(503))
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
            else model_response(predictor.manifest, watcher.trouble, watcher.pinned).model_dump(
                mode="json", by_alias=True
            ),
        }
        return Response(msgspec.json.encode(state), media_type="application/json")

    return router


def mounts() -> dict[str, StaticFiles]:
    """Folders of static files by their path."""
    return {"/dashboard": StaticFiles(directory=PAGES), "/docs/swagger-ui": StaticFiles(directory=SWAGGER_UI)}
