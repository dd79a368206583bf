import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.s3 import S3Server
from tests.trainer.stream import make_manifest, make_settings
from trainer.config import Settings
from trainer.disk_storage import DiskStorage
from trainer.errors import SnapshotCorrupt, SnapshotError, SnapshotMismatch, StoreLocked
from trainer.manifest import Manifest, check_fits
from trainer.snapshot import KEEP_NEWEST, MODEL_FILE, TRAINING_FILE, SnapshotStore, open_store
from trainer.storage import ACTIVE_FILE, MANIFEST_FILE

FILES = (MODEL_FILE, TRAINING_FILE, MANIFEST_FILE)
SETTINGS = make_settings()
HOLDER = """
import sys, time
from pathlib import Path
from trainer.snapshot import SnapshotStore
with SnapshotStore(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def disk(tmp_path: Path) -> SnapshotStore:
    store = SnapshotStore(tmp_path / "store")
    store.storage.path.mkdir()
    return store


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SnapshotStore]:
    """A store on a disk, and one in S3: what is read must be the same."""
    if request.param == "disk":
        yield request.getfixturevalue("disk")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        store = open_store(server.settings(cache=str(tmp_path / "cache")))
        store.storage.server = server
        with store.lock():
            yield store


def part(store: SnapshotStore, version: int, name: str) -> Path:
    """The file that holds a part of a snapshot."""
    where = store.storage.locate(version, name)
    return store.storage.server.file(where) if where.startswith("s3://") else Path(where)


def write(store: SnapshotStore, number: float = 0.0, **changes: Any) -> Manifest:
    return store.write(make_manifest(SETTINGS, **changes), *tensors(number))


def tensors(number: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = {"weight": torch.full((3, 2), number), "mean": torch.tensor(number, dtype=torch.float64)}
    return model, {
        "step": torch.tensor(int(number)),
        "empty": torch.empty(0, 4),
        "random": torch.arange(5, dtype=torch.uint8),
    }


def test_what_is_written_is_read_back(store: SnapshotStore) -> None:
    manifest = write(store, 1.5, step=12, topic_id="id", partitions={3: {"next_offset": 4}})
    assert (manifest.version, manifest.step) == (1, 12)
    assert manifest.created_s > 1.7e9
    snapshot = store.load(1, training=True)
    assert snapshot.manifest == manifest
    for found, expected in zip(snapshot[1:], tensors(1.5), strict=True):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert store.load(1, training=False).training == {}
    assert sorted(path.name for path in part(store, 1, MODEL_FILE).parent.iterdir()) == sorted(FILES)
    assert {entry.bytes for entry in manifest.files.values()} == {
        part(store, 1, name).stat().st_size for name in (MODEL_FILE, TRAINING_FILE)
    }


def test_a_store_that_is_absent_or_empty_has_no_snapshot(store: SnapshotStore, tmp_path: Path) -> None:
    for empty in (store, SnapshotStore(tmp_path / "absent")):
        assert empty.versions() == []
        assert empty.newest(training=True) == (None, [])
        with pytest.raises(SnapshotCorrupt, match="snapshot 1 has no valid manifest"):
            empty.load(1, training=True)


def test_a_store_that_cannot_be_read_is_an_error_and_not_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SnapshotError, match="cannot be read"):
        SnapshotStore(tmp_path / "file").versions()


def missing(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def of_another_version(path: Path) -> None:
    shutil.copy(Path(str(path).replace("00000003", "00000001")), path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [missing, emptied, torn, lengthened, bit_flipped, zeroed, of_another_version])
def test_a_damaged_snapshot_is_never_read_and_the_one_before_it_is(
    store: SnapshotStore, name: str, damage: Callable[[Path], None]
) -> None:
    write(store, 1.0)
    good = write(store, 2.0)
    write(store, 3.0)
    damage(part(store, 3, name))
    with pytest.raises(SnapshotCorrupt):
        store.load(3, training=True)
    snapshot, faults = store.newest(training=True)
    assert snapshot is not None
    assert snapshot.manifest == good
    assert snapshot.model["weight"][0, 0] == 2.0
    on_disk = isinstance(store.storage, DiskStorage)  # there, without a manifest there is no snapshot to be faulty
    absent = damage is missing and name == MANIFEST_FILE and on_disk
    assert len(faults) == (0 if absent else 1)
    assert all("3" in str(fault) for fault in faults)


def test_a_snapshot_whose_training_file_is_damaged_can_still_predict(store: SnapshotStore) -> None:
    write(store, 1.0)
    bit_flipped(part(store, 1, TRAINING_FILE))
    assert store.load(1, training=False).model["weight"][0, 0] == 1.0


@pytest.mark.parametrize(
    "change",
    [{"format_version": 2}, {"files": {}}, {"more": 1}, {"partitions": {"0": {}}}, {"version": "three"}],
)
def test_a_manifest_that_says_something_unknown_is_not_believed(store: SnapshotStore, change: dict[str, Any]) -> None:
    write(store)
    path = part(store, 1, MANIFEST_FILE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert store.newest(training=True)[0] is None


def test_when_all_are_damaged_every_fault_is_told_newest_first(store: SnapshotStore) -> None:
    for _ in range(3):
        torn(part(store, write(store).version, MODEL_FILE))
    snapshot, faults = store.newest(training=False)
    assert snapshot is None
    assert [str(fault).count(f"0000000{n}") for fault, n in zip(faults, (3, 2, 1), strict=True)] == [1, 1, 1]


def test_versions_only_grow_past_damaged_and_unfinished_ones(disk: SnapshotStore) -> None:
    assert write(disk).version == 1
    torn(disk.storage.folder(1) / MANIFEST_FILE)
    assert write(disk).version == 2
    disk.storage.folder(9).mkdir()  # half removed
    (disk.storage.path / "notes").mkdir()
    assert write(disk).version == 10
    assert disk.versions() == [1, 2, 10]


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(
    disk: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(disk, 1.0)
    real = os.fsync
    for failing_call in range(1, 5):
        calls = iter(range(1, 10))

        def full(handle: int, calls: Any = calls, failing_call: int = failing_call) -> None:
            if next(calls) == failing_call:
                raise OSError(28, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(disk, 2.0)
        assert disk.versions() == [1]
        assert [path.name for path in disk.storage.path.iterdir()] == ["00000001"]
    monkeypatch.setattr(os, "fsync", real)
    assert write(disk, 2.0).version == 2


def test_what_a_crash_left_unfinished_is_not_seen_and_cleared_by_the_next_writer(disk: SnapshotStore) -> None:
    write(disk, 1.0)
    leftover = disk.storage.path / ".tmp-00000002"
    shutil.copytree(disk.storage.folder(1), leftover)
    assert disk.versions() == [1]
    with disk.lock():
        assert not leftover.exists()
    leftover.mkdir()
    (leftover / MODEL_FILE).write_text("half")
    assert write(disk, 2.0).version == 2
    assert disk.load(2, training=True).model["weight"][0, 0] == 2.0


# Keeping


def aged(store: SnapshotStore, version: int, now_s: float, age_s: float) -> None:
    os.utime(store.storage.folder(version) / MANIFEST_FILE, (now_s - age_s,) * 2)


def test_the_newest_five_one_an_hour_for_a_day_and_the_active_one_are_kept(disk: SnapshotStore) -> None:
    now_s = 1_800_000_000.0 // 3600 * 3600 + 1800  # half past
    ages_h = [30.0, 26.1, 26.0, 23.2, 23.1, 23.0, 2.2, 2.1, 2.0, 0.4, 0.3, 0.2, 0.1, 0.0]
    for age_h in ages_h:
        aged(disk, write(disk).version, now_s, age_h * 3600)
    (disk.storage.path / ACTIVE_FILE).write_text('{"version": 2}')
    removed = disk.prune(now_s)
    assert disk.versions() == [2, 4, 7, 10, 11, 12, 13, 14]
    assert removed == [1, 3, 5, 6, 8, 9]
    assert not any(disk.storage.folder(version).exists() for version in removed)
    assert disk.prune(now_s) == []
    assert all(disk.load(version, training=True) for version in disk.versions())


def test_the_newest_healthy_one_is_kept_however_long_ago_the_model_went_astray(disk: SnapshotStore) -> None:
    for number in range(12):
        aged(disk, write(disk, healthy=number == 1).version, 2e9, 1e9)
    disk.prune(2e9)
    assert disk.versions() == [2, 8, 9, 10, 11, 12]


def test_few_snapshots_are_all_kept_however_old(disk: SnapshotStore) -> None:
    for _ in range(KEEP_NEWEST):
        aged(disk, write(disk).version, 2e9, 1e9)
    assert disk.prune(2e9) == []


@pytest.mark.parametrize(
    ("text", "version"),
    [('{"version": 7}', 7), ('{"version": null}', None), ("{", None), ("[]", None), ('{"version": "7"}', None)],
)
def test_the_pinned_version_is_read_or_taken_for_none(store: SnapshotStore, text: str, version: int | None) -> None:
    assert store.active() is None
    store.storage.write_active(text.encode())
    assert store.active() == version


def test_what_is_pinned_may_be_there_as_long_as_it_cannot_be_read_so_nothing_is_removed(disk: SnapshotStore) -> None:
    for hour in range(8):
        aged(disk, write(disk).version, 2e9, 86400.0 * (1 + hour))
    (disk.storage.path / ACTIVE_FILE).mkdir()  # reading it fails for root too
    with pytest.raises(SnapshotError, match=r"active\.json cannot be read"):
        disk.prune(2e9)
    assert len(disk.versions()) == 8


def test_a_version_removed_while_it_is_pinned_is_not_pinned(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        write(store)
    store.pin(2)
    write_active = store.storage.write_active

    def write_active_too_late(data: bytes | None) -> None:
        write_active(data)
        shutil.rmtree(part(store, 1, MODEL_FILE).parent, ignore_errors=True)

    monkeypatch.setattr(store.storage, "write_active", write_active_too_late)
    with pytest.raises(SnapshotCorrupt):
        store.pin(1)
    assert store.active() == 2


def test_a_pin_that_was_cut_off_does_not_stand_in_the_way_of_the_next(disk: SnapshotStore) -> None:
    write(disk)
    (disk.storage.path / f"{ACTIVE_FILE}.{os.getpid()}").write_text('{"ver')
    disk.pin(1)
    assert disk.active() == 1
    assert sorted(path.name for path in disk.storage.path.iterdir()) == ["00000001", ACTIVE_FILE]


# One writer


def hold(store: SnapshotStore) -> "subprocess.Popen[str]":
    """A process that holds the store's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.storage.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_killed(disk: SnapshotStore) -> None:
    with hold(disk) as process:
        with pytest.raises(StoreLocked, match=rf"another trainer writes .* \(pid {process.pid} on .+\)"), disk.lock():
            pass
        assert disk.versions() == []  # reading needs no lock
        process.send_signal(signal.SIGKILL)
        process.wait()
    with disk.lock():
        assert str(os.getpid()) in (disk.storage.path / ".lock").read_text()


def test_a_lock_is_let_go_of_and_holds_within_one_process_too(disk: SnapshotStore) -> None:
    with (
        disk.lock(),
        pytest.raises(StoreLocked, match=f"pid {os.getpid()} "),
        SnapshotStore(disk.storage.path).lock(),
    ):
        pass
    with disk.lock():
        pass


def test_a_refused_writer_clears_nothing_away(disk: SnapshotStore) -> None:
    with disk.lock():
        (disk.storage.path / ".tmp-00000001").mkdir()
        with pytest.raises(StoreLocked), disk.lock():
            pass
        assert (disk.storage.path / ".tmp-00000001").exists()


def test_a_store_is_made_by_its_writer_or_said_to_be_impossible(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "deep" / "store").lock():
        assert (tmp_path / "deep" / "store").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="cannot be written to"), SnapshotStore(tmp_path / "file").lock():
        pass


def test_a_file_system_without_locks_is_said_to_be_none_for_a_store(
    disk: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(SnapshotError, match=r"cannot be locked .* No locks available; put it"), disk.lock():
        pass


# Another model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": {"label": "cost"}}, ["schema.label: the store has 'price', the configuration 'cost'"]),
        (
            {"schema": {"features": {"size": "numeric", "kind": "categorical"}}},
            ["schema.features (order): ", "schema.features.age: the store has {'kind': 'numeric'"],
        ),
        (
            {"schema": {"features": {"age": "numeric", "size": "numeric", "kind": "categorical"}}},
            ["schema.features (order): the store has ['size', 'age', 'kind'], the configuration ['age', 'size'"],
        ),
        (
            {"schema": {"features": {"size": "numeric", "age": "categorical", "kind": "categorical"}}},
            ["schema.features.age: the store has {'kind': 'numeric'"],
        ),
        ({"model": {"hidden": [13]}}, ["model.hidden: the store has [12], the configuration [13]"]),
        ({"model": {"category_buckets": 17}}, ["model.category_buckets"]),
        ({"model": {"head": "gaussian"}}, ["model.head: the store has 'mixture', the configuration 'gaussian'"]),
        ({"learner": {"loss": "nll"}}, ["learner.loss"]),
        ({"learner": {"sigma": 0.3}}, ["learner.sigma: the store has 'learned', the configuration 0.3"]),
        ({"learner": {"replay_rows": 64}}, ["learner.replay_rows"]),
        (
            {"model": {"embedding": 4}, "learner": {"loss": "nll"}},
            ["model.embedding", "learner.loss"],
        ),
    ],
)
def test_a_store_of_another_model_is_refused_with_each_difference(change: dict[str, Any], named: list[str]) -> None:
    manifest = make_manifest(SETTINGS, version=8)
    with pytest.raises(SnapshotMismatch) as caught:
        check_fits(manifest, make_settings(**change))
    message = str(caught.value)
    assert "snapshot 8" in message
    assert message.count(": the store has ") == len(named)
    for part in named:
        assert f"\n  {part}" in message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"learner": {"lr": 1e-4, "replay_steps": 7, "label_memory": 5}},
        {"kafka": {"topic": "elsewhere"}, "batch": {"size": 7}, "seed": 5},
        {"schema": {"id": None, "time": "at"}},
    ],
)
def test_what_may_change_between_runs_is_accepted(change: dict[str, Any]) -> None:
    stored = Manifest.model_validate_json(make_manifest(SETTINGS).model_dump_json())
    check_fits(stored, make_settings(**change))


def test_settings_that_are_tables_or_lists_compare_after_a_trip_through_json() -> None:
    settings: Settings = make_settings(
        model={"head": "gaussian"},
        learner={"sigma": {"label_units": 8.0}},
        schema={"features": {"v": {"kind": "vector", "size": 3}, "c": {"kind": "categorical", "buckets": 9}}},
    )
    check_fits(Manifest.model_validate_json(make_manifest(settings).model_dump_json()), settings)


def test_a_store_from_before_a_setting_was_there_fits_its_default() -> None:
    stored = make_manifest(SETTINGS)
    older = stored.model_copy(update={"model": {k: v for k, v in stored.model.items() if k != "components"}})
    check_fits(older, SETTINGS)
    with pytest.raises(SnapshotMismatch, match=r"model\.components: the store has 4"):
        check_fits(older, make_settings(model={"components": 3}))
