"""POST /predict/density: the whole distribution that a prediction is read from, for one record."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Request, Response

from service.answers import Asked
from service.predict import is_json
from service.predictor import Question
from service.problems import INVALID, NOT_JSON_TYPE, NOT_READY, TOO_LARGE, Problem, described
from service.schemas import NARROWEST_INTERVAL, WIDEST_INTERVAL, DensityResponse
from service.watcher import Watcher
from trainer.config import Settings

BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Instance"}}},
}


def density_router(watcher: Watcher, decode: Callable[[bytes], Question], settings: Settings) -> APIRouter:
    """The one path.

    Args:
        watcher: has the model.
        decode: reads a body, as for POST /predict.
        settings: the default balance and the largest body.
    """
    router = APIRouter(tags=["predict"])

    @router.post(
        "/predict/density",
        operation_id="predict_density",
        summary="Predict a label's distribution",
        response_model=DensityResponse,
        responses=described(400, 401, 413, 415, 422, 503),
        openapi_extra={"requestBody": BODY},
    )
    async def predict_density(
        request: Request,
        balance: Annotated[
            float, Query(ge=0, le=1, description="Label prior: 0 the stream's own, 1 all labels alike.")
        ] = settings.service.default_balance,
        # Optional, but never null: a query has no null.
        interval: Annotated[
            float,  # noqa: RUF013
            Query(ge=NARROWEST_INTERVAL, le=WIDEST_INTERVAL, description="Probability of a central interval."),
        ] = None,  # type: ignore[assignment]
    ) -> Response:
        """Predicts the label of one record, and says how probable each of up to 256 cells of the label range is."""
        predictor = watcher.predictor
        if predictor is None:
            raise Problem(NOT_READY, f"There is no model yet: {watcher.trouble}.")
        content_type = request.headers.get("content-type", "application/json")
        if not is_json(content_type.encode("latin-1")):
            raise Problem(NOT_JSON_TYPE, f"The Content-Type is {content_type!r}.")
        question = decode(await _body(request, settings.service.max_body_bytes))
        if question.rows != 1:
            raise Problem(INVALID, f"One record can be asked about at a time, not {question.rows}.")
        density = predictor.density(Question(question.columns, Asked(balance, interval)))
        return Response(msgspec.json.encode(density), media_type="application/json")

    return router


async def _body(request: Request, most_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise Problem(TOO_LARGE, f"A body may have {most_bytes} bytes.")
    return bytes(body)
