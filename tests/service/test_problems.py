"""What cannot be answered is refused with a document that names the place, and the service goes on."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import running
from tests.service.store import instance, make_settings, write_snapshot
from trainer.config import Settings

LIMIT = 100_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = make_settings(tmp_path_factory.mktemp("store"), max_body_bytes=LIMIT, max_instances=10)
    write_snapshot(settings)
    return settings


@pytest.fixture(autouse=True)
def goes_on(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.post("/predict", json=instance(0)).status_code == 200


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document, after checks that hold for each."""
    document: dict[str, Any] = response.json()
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert document["status"] == status
    assert set(document) >= {"type", "title", "detail"}
    return document


@pytest.mark.parametrize(
    ("body", "at", "field"),
    [
        ({"instances": [{}, {"dep_delay": "late"}]}, 1, "dep_delay"),
        ({"instances": [{}, {}, {"weather": {"wind": "strong"}}]}, 2, "weather.wind"),
        ({"instances": [{"sensors": [1, 2]}]}, 0, "sensors"),
        ({"instances": [{"sensors": [1, 2, "x"]}]}, 0, "sensors[2]"),
        ({"instances": [{"dep_delay": 1e300}]}, 0, "dep_delay"),
        ({"instances": [{}, {"time_hour": "tomorrow"}]}, 1, "time_hour"),
        ({"instances": [{"carrier": ["UA"]}]}, 0, "carrier"),
        ({"instances": ["record"]}, 0, ""),
        ({"instances": []}, None, "instances"),
        ({"instances": {}}, None, "instances"),
        ({"instances": [{}] * 11}, None, "instances"),
        ({"instances": [{}], "balance": 1.5}, None, "balance"),
        ({"instances": [{}], "balance": "1"}, None, "balance"),
        ({"instances": [{}], "interval": 1}, None, "interval"),
        ({"instances": [{}], "interval": 1e-300}, None, "interval"),
        ({"instances": [{}], "point": "mode"}, None, "point"),
        ({"instances": [{}], "balanced": 1}, None, ""),
        ({"dep_delay": "late"}, None, "dep_delay"),
        ([{}], None, ""),
        (7, None, ""),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(client: httpx.Client, body: Any, at: int | None, field: str) -> None:
    document = problem(client.post("/predict", json=body), 422)
    (error,) = document["errors"]
    assert (error["instance"], error["field"]) == (at, field)
    assert error["detail"]
    assert field in document["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"instances": [{}]',
        b"NaN",
        b'{"dep_delay": 1}}',
        b'{"instances": [{"dep_delay": "late"}]',
        b"\xff\xfe",
        b"a" * 50,
    ],
)
def test_broken_json_is_400(client: httpx.Client, body: bytes) -> None:
    assert problem(client.post("/predict", content=body), 400)["type"] == "urn:tailstream:problem:not-json"


@pytest.mark.parametrize("opening", [b"[", b'{"weather":', b'{"instances":[', b'{"x":['])
def test_deep_nesting_is_refused_or_ignored(client: httpx.Client, opening: bytes) -> None:
    assert client.post("/predict", content=opening * (LIMIT // len(opening))).status_code in (400, 422)


def test_a_long_value_is_not_quoted_in_full(client: httpx.Client) -> None:
    response = client.post("/predict", json={"time_hour": "x" * (LIMIT - 100)})
    assert problem(response, 422)["errors"][0]["field"] == "time_hour"
    assert len(response.content) < 2000


def test_a_large_body_is_413_by_its_header_alone(client: httpx.Client) -> None:
    """The body is never sent: the answer cannot wait for it."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_ten_megabytes_are_413(client: httpx.Client) -> None:
    body = json.dumps({"instances": [instance(0)], "extra": "x" * 10_000_000}).encode()
    document = problem(client.post("/predict", content=body), 413)
    assert str(LIMIT) in document["detail"]


def test_ten_megabytes_in_chunks_are_413(client: httpx.Client) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"instances": [{}], "extra": "'
        for _ in range(160):
            sent += 1
            yield b"x" * 65536

    problem(client.post("/predict", content=chunks()), 413)
    assert sent  # it was sent without a Content-Length


def test_a_slow_body_is_cut_off(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, request_timeout_s=0.05)
    write_snapshot(settings)
    with running(settings) as client:
        for part in (b"", b'{"instances": ['):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
                connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + part)
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert b"urn:tailstream:problem:slow-body" in answer


def test_a_body_of_exactly_the_limit_is_read(client: httpx.Client) -> None:
    body = b'{"dep_delay": 1}'
    assert client.post("/predict", content=body.ljust(LIMIT)).status_code == 200
    problem(client.post("/predict", content=body.ljust(LIMIT + 1)), 413)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "application/ld+json"}, 200),
        ({}, 200),
        ({"Content-Type": "text/csv"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_only_json_is_taken(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    response = client.post("/predict", content=b"{}", headers=headers)
    assert response.status_code == status
    if status != 200:
        problem(response, status)


def test_what_the_framework_refuses_is_a_problem_too(client: httpx.Client) -> None:
    problem(client.get("/no/such/path"), 404)
    problem(client.get("/dashboard/no-such-file.js"), 404)
    response = client.get("/predict")
    problem(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_client_that_leaves_in_the_middle_harms_nobody(client: httpx.Client) -> None:
    for _ in range(5):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"inst')


def test_every_answer_carries_security_headers(client: httpx.Client) -> None:
    for response in (client.get("/livez"), client.get("/nope"), client.post("/predict", content=b"{"), client.get("/")):
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers
