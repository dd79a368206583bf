"""POST /predict/density: the whole distribution that a prediction is read from, for one record."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Request, Response

from service.answers import Asked
from service.body import Bodies
from service.predictor import Question
from service.problems import CLIENT_LEFT, INVALID, NOT_READY, Problem, described
from service.schemas import NARROWEST_INTERVAL, WIDEST_INTERVAL, DensityResponse
from service.watcher import Watcher
from trainer.config import Settings

BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Instance"}}},
}


def density_router(
    watcher: Watcher, bodies: Bodies, decode: Callable[[bytes], Question], settings: Settings
) -> APIRouter:
    """The one path.

    Args:
        watcher: has the model.
        bodies: reads a body, as for POST /predict.
        decode: understands it.
        settings: the default balance.
    """
    router = APIRouter(tags=["predict"])

    @router.post(
        "/predict/density",
        operation_id="predict_density",
        summary="Predict a label's distribution",
        response_model=DensityResponse,
        responses=described(400, 401, 408, 413, 415, 422, 503),
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
        bodies.check(request.scope["headers"])
        body = await bodies.read(request.receive)
        if body is None:
            return Response(status_code=CLIENT_LEFT)
        question = decode(body)
        if question.rows != 1:
            raise Problem(INVALID, f"One record can be asked about at a time, not {question.rows}.")
        density = predictor.density(Question(question.columns, Asked(balance, interval)))
        return Response(msgspec.json.encode(density), media_type="application/json")

    return router
