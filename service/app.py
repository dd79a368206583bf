"""The application: the parts of the service, put together."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service import problems
from service.answers import fresh_answering
from service.auth import KeyCheck, Keys, load_keys
from service.batcher import Batcher
from service.body import Bodies
from service.density import density_router
from service.history import kept_manifests
from service.hosts import HostCheck, Hosts
from service.live import Live
from service.metrics import CountRequests, ServiceMetrics
from service.page import mounts, page_facts, page_router
from service.predict import PredictEndpoint, Service, predict_route
from service.routes import not_ready_because, state_router
from service.schemas import FaultResponse, ProblemResponse, question_decoder
from service.security import SecurityHeaders
from service.versions import Versions, versions_router
from service.watcher import Watcher
from trainer.config import ServiceSettings, Settings
from trainer.schema import FeatureSchema
from trainer.snapshot import open_store


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; its watcher and its thread live as long as its lifespan.

    Raises:
        ConfigError: the keys, the schema or the model's body cannot be used.
    """
    torch.set_num_threads(settings.threads)
    schema = FeatureSchema.of(settings)
    fresh_answering(schema, settings)  # a body that cannot be made is said at once, not in a log
    store = open_store(settings.store)
    watcher = Watcher(store, settings)
    versions = Versions(store, settings)
    batcher = Batcher(lambda: watcher.predictor, settings.service)
    metrics = ServiceMetrics(lambda: watcher.predictor, lambda: len(batcher), lambda: watcher.pinned)
    stopping = threading.Event()

    def not_ready() -> str | None:
        return not_ready_because(watcher, settings, stopping=stopping.is_set())

    live = Live(
        watcher,
        page_facts(settings),
        not_ready,
        lambda: kept_manifests(store, settings.task),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(watcher.start)
        tasks = [
            asyncio.create_task(_refresh(metrics, settings.service.poll_interval_s)),
            asyncio.create_task(live.follow()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(watcher.stop)
            endpoint.close()
            batcher.close()
            versions.close()

    app = Service(
        title="Tailstream",
        version=_version(),
        description="Predictions from a model that learns from a stream and is seconds old.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            problems.Problem: problems.answer_problem,
            HTTPException: problems.answer_http_exception,
            RequestValidationError: problems.answer_invalid_parameter,
            Exception: problems.answer_failure,
        },
    )
    app.state.live = live
    app.state.stopping = stopping
    keys = _keys(settings.service)
    hosts = Hosts.of(settings.service)
    decode = question_decoder(schema, settings.service)
    bodies = Bodies(settings.service)
    app.predict = endpoint = PredictEndpoint(
        watcher, batcher, versions, bodies, decode, hosts, keys, settings.service, metrics
    )
    app.router.routes.insert(0, predict_route(settings))
    if settings.task == "regression":
        app.include_router(density_router(watcher, bodies, decode, settings))
    app.include_router(state_router(watcher, metrics, not_ready))
    app.include_router(versions_router(versions, watcher))
    app.include_router(page_router(live))
    for path, folder in mounts().items():
        app.mount(path, folder)

    if keys is not None:
        app.add_middleware(KeyCheck, keys=keys, count=metrics.count_key)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(SecurityHeaders)
    _describe(app, keys, hosts)
    return app


async def _refresh(metrics: ServiceMetrics, interval_s: float) -> None:
    while True:
        metrics.refresh()
        await asyncio.sleep(interval_s)


def _keys(settings: ServiceSettings) -> Keys | None:
    if not settings.api_keys_file:
        return None
    return Keys(load_keys(Path(settings.api_keys_file)), metrics_need_key=settings.metrics_need_key)


def _describe(app: FastAPI, keys: Keys | None, hosts: Hosts | None) -> None:
    """Adds to the OpenAPI document what the framework cannot know: problems, keys, and names."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            template = "#/components/schemas/{model}"
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (FaultResponse, ProblemResponse):
                described = model.model_json_schema(ref_template=template)
                described.pop("$defs", None)
                schemas[model.__name__] = described
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            if keys is not None:
                document["components"]["securitySchemes"] = {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                }
                for path, operations in document["paths"].items():
                    for operation in () if keys.is_open(path) else operations.values():
                        operation["security"] = [{"bearer": []}, {"api_key": []}]
                        operation["responses"] |= {
                            str(status): what for status, what in problems.described(401).items()
                        }
            if hosts is not None:
                refused = {str(status): what for status, what in problems.described(421).items()}
                for operations in document["paths"].values():
                    for operation in operations.values():
                        operation["responses"] |= refused
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _version() -> str:
    try:
        return version("tailstream")
    except PackageNotFoundError:  # run from a source tree
        return "0"
