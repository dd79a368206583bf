"""What comes before a body: limited in size and time, as nothing of ours is asked until then."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from service import connection
from tests.service.store import instance
from tests.service.test_state import scrape


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
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
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
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
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
        opened.sendall(b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}{"instances": []}')
        is_problem(answer(opened), 400, b"not-http")
    for lengths in (
        b"Content-Length: 2\r\nContent-Length: 3",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked",
        b"Content-Length: -2",
        b"Content-Length: 99999999999999999999999",
    ):
        with connected(client) as opened:
            opened.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + lengths + b"\r\n\r\n{}")
            is_problem(answer(opened), 400, b"not-http")
    assert client.post("/predict", json=instance(0)).status_code == 200


# Predictions that come in one piece have a way of their own


def request(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /predict HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def answers(opened: socket.socket, count: int) -> list[tuple[int, Any]]:
    """Statuses and bodies of so many answers."""
    with opened.makefile("rb") as stream:
        found = []
        for _ in range(count):
            status = int(stream.readline().split()[1])
            headers = dict(line.rstrip().split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
            assert headers[b"x-content-type-options"] == b"nosniff"
            assert b"date" in headers
            found.append((status, json.loads(stream.read(int(headers[b"content-length"])))))
        return found


def test_pieces_pipelines_and_turns_are_answered_alike(client: httpx.Client) -> None:
    bodies = [json.dumps({"instances": [instance(i)] * (i + 1), "interval": 0.9}).encode() for i in range(6)]
    expected = [(200, client.post("/predict", content=body, headers={"Expect": ""}).json()) for body in bodies]
    assert [len(answer["predictions"]) for _, answer in expected] == [1, 2, 3, 4, 5, 6]
    with connected(client) as opened:  # one after the other
        for body, answer in zip(bodies, expected, strict=True):
            opened.sendall(request(body))
            assert answers(opened, 1) == [answer]
    with connected(client) as opened:  # all at once, in order
        opened.sendall(b"".join(request(body) for body in bodies))
        assert answers(opened, 6) == expected
    with connected(client) as opened:  # beside other requests
        opened.sendall(request(bodies[0]) + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" + request(bodies[1]))
        assert answers(opened, 3) == [expected[0], (200, {"status": "alive"}), expected[1]]
    for cut in (30, 100, len(request(bodies[5])) - 1):  # in pieces
        with connected(client) as opened:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in (request(bodies[5])[:cut], request(bodies[5])[cut:] + request(bodies[0])[:cut]):
                opened.sendall(part)
                time.sleep(0.05)
            opened.sendall(request(bodies[0])[cut:])
            assert answers(opened, 2) == [expected[5], expected[0]]
    with connected(client) as opened:  # by chunks, and with a question back
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(bodies[1]), bodies[1])
        opened.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)
        assert answers(opened, 1) == [expected[1]]
        opened.sendall(request(bodies[2], b"Expect: 100-continue")[: -len(bodies[2])])
        assert opened.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        opened.sendall(bodies[2])
        assert answers(opened, 1) == [expected[2]]


def test_what_is_refused_leaves_the_connection_usable(client: httpx.Client) -> None:
    with connected(client) as opened:
        for body, headers, status in (
            (b"{", (), 400),
            (b'{"dep_delay": "late"}', (), 422),
            (b"{}", (b"Content-Encoding: gzip",), 415),
            (b"{}", (), 200),
        ):
            opened.sendall(request(body, *headers))
            ((answered, document),) = answers(opened, 1)
            assert answered == status
            assert status == 200 or document["status"] == status
        opened.sendall(request(b"{}", b"Connection: close"))
        assert answer(opened).startswith(b"HTTP/1.1 200 ")


def test_each_is_counted(client: httpx.Client) -> None:
    def counted() -> tuple[float, float, float]:
        samples = scrape(client)
        labels = ("handler=/predict", "method=POST")
        requests = (samples.get(("tailstream_http_requests_total", *labels, f"status={s}"), 0) for s in (200, 422))
        return *requests, samples["tailstream_predictions_total",]

    before = counted()
    for body in (b'{"instances": [{}, {}, {}]}', b'{"instances": []}'):
        client.post("/predict", content=body)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 3]
