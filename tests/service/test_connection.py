"""What comes before a body: limited in size and time, as nothing of ours is asked until then."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from service import connection
from tests.service.store import instance


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as opened:
        yield opened


def answer(opened: socket.socket) -> bytes:
    """All that comes until the service closes the connection."""
    return b"".join(iter(lambda: opened.recv(65536), b""))


def is_problem(said: bytes, status: int, kind: bytes) -> None:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/problem+json" in head
    assert b"x-content-type-options: nosniff" in head
    assert b"connection: close" in head
    assert b"urn:tailstream:problem:" + kind in body


def test_a_head_without_end_is_cut_off(client: httpx.Client) -> None:
    with connected(client) as opened:
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
            for number in range(100):
                opened.sendall((b"X-%d: " % number).ljust(1_000_000, b"x") + b"\r\n")
    with connected(client) as opened:
        opened.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"x" * (connection.LARGEST_HEAD - 20))
        is_problem(answer(opened), 431, b"large-head")


def test_a_large_head_that_is_allowed_is_read(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"X": "x" * (connection.LARGEST_HEAD - 1000)}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHo"])
def test_a_head_that_does_not_come_is_not_waited_for(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "SLOWEST_HEAD_S", 0.1)
    with connected(client) as opened:
        opened.sendall(sent)
        said = answer(opened)
        if sent:
            is_problem(said, 408, b"slow-head")
        else:
            assert said == b""


def test_a_second_head_on_a_connection_is_watched_too(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(client) as opened:
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):
            first += opened.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(connection, "SLOWEST_HEAD_S", 0.1)
        opened.sendall(b"GET /livez HTT")
        is_problem(answer(opened), 408, b"slow-head")


def test_a_slow_answer_is_not_cut_off_by_the_limit_of_heads(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SLOWEST_HEAD_S", 0.1)
    with httpx.Client(base_url=client.base_url, timeout=20) as other, other.stream("GET", "/events") as events:
        lines = events.iter_lines()
        assert [next(lines) for _ in range(12)]  # more than a second of them


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 TLS, as to an HTTPS port", b"nonsense\r\n\r\n"])
def test_what_is_not_http_is_a_problem(client: httpx.Client, sent: bytes) -> None:
    with connected(client) as opened:
        opened.sendall(sent)
        is_problem(answer(opened), 400, b"not-http")


def test_a_length_that_lies_is_found_out(client: httpx.Client) -> None:
    """Shorter than the body: what is left is no request. Two lengths: smuggling, which is refused."""
    with connected(client) as opened:
        opened.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}{"instances": []}')
        is_problem(answer(opened), 400, b"not-http")
    for lengths in (
        b"Content-Length: 2\r\nContent-Length: 3",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked",
        b"Content-Length: -2",
        b"Content-Length: 99999999999999999999999",
    ):
        with connected(client) as opened:
            opened.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\n" + lengths + b"\r\n\r\n{}")
            is_problem(answer(opened), 400, b"not-http")
    assert client.post("/predict", json=instance(0)).status_code == 200
