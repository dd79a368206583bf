"""Requests that wait are answered together; too many are refused, not stalled."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from service import batcher as batcher_module
from service.batcher import Batcher
from service.predictor import Answer, Asked, Predictor, Question
from service.problems import OVERLOADED, Problem
from tests.service.conftest import running
from tests.service.store import in_process, instance, make_settings, write_snapshot
from trainer.schema import Columns


def question(rows: int = 1) -> Question:
    return Question(Columns(np.full((rows, 12), np.nan, np.float32), np.zeros((rows, 1), np.int64)), Asked(0.5))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    settings = make_settings(tmp_path_factory.mktemp("store"))
    write_snapshot(settings)
    return in_process(settings, 1)


class Passes:
    """A model that writes down its passes."""

    def __init__(self, predictor: Predictor) -> None:
        self.sizes: list[int] = []
        self._predictor = predictor

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.sizes.append(len(questions))
        return self._predictor.answer(questions)


def batcher_of(predictor: object, max_queue: int = 1000) -> Batcher:
    return Batcher(lambda: predictor, max_queue)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("rows", [1, batcher_module.INLINE_ROWS], ids=["inline", "in the thread"])
def test_what_waits_is_one_pass(predictor: Predictor, rows: int) -> None:
    passes = Passes(predictor)

    async def ask() -> list[Answer]:
        batcher = batcher_of(passes)
        try:
            return await asyncio.gather(*(batcher.ask(question(rows)) for _ in range(7)))
        finally:
            batcher.close()

    answers = asyncio.run(ask())
    assert passes.sizes == [7]
    assert [len(answer.predictions) for answer in answers] == [rows] * 7


def test_a_pass_takes_no_more_than_its_limit(predictor: Predictor) -> None:
    passes = Passes(predictor)

    async def ask() -> None:
        batcher = batcher_of(passes)
        rows = batcher_module.PASS_ROWS // 2
        await asyncio.gather(*(batcher.ask(question(rows)) for _ in range(5)))
        batcher.close()

    asyncio.run(ask())
    assert passes.sizes == [2, 2, 1]


def test_past_the_queue_requests_are_refused_and_the_others_answered(predictor: Predictor) -> None:
    async def ask() -> None:
        batcher = batcher_of(predictor, max_queue=3)
        accepted = [batcher.ask(question()) for _ in range(3)]
        for _ in range(7):
            with pytest.raises(Problem) as refused:
                batcher.ask(question())
            assert refused.value.kind == OVERLOADED
        await asyncio.gather(*accepted)
        assert len(batcher) == 0
        await batcher.ask(question())  # there is room again
        batcher.close()

    asyncio.run(ask())


def test_rows_are_bounded_too(predictor: Predictor) -> None:
    whole_pass = question(batcher_module.PASS_ROWS)

    async def ask() -> None:
        batcher = batcher_of(predictor)
        accepted = [
            batcher.ask(whole_pass) for _ in range(batcher_module.MOST_WAITING_ROWS // batcher_module.PASS_ROWS)
        ]
        with pytest.raises(Problem):
            batcher.ask(whole_pass)
        for future in accepted[1:]:
            future.cancel()
        await accepted[0]
        batcher.close()

    asyncio.run(ask())


@pytest.mark.parametrize("rows", [1, batcher_module.INLINE_ROWS + 1], ids=["inline", "in the thread"])
def test_a_failing_pass_fails_its_requests_alone(predictor: Predictor, rows: int) -> None:
    class FailsFirst(Passes):
        def answer(self, questions: Sequence[Question]) -> list[Answer]:
            answers = super().answer(questions)
            if len(self.sizes) == 1:
                raise ArithmeticError("as a body of the user's own might")
            return answers

    async def ask() -> None:
        batcher = batcher_of(FailsFirst(predictor))
        with pytest.raises(ArithmeticError):
            await batcher.ask(question(rows))
        assert len((await batcher.ask(question())).predictions) == 1
        batcher.close()

    asyncio.run(ask())


def test_overload_over_http_is_503_with_retry_after(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "store", max_queue=1)
    write_snapshot(settings)
    body = {"instances": [instance(i) for i in range(1500)], "interval": 0.9}

    async def flood(base_url: httpx.URL) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base_url, timeout=20) as client:
            return await asyncio.gather(*(client.post("/predict", json=body) for _ in range(40)))

    with running(settings) as client:
        responses = asyncio.run(flood(client.base_url))
        assert {response.status_code for response in responses} == {200, 503}
        for response in responses:
            if response.status_code == 503:
                assert response.json()["type"] == "urn:tailstream:problem:overloaded"
                assert int(response.headers["retry-after"]) >= 1
            else:
                assert len(response.json()["predictions"]) == 1500
        assert client.post("/predict", json=instance(0)).status_code == 200
