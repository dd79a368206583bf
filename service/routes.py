"""The paths of the service and what each answers."""

from collections.abc import Callable

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from service.metrics import ServiceMetrics, age_s
from service.model_info import ModelResponse, model_response
from service.problems import NOT_READY, Problem, described
from service.watcher import Watcher
from trainer.config import Settings


class Ready(BaseModel):
    """The service answers."""

    status: str = "ready"
    model_version: int


class Alive(BaseModel):
    """The process lives."""

    status: str = "alive"


def not_ready_because(watcher: Watcher, settings: Settings, *, stopping: bool) -> str | None:
    """Why the service should get no requests, None if it may."""
    if stopping:
        return "the service is about to stop"
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


def state_router(watcher: Watcher, metrics: ServiceMetrics, not_ready: Callable[[], str | None]) -> APIRouter:
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
        why = not_ready()
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
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
