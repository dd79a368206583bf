"""Requests that wait are answered together; too many are refused, not stalled."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import batcher as batcher_module
from service.answers import Asked
from service.batcher import Batcher
from service.predictor import Answer, Predictor, Question
from service.problems import OVERLOADED, Problem
from tests.service.conftest import running, until
from tests.service.store import in_process, instance, make_settings, write_snapshot
from trainer.config import ServiceSettings
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
        self._answer = predictor.answer

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.sizes.append(len(questions))
        return self._answer(questions)


PASS_ROWS = ServiceSettings().max_batch_size


def batcher_of(predictor: object, **settings: Any) -> Batcher:
    return Batcher(lambda: predictor, ServiceSettings(**settings))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("rows", [1, PASS_ROWS // 7])
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
        rows = PASS_ROWS // 2
        await asyncio.gather(*(batcher.ask(question(rows)) for _ in range(5)))
        batcher.close()

    asyncio.run(ask())
    assert passes.sizes == [2, 2, 1]


def test_a_pass_that_is_not_full_waits_for_more_when_it_is_told_to(predictor: Predictor) -> None:
    passes = Passes(predictor)

    async def ask() -> float:
        batcher = batcher_of(passes, max_batch_size=4, max_wait_s=0.2)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        first = batcher.ask(question())
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.ask(question()))
        waited_s = loop.time() - begun_s
        first = batcher.ask(question())
        while batcher._timer is None:
            await asyncio.sleep(0)
        others = [batcher.ask(question()) for _ in range(3)]
        assert batcher._timer is None  # full: it does not wait
        await asyncio.gather(first, *others)
        given_up = batcher.ask(question())
        batcher.forget(given_up)
        await batcher.ask(question(9))  # larger than a pass: has one of its own
        batcher.close()
        return waited_s

    assert asyncio.run(ask()) >= 0.2
    assert passes.sizes == [2, 4, 1]


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
    whole_pass = question(PASS_ROWS)

    async def ask() -> None:
        batcher = batcher_of(predictor)
        accepted = [batcher.ask(whole_pass) for _ in range(batcher_module.MOST_WAITING_ROWS // PASS_ROWS)]
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


class Held(Passes):
    """A model whose passes end when they are let go."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor)
        self.begun, self.go = threading.Event(), threading.Event()

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.begun.set()
        assert self.go.wait(20)
        return super().answer(questions)


def test_what_was_given_up_is_in_no_pass_and_takes_no_place(predictor: Predictor) -> None:
    passes = Held(predictor)

    async def ask() -> None:
        batcher = batcher_of(passes, max_queue=2)
        first = batcher.ask(question(batcher_module.INLINE_ROWS + 1))
        await asyncio.to_thread(passes.begun.wait)
        given_up, kept = batcher.ask(question(3)), batcher.ask(question(5))
        assert batcher.is_behind
        batcher.forget(given_up)
        assert len(batcher) == 1
        also = batcher.ask(question(7))
        passes.go.set()
        assert [len((await answer).predictions) for answer in (first, kept, also)] == [
            batcher_module.INLINE_ROWS + 1,
            5,
            7,
        ]
        assert given_up.cancelled()
        assert passes.sizes == [1, 2]
        batcher.close()

    asyncio.run(ask())


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[httpx.Client, Held]]:
    """A service whose model holds every pass until it is let go."""
    settings = make_settings(tmp_path / "store", request_timeout_s=2.0)
    write_snapshot(settings)
    held = Held(in_process(settings, 1))
    monkeypatch.setattr(Predictor, "answer", lambda self, questions: held.answer(questions))
    try:
        with running(settings) as client:
            yield client, held
    finally:
        held.go.set()


def many() -> dict[str, Any]:
    return {"instances": [instance(i) for i in range(batcher_module.INLINE_ROWS + 1)]}


def test_a_request_that_waits_too_long_is_503(held: tuple[httpx.Client, Held]) -> None:
    client, passes = held
    response = client.post("/predict", json=many())
    assert response.status_code == 503
    assert "2 s" in response.json()["detail"]
    assert "retry-after" in response.headers
    passes.go.set()
    assert client.post("/predict", json=many()).status_code == 200


def test_a_client_that_left_is_dropped_from_the_queue(held: tuple[httpx.Client, Held]) -> None:
    client, passes = held
    body = json.dumps(many()).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)

    def queue_length() -> float:
        text = client.get("/metrics").text
        return float(text.split("\ntailstream_predict_queue_length ")[1].split()[0])

    with socket.create_connection((client.base_url.host, client.base_url.port)) as first:
        first.sendall(head + body)
        assert passes.begun.wait(20)
        with socket.create_connection((client.base_url.host, client.base_url.port)) as second:
            second.sendall(head + body)
            until(lambda: queue_length() == 1)
        until(lambda: queue_length() == 0)
        assert passes.sizes == []  # it went while the first pass was still held
        passes.go.set()
    until(lambda: 'status="499"' in client.get("/metrics").text)


def test_small_requests_behind_a_long_pass_wait_no_longer_either(held: tuple[httpx.Client, Held]) -> None:
    client, passes = held
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    address = (client.base_url.host, client.base_url.port)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/predict", json=many())
        assert passes.begun.wait(20)
        with socket.create_connection(address) as leaves, socket.create_connection(address, timeout=20) as waits:
            leaves.sendall(head)
            waits.sendall(head)
            until(lambda: "predict_queue_length 2.0" in client.get("/metrics").text)
            leaves.close()
            until(lambda: 'status="499"' in client.get("/metrics").text)
            refused = waits.recv(65536)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in refused
            passes.go.set()
            waits.sendall(head)
            assert waits.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert first.result().status_code == 503
    assert passes.sizes == [1, 1]  # the first's, which nobody waited for any more, and the last


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
