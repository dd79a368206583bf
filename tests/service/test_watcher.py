"""Which snapshot answers: the newest that is whole, healthy and fits; and swapping never shows."""

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from service.watcher import Watcher
from tests.service.conftest import for_both_tasks, running, until
from tests.service.store import answer_of, columns_of, in_process, instance, make_settings, write_snapshot
from trainer.config import Settings
from trainer.snapshot import MODEL_FILE, SnapshotStore
from trainer.storage import ACTIVE_FILE, MANIFEST_FILE


def watch(settings: Settings) -> Watcher:
    watcher = Watcher(SnapshotStore(settings.store.path), settings)
    watcher.poll()
    return watcher


def version(watcher: Watcher) -> int | None:
    watcher.poll()
    return watcher.predictor and watcher.predictor.version


def break_file(settings: Settings, version: int, name: str) -> None:
    path = settings.store.path / f"{version:08d}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_absent_store_is_waited_for(empty: Settings) -> None:
    watcher = watch(empty)
    assert watcher.predictor is None
    assert str(empty.store.path) in str(watcher.trouble)
    write_snapshot(empty)
    assert version(watcher) == 1
    assert watcher.trouble is None


def test_each_newer_snapshot_is_taken(empty: Settings) -> None:
    write_snapshot(empty, seed=1)
    watcher = watch(empty)
    first = watcher.predictor
    assert version(watcher) == 1
    assert watcher.predictor is first  # loaded once
    write_snapshot(empty, seed=2)
    write_snapshot(empty, seed=3)
    assert version(watcher) == 3


def test_a_model_that_has_learned_nothing_does_not_answer(empty: Settings) -> None:
    write_snapshot(empty, samples=0)
    watcher = watch(empty)
    assert watcher.predictor is None
    assert watcher.trouble == "snapshot 1 has not learned from any sample yet"
    write_snapshot(empty)
    assert version(watcher) == 2


@pytest.mark.parametrize("name", [MODEL_FILE, MANIFEST_FILE])
def test_a_corrupt_snapshot_keeps_the_old_model(empty: Settings, name: str) -> None:
    write_snapshot(empty)
    watcher = watch(empty)
    write_snapshot(empty, seed=2)
    break_file(empty, 2, name)
    assert version(watcher) == 1
    assert "2" in str(watcher.trouble)
    write_snapshot(empty, seed=3)
    assert version(watcher) == 3
    assert watcher.trouble is None


def test_at_start_a_corrupt_snapshot_is_passed_over(empty: Settings) -> None:
    write_snapshot(empty)
    write_snapshot(empty)
    break_file(empty, 2, MODEL_FILE)
    assert version(watch(empty)) == 1


def test_an_unhealthy_snapshot_keeps_the_healthy_model(empty: Settings) -> None:
    write_snapshot(empty)
    watcher = watch(empty)
    write_snapshot(empty, healthy=False)
    assert version(watcher) == 1
    assert "unhealthy" in str(watcher.trouble)
    assert version(watch(empty)) == 1  # a service started now too
    write_snapshot(empty)
    assert version(watcher) == 3


def test_an_unhealthy_model_answers_until_there_is_a_healthy_one(empty: Settings) -> None:
    write_snapshot(empty, healthy=False)
    watcher = watch(empty)
    assert version(watcher) == 1
    assert "unhealthy" in str(watcher.trouble)
    write_snapshot(empty, healthy=False)
    assert version(watcher) == 2
    write_snapshot(empty, healthy=True)
    assert version(watcher) == 3
    write_snapshot(empty, healthy=False)
    assert version(watcher) == 3


def test_the_last_healthy_model_stays_when_retention_removed_it(empty: Settings) -> None:
    """An hourly snapshot from long ago is healthy too, but the model must not fall back to it."""
    for healthy in (True, True, False, False):
        write_snapshot(empty, healthy=healthy)
    watcher = watch(empty)
    assert version(watcher) == 2
    remove(empty, 2)
    assert version(watcher) == 2
    assert version(watch(empty)) == 1


def test_a_model_of_another_configuration_is_refused(empty: Settings, tmp_path: Path) -> None:
    write_snapshot(empty)
    watcher = watch(empty)
    write_snapshot(make_settings(tmp_path / "store", hidden=(8,)))
    assert version(watcher) == 1
    assert "model.hidden" in str(watcher.trouble)


def test_tensors_that_do_not_fit_their_manifest_are_refused(empty: Settings, tmp_path: Path) -> None:
    other = make_settings(tmp_path / "store", hidden=(8,))
    write_snapshot(other, model=empty.model.model_dump(mode="json"))
    watcher = watch(empty)
    assert watcher.predictor is None
    assert "cannot be loaded" in str(watcher.trouble)


def test_a_pinned_version_is_followed_and_let_go(empty: Settings) -> None:
    for _ in range(3):
        write_snapshot(empty)
    watcher = watch(empty)
    assert version(watcher) == 3
    (empty.store.path / ACTIVE_FILE).write_text('{"version": 2}')
    assert version(watcher) == 2
    write_snapshot(empty)
    assert version(watcher) == 2
    (empty.store.path / ACTIVE_FILE).unlink()
    assert version(watcher) == 4


def test_while_the_pin_cannot_be_read_what_was_pinned_stays_so(empty: Settings) -> None:
    for _ in range(2):
        write_snapshot(empty)
    pin = empty.store.path / ACTIVE_FILE
    pin.write_text('{"version": 1}')
    watcher = watch(empty)
    assert version(watcher) == 1
    pin.unlink()
    pin.mkdir()  # reading it fails for root too
    assert version(watcher) == 1
    assert ACTIVE_FILE in str(watcher.trouble)
    assert version(watch(empty)) == 2  # one that was just started knows of no pin, and answers all the same


def test_a_store_begun_anew_is_followed(empty: Settings) -> None:
    write_snapshot(empty, seed=1)
    write_snapshot(empty, seed=2)
    watcher = watch(empty)
    remove(empty, 1)
    remove(empty, 2)
    assert version(watcher) == 2  # a store that is gone leaves the model
    assert watcher.trouble is not None
    write_snapshot(empty, seed=3)
    assert version(watcher) == 1


def remove(settings: Settings, version: int) -> None:
    shutil.rmtree(settings.store.path / f"{version:08d}")


def test_the_service_is_ready_once_there_is_a_snapshot(empty: Settings) -> None:
    with running(empty) as client:
        assert client.get("/livez").status_code == 200
        for path in ("/readyz", "/healthz", "/model"):
            response = client.get(path)
            assert response.status_code == 503
            assert "no snapshot" in response.json()["detail"]
        refused = client.post("/predict", json=instance(0))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/").status_code == 200
        assert client.get("/metrics").status_code == 200

        write_snapshot(empty)
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/healthz").json() == {"status": "ready", "model_version": 1}
        assert client.post("/predict", json=instance(0)).json()["model_version"] == 1


def test_an_old_model_is_not_ready_while_records_wait(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "store", max_model_age_s=1e-6)
    write_snapshot(settings, lag_records=0)
    with running(settings) as client:
        assert client.get("/readyz").status_code == 200
        write_snapshot(settings, lag_records=17)
        until(lambda: client.get("/readyz").status_code == 503)
        assert "17 records" in client.get("/readyz").json()["detail"]
        assert client.post("/predict", json=instance(0)).status_code == 200


@for_both_tasks
def test_swapping_under_load_fails_and_mixes_nothing(empty: Settings) -> None:
    """Every answer is wholly of the version that it names."""
    write_snapshot(empty, seed=1)
    asked: dict[str, Any] = {"balance": 1.0, **({"interval": 0.9} if empty.task == "regression" else {"top": 3})}
    body = {"instances": [instance(i) for i in range(5)], **asked}
    answers: list[tuple[int, Any]] = []
    done = threading.Event()
    with running(empty) as client:

        def ask() -> None:
            while not done.is_set():
                response = client.post("/predict", json=body)
                answers.append((response.status_code, response.json()))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for thread in clients:
            thread.start()
        try:
            for seed in range(2, 14):
                write_snapshot(empty, seed=seed)
                until(lambda seed=seed: bool(answers) and answers[-1][1].get("model_version") == seed)  # type: ignore[misc]
        finally:
            done.set()
            for thread in clients:
                thread.join()

    own = {version: answer_of(in_process(empty, version), columns_of(empty, 5), asked) for version in range(1, 14)}
    assert {status for status, _ in answers} == {200}
    assert {answer["model_version"] for _, answer in answers} == set(own)
    told = [{**answer, "model_version": None} for answer in own.values()]
    assert all(one != other for one, other in itertools.combinations(told, 2))  # or mixing would not show
    assert all(answer == own[answer["model_version"]] for _, answer in answers)
