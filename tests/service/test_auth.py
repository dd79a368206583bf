"""Who may ask, and from where."""

from pathlib import Path

import pytest

from service.auth import check_reach, load_keys
from tests.service.conftest import running
from tests.service.store import instance, make_settings, write_snapshot
from trainer.config import ServiceSettings
from trainer.errors import ConfigError

KEYS = """
# name:key
alice:a-long-key-1
bob: with:colon
"""


def test_keys_guard_predictions_and_the_model(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "keys"))
    write_snapshot(settings)
    with running(settings) as client:
        for path in ("/model", "/events", "/no/such/path"):
            response = client.get(path)
            assert response.status_code == 401
            assert response.headers["content-type"] == "application/problem+json"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/predict", json=instance(0)).status_code == 401
        for wrong in ("a-long-key", "a-long-key-12", "alice", "alice:a-long-key-1", ""):
            headers = {"X-API-Key": wrong}
            assert client.post("/predict", json=instance(0), headers=headers).status_code == 401
            headers = {"Authorization": f"Bearer {wrong}x"}
            assert client.post("/predict", json=instance(0), headers=headers).status_code == 401
        both = {"X-API-Key": "a-long-key-1", "Authorization": "Bearer wrong"}
        assert client.post("/predict", json=instance(0), headers=both).status_code == 401
        for right in (
            {"X-API-Key": "a-long-key-1"},
            {"Authorization": "Bearer a-long-key-1"},
            {"Authorization": "bearer with:colon"},
        ):
            assert client.post("/predict", json=instance(0), headers=right).status_code == 200
            assert client.get("/model", headers=right).status_code == 200
        for path in ("/", "/livez", "/readyz", "/healthz", "/metrics", "/docs", "/openapi.json", "/dashboard/app.js"):
            assert client.get(path).status_code == 200
        document = client.get("/openapi.json").json()
        assert document["paths"]["/predict"]["post"]["security"] == [{"bearer": []}, {"api_key": []}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alice", "line 1"),
        ("a:b\nalice:", "line 2"),
        (":key", "line 1"),
        ("a:b\na:c", "second time"),
        ("# nobody\n", "no key"),
    ],
)
def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_keys(tmp_path / "keys")


def test_an_absent_file_of_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(tmp_path / "keys")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", ""])
def test_without_keys_only_loopback_may_be_bound(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_reach(ServiceSettings(host=host))
    check_reach(ServiceSettings(host=host, allow_unauthenticated=True))
    check_reach(ServiceSettings(host=host, api_keys_file="keys"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_reach(ServiceSettings(host=host))


def test_a_host_that_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"service\.host"):
        check_reach(ServiceSettings(host="no such host"))


def test_requests_are_counted_by_the_name_of_their_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "keys"), metrics_need_key=True)
    write_snapshot(settings)
    with running(settings) as client:
        for key, path in (("a-long-key-1", "/predict"), ("with:colon", "/predict"), ("wrong", "/predict")):
            client.post(path, json=instance(0), headers={"X-API-Key": key})
        client.get("/model", headers={"X-API-Key": "with:colon"})
        assert client.get("/metrics").status_code == 401
        text = client.get("/metrics", headers={"X-API-Key": "a-long-key-1"}).text
        operation = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    counted = [line for line in text.splitlines() if line.startswith("tailstream_api_key_requests_total")]
    assert counted == [
        'tailstream_api_key_requests_total{key="alice"} 2.0',
        'tailstream_api_key_requests_total{key="bob"} 2.0',
    ]
    assert operation["security"]
