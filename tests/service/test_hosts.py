"""By which names the service may be called: what a browser says that was lured here by another name is refused."""

import json
import socket
from pathlib import Path

import httpx
import pytest

from service.hosts import Hosts
from service.problems import Problem
from tests.service.conftest import running
from tests.service.store import instance, make_settings, write_snapshot
from trainer.config import ServiceSettings, Settings

LOOPBACK = ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:8000", "127.3.2.1", "[::1]:8000", "app.localhost"]
FOREIGN = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost"),
    *("192.0.2.7", "[2001:db8::7]:80", "0.0.0.0", "", "localhost@evil.example", "[::1].evil.example.", "\xe9vil"),
]


def is_let_in(hosts: Hosts | None, name: str) -> bool:
    if hosts is None:
        return True
    try:
        hosts.check([(b"accept", b"*/*"), (b"host", name.encode("latin-1"))])
    except Problem:
        return False
    return True


@pytest.mark.parametrize("name", [*LOOPBACK, *FOREIGN])
def test_without_keys_only_names_of_this_host_are_answered(name: str) -> None:
    hosts = Hosts.of(ServiceSettings())
    for _ in range(2):  # what was fine once is remembered
        assert is_let_in(hosts, name) == (name in LOOPBACK)


@pytest.mark.parametrize(
    ("settings", "fine", "foreign"),
    [
        ({"allowed_hosts": ["Predict.example.org"]}, "predict.example.org:80", "example.org"),
        ({"allowed_hosts": ["*.example.org"]}, "a.b.example.org.", "example.org"),
        ({"allowed_hosts": ["*.example.org"]}, "localhost:8000", "evilexample.org"),
        ({"allowed_hosts": ["a", "::7"]}, "[::7]:80", "b"),
        ({"allowed_hosts": ["a"], "api_keys_file": "keys"}, "a", "b"),
        ({"allowed_hosts": ["a"], "allow_unauthenticated": True, "host": "192.0.2.7"}, "192.0.2.7:8000", "b"),
        ({"host": "localhost"}, "localhost", "b"),
        ({"allowed_hosts": ["*"]}, "anything", None),
        ({"api_keys_file": "keys"}, "anything", None),
        ({"allow_unauthenticated": True, "host": "0.0.0.0"}, "service:8000", None),
    ],
)
def test_names_that_a_configuration_allows(settings: dict[str, object], fine: str, foreign: str | None) -> None:
    hosts = Hosts.of(ServiceSettings.model_validate(settings))
    assert is_let_in(hosts, fine)
    assert foreign is None or not is_let_in(hosts, foreign)


def test_one_wrong_name_is_enough() -> None:
    hosts = Hosts.of(ServiceSettings())
    assert hosts is not None
    with pytest.raises(Problem, match=r"service\.allowed_hosts"):
        hosts.check([(b"host", b"localhost"), (b"host", b"evil.example")])
    hosts.check([])  # no browser: an old probe


def test_allowed_hosts_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAILSTREAM_SERVICE__ALLOWED_HOSTS", "a.example,*.b.example")
    settings = make_settings(tmp_path)
    service = Settings(**{**settings.model_dump(by_alias=True), "service": {}}).service
    assert service.allowed_hosts == ["a.example", "*.b.example"]


@pytest.mark.parametrize("name", ["a.example:80", "https://a.example", "*a.example", "a.*.example", ""])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no host name"):
        ServiceSettings(allowed_hosts=[name])


def test_a_page_that_had_its_name_resolve_to_this_host_gets_nothing(client: httpx.Client) -> None:
    evil = {"Host": f"evil.example:{client.base_url.port}"}
    for method, path in (
        *(
            ("GET", path)
            for path in ("/", "/model", "/models", "/metrics", "/livez", "/events", "/docs", "/openapi.json")
        ),
        *(("GET", path) for path in ("/dashboard/app.js", "/no/such/path")),
        *(("POST", path) for path in ("/predict", "/predict?version=1", "/predict/density", "/models/1/activate")),
    ):
        response = client.request(method, path, headers=evil, json=instance(0) if method == "POST" else None)
        assert response.status_code == 421, path
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.json()["type"] == "urn:tailstream:problem:misdirected"
    assert client.post("/predict", json=instance(0)).status_code == 200
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as opened:
        opened.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert opened.recv(64).startswith(b"HTTP/1.1 200")


def test_the_description_says_so_only_where_names_are_checked(client: httpx.Client, tmp_path: Path) -> None:
    described = client.get("/openapi.json").json()["paths"]
    assert all("421" in operation["responses"] for path in described.values() for operation in path.values())
    settings = make_settings(tmp_path / "store", allowed_hosts=["*"])
    write_snapshot(settings)
    with running(settings) as any_name:
        assert "421" not in json.dumps(any_name.get("/openapi.json").json())
        assert any_name.post("/predict", json=instance(0), headers={"Host": "evil.example"}).status_code == 200
