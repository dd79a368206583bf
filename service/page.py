"""The live page, the page of the API, and what they are made of."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.staticfiles import StaticFiles

from service.live import Live
from trainer.config import Settings

PAGES: Final = Path(__file__).parent / "dashboard"
SWAGGER_UI: Final = Path(str(files("fastapi_offline"))) / "static"
# A proxy that gathers answers before it passes them on would keep the events to itself.
STREAM_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}


def page_router(live: Live) -> APIRouter:
    """The pages, and the events that the live one shows."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def get_page() -> Response:
        return FileResponse(PAGES / "index.html")

    @router.get("/docs")
    async def get_docs() -> Response:
        return FileResponse(PAGES / "docs.html")

    @router.get("/events")
    async def get_events() -> Response:
        """Server-sent events; not under `/dashboard/`, which is open to everybody."""
        live.check_room()
        return StreamingResponse(live.events(), media_type="text/event-stream", headers=STREAM_HEADERS)

    return router


def page_facts(settings: Settings) -> dict[str, Any]:
    """What the live page is told once."""
    features = settings.record_schema.features
    return {
        "task": settings.task,
        "topic": settings.kafka.topic,
        "label": settings.record_schema.label,
        "features": {name: feature.model_dump(mode="json") for name, feature in features.items()},
        "default_balance": settings.service.default_balance,
    }


def mounts() -> dict[str, StaticFiles]:
    """Folders of static files by their path."""
    return {"/dashboard": StaticFiles(directory=PAGES), "/docs/swagger-ui": StaticFiles(directory=SWAGGER_UI)}
