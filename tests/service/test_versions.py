"""Kept versions over HTTP: listed, asked, and stayed with by every service of the store."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import versions
from tests.service.conftest import for_both_tasks, running, until
from tests.service.store import answer_of, columns_of, in_process, instance, make_settings, write_snapshot
from trainer.config import Settings
from trainer.snapshot import MODEL_FILE, SnapshotStore
from trainer.storage import ACTIVE_FILE

KEY = {"X-API-Key": "a-long-key-1"}


@pytest.fixture
def three(empty: Settings) -> Settings:
    """Settings whose store keeps three versions that answer differently."""
    for seed in (1, 2, 3):
        write_snapshot(empty, seed=seed)
    return empty


def ask(client: httpx.Client, version: Any = None) -> httpx.Response:
    path = "/predict" if version is None else f"/predict?version={version}"
    return client.post(path, json={"instances": [instance(i) for i in range(5)], "balance": 0.3})


def in_use(client: httpx.Client) -> int:
    version: int = client.get("/model").json()["version"]
    return version


def refused(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == f"urn:tailstream:problem:{kind}"
    detail: str = problem["detail"]
    return detail


def test_the_versions_kept_are_listed_from_the_newest(three: Settings) -> None:
    write_snapshot(three, healthy=False, metrics={}, train_loss=None, copy_of=2)
    with running(three) as client:
        listed = client.get("/models").json()
    assert (listed["in_use"], listed["pinned"]) == (3, None)
    assert [model["version"] for model in listed["models"]] == [4, 3, 2, 1]
    newest, healthy = listed["models"][:2]
    assert (newest["healthy"], newest["copy_of"], newest["mae"], newest["train_loss"]) == (False, 2, None, None)
    assert (healthy["healthy"], healthy["mae"], healthy["balanced_mae"], healthy["samples"]) == (True, 10.0, 22.0, 320)
    files = [
        path for path in SnapshotStore(three.store.path).storage.folder(3).iterdir() if path.suffix == ".safetensors"
    ]
    assert healthy["bytes"] == sum(path.stat().st_size for path in files)


def test_a_store_without_versions_is_an_empty_list(empty: Settings) -> None:
    with running(empty) as client:
        assert client.get("/models").json() == {"in_use": None, "pinned": None, "models": []}


@for_both_tasks
def test_any_version_answers_as_it_would_in_process(three: Settings) -> None:
    columns = columns_of(three, 5)
    with running(three) as client:
        for version in (1, 3, 2, 1):
            answer = ask(client, version).json()
            assert answer == answer_of(in_process(three, version), columns, {"balance": 0.3})
            assert answer["model_version"] == version
        assert ask(client).json()["model_version"] == 3


def test_more_versions_than_stay_loaded_can_be_asked(empty: Settings) -> None:
    many = range(1, versions.KEPT_LOADED + 3)
    for seed in many:
        write_snapshot(empty, seed=seed)
    with running(empty) as client:
        first = {version: ask(client, version).json() for version in many}
        assert {version: ask(client, version).json() for version in many} == first
        assert {answer["model_version"] for answer in first.values()} == set(many)


@pytest.mark.parametrize("version", ["0", "-1", "one", "", "1.5", "1&version=2", str(2**53)])
def test_what_is_no_version_is_refused(three: Settings, version: str) -> None:
    with running(three) as client:
        assert "query.version" in refused(ask(client, version), 422, "invalid-request")


def test_a_version_that_is_not_kept_is_said(three: Settings) -> None:
    with running(three) as client:
        assert "no version 9" in refused(ask(client, 9), 404, "no-such-version")
        assert "no version 9" in refused(client.post("/models/9/activate"), 404, "no-such-version")
        assert ask(client, 1).status_code == 200
        shutil.rmtree(SnapshotStore(three.store.path).storage.folder(1))
        refused(ask(client, 1), 404, "no-such-version")  # also what had been loaded
    assert not (three.store.path / ACTIVE_FILE).exists()


def test_a_version_that_cannot_answer_is_said_and_not_pinned(three: Settings, tmp_path: Path) -> None:
    damaged = SnapshotStore(three.store.path).storage.folder(1) / MODEL_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    write_snapshot(make_settings(tmp_path / "store", hidden=(8,)))
    with running(three) as client:
        assert MODEL_FILE in refused(ask(client, 1), 409, "unusable-version")
        refused(client.post("/models/1/activate"), 409, "unusable-version")
        assert "model.hidden" in refused(client.post("/models/4/activate"), 409, "unusable-version")
        assert in_use(client) == 3
    assert not (three.store.path / ACTIVE_FILE).exists()


@for_both_tasks
def test_every_service_of_the_store_rolls_back_and_follows_again(three: Settings) -> None:
    with running(three) as here, running(three) as there:
        assert here.post("/models/1/activate").json() in ({"pinned": 1, "in_use": 3}, {"pinned": 1, "in_use": 1})
        for client in (here, there):
            until(lambda client=client: in_use(client) == 1)  # type: ignore[misc]
            assert client.get("/model").json()["pinned"] == 1
            assert client.get("/models").json()["pinned"] == 1
            assert "tailstream_model_pinned 1.0" in client.get("/metrics").text
            assert ask(client).json()["model_version"] == 1
        write_snapshot(three, seed=4)
        until(lambda: here.get("/models").json()["models"][0]["version"] == 4)
        assert in_use(here) == 1
        released = there.post("/models/latest/activate").json()
        assert released["pinned"] is None
        assert released["in_use"] in (1, 4)  # a poll may have been faster than the answer
        for client in (here, there):
            until(lambda client=client: in_use(client) == 4)  # type: ignore[misc]
            assert "tailstream_model_pinned 0.0" in client.get("/metrics").text
        assert there.post("/models/latest/activate").status_code == 200  # nothing to let go is fine


def test_a_pin_that_cannot_be_written_is_said(three: Settings) -> None:
    (three.store.path / ACTIVE_FILE).mkdir()  # refuses the rename and the removal, for root too
    with running(three) as client:
        assert str(three.store.path) in refused(client.post("/models/1/activate"), 503, "store")
        refused(client.post("/models/latest/activate"), 503, "store")
        assert in_use(client) == 3


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_cannot_roll_back(three: Settings, site: str) -> None:
    with running(three) as client:
        for path in ("/models/1/activate", "/models/latest/activate"):
            refused(client.post(path, headers={"Sec-Fetch-Site": site}), 403, "foreign-page")
        assert client.post("/models/3/activate", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_versions_need_the_key(three: Settings, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:a-long-key-1\n")
    keyed = make_settings(three.store.path, api_keys_file=str(tmp_path / "keys"))
    with running(keyed) as client:
        refused(client.get("/models"), 401, "unauthorized")
        refused(ask(client, 1), 401, "unauthorized")
        for path in ("/models/1/activate", "/models/latest/activate"):
            refused(client.post(path), 401, "unauthorized")
            assert client.post(path, headers=KEY).status_code == 200
        document = client.get("/openapi.json").json()
        open_paths = {"/livez", "/readyz", "/healthz", "/metrics"}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ("security" in operation) == (path not in open_paths), path
