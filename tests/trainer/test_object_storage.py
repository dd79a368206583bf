"""What an object store adds: one head that is list, lock and fence, a store that is away, a cache."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from structlog.testing import capture_logs
from typer.testing import CliRunner

from service.cli import app
from tests.s3 import BUCKET, S3Server
from tests.trainer.stream import make_manifest, make_settings
from trainer import object_storage
from trainer.batching import PartitionProgress
from trainer.config import StoreSettings
from trainer.errors import ConfigError, SnapshotCorrupt, SnapshotError, StoreLocked, StoreUnavailable
from trainer.manifest import Manifest
from trainer.object_storage import HEAD
from trainer.snapshot import MODEL_FILE, SnapshotStore, open_store

pytestmark = pytest.mark.s3
SETTINGS = make_settings()
# Holds the lock, and writes a snapshot for each line that it is sent.
WRITER = """
import sys
from tests.trainer.test_object_storage import write
from trainer.config import StoreSettings
from trainer.errors import SnapshotError
from trainer.snapshot import open_store
store = open_store(StoreSettings.model_validate_json(sys.argv[1]))
with store.lock():
    print("locked", flush=True)
    for line in sys.stdin:
        try:
            print(write(store).version, flush=True)
        except SnapshotError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
"""


def write(store: SnapshotStore, number: float = 0.0, **changes: Any) -> Manifest:
    tensors = {"weight": torch.full((3, 2), number)}
    return store.write(make_manifest(SETTINGS, **changes), tensors, tensors)


@pytest.fixture
def given(s3_server: S3Server, tmp_path: Path) -> StoreSettings:
    return s3_server.settings(cache=str(tmp_path / "cache"))


class Writer:
    def __init__(self, settings: StoreSettings) -> None:
        command = [sys.executable, "-c", WRITER, settings.model_dump_json()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        line = ""
        while line != "locked\n":  # log lines come before
            line = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it ended"
        return line

    def write(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while (line := self._line().strip()).startswith("20"):  # a log line, by its date
            pass
        return line

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def writer(given: StoreSettings) -> Iterator[Writer]:
    writer = Writer(given)
    yield writer
    writer.signal(signal.SIGKILL)
    for pipe in (writer.process.stdin, writer.process.stdout):
        assert pipe is not None
        pipe.close()


# One writer


def test_a_second_writer_is_refused_while_the_first_lives_and_told_who_that_is(
    given: StoreSettings, writer: Writer
) -> None:
    began = time.monotonic()
    with pytest.raises(StoreLocked, match=rf"another trainer writes .* \(pid {writer.process.pid} on .+\)"):
        open_store(given).storage.lock().__enter__()
    assert time.monotonic() - began < 5 * given.lease_s
    assert writer.write() == "1"
    assert open_store(given).versions() == [1]  # reading needs no lock


def test_the_lock_of_a_process_that_was_killed_on_this_machine_is_free_at_once(
    given: StoreSettings, writer: Writer
) -> None:
    assert writer.write() == "1"
    writer.signal(signal.SIGKILL)
    long = given.model_copy(update={"lease_s": 600.0})
    with open_store(long).lock():  # so that waiting for any lease would show
        assert open_store(given).versions() == [1]


def test_the_lock_of_one_that_was_killed_elsewhere_is_free_once_its_lease_has_passed(
    given: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "_process", lambda pid: None)  # as if nothing were known of any process
    writer = Writer(given)
    try:
        holder = open_store(given)
        head = holder.storage._parsed(holder.storage._objects.get(HEAD).data)
        elsewhere = head.model_copy(update={"owner": head.owner.model_copy(update={"process": None})})
        writer.signal(signal.SIGKILL)
        holder.storage._objects.put(HEAD, elsewhere.model_dump_json().encode())
        began = time.monotonic()
        with open_store(given).lock():
            assert time.monotonic() - began >= given.lease_s
    finally:
        for pipe in (writer.process.stdin, writer.process.stdout):
            pipe.close()


def test_a_writer_that_was_paused_past_its_lease_publishes_nothing_when_it_wakes_up(
    given: StoreSettings, writer: Writer
) -> None:
    assert writer.write() == "1"
    writer.signal(signal.SIGSTOP)
    store = open_store(given)
    with store.lock():
        second = write(store, 2.0)
        assert (second.version, second.fence) == (2, 2)
        writer.signal(signal.SIGCONT)
        said = writer.write()
        assert said.startswith("StoreLocked: the lock of ")
        assert f"pid {os.getpid()} on" in said
        assert "fencing number 2" in said
        assert store.versions() == [1, 2]
        assert store.load(2, training=True).model["weight"][0, 0] == 2.0
        assert write(store, 3.0).version == 3
    with open_store(given).lock():  # what the first uploaded after all is cleared away
        folders = {key.partition("/")[0] for key in store.storage._objects.list()} - {HEAD}
    assert folders == {"00000001.0001", "00000002.0002", "00000003.0002"}


def test_a_manifest_of_a_writer_that_the_head_does_not_name_is_not_believed(given: StoreSettings) -> None:
    store = open_store(given)
    with store.lock():
        write(store)
        write(store)
        key = "00000002.0001/manifest.json"
        other = store.storage._objects.get(key).data.replace(b'"fence": 1', b'"fence": 7')
        store.storage._objects.put(key, other)
        with pytest.raises(SnapshotCorrupt):
            store.manifest(2)
        assert store.newest(training=True)[0].manifest.version == 1


def test_an_idle_writer_keeps_its_lock_and_lets_go_of_it_at_the_end(given: StoreSettings) -> None:
    store = open_store(given)
    with store.lock():
        time.sleep(2.5 * given.lease_s)
        with pytest.raises(StoreLocked):
            open_store(given).storage.lock().__enter__()
        assert write(store).version == 1
    began = time.monotonic()
    with open_store(given).lock():
        assert time.monotonic() - began < given.lease_s


def test_an_answer_that_gets_lost_on_the_way_publishes_once(
    given: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(given)
    with store.lock():
        objects = store.storage._objects
        replace = objects.replace

        def answer_lost(*given: Any) -> None:
            replace(*given)  # the client tries again, and finds its own work in the way

        monkeypatch.setattr(objects, "replace", answer_lost)
        assert write(store).version == 1

        def server_gone(*given: Any) -> None:
            replace(*given)
            raise StoreUnavailable("no answer")

        monkeypatch.setattr(objects, "replace", server_gone)
        with pytest.raises(StoreUnavailable):
            write(store)
        monkeypatch.setattr(objects, "replace", replace)
        assert write(store).version == 3
    assert open_store(given).versions() == [1, 2, 3]
    assert open_store(given).newest(training=True)[1] == []


# What lies there


def test_what_lies_there_does_not_grow_with_age(given: StoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1_800_000_000, 1800)  # two snapshots an hour
    monkeypatch.setattr(object_storage.time, "time_ns", lambda: next(clock) * 10**9)
    store, sizes = open_store(given), []
    with store.lock():
        for number in range(120):
            write(store, healthy=number == 3)
            store.prune(1_800_000_000 + number * 1800)
            sizes.append(len(store.storage._objects.list()))
    assert store.versions()[-5:] == [116, 117, 118, 119, 120]
    assert 4 in store.versions()  # the newest healthy one
    assert len(store.versions()) < 5 + 26
    assert max(sizes[60:]) == sizes[-1]
    assert len(store.storage._objects.get(HEAD).data) < 8192


def test_a_pinned_version_stays(given: StoreSettings) -> None:
    store = open_store(given)
    with store.lock():
        for _ in range(3):
            write(store)
        open_store(given).pin(2)
        for _ in range(9):
            write(store)
        assert 3 in store.prune(time.time() + 1e6)
        assert open_store(given).active() == 2
        assert open_store(given).load(2, training=True)


def test_a_head_that_was_lost_is_made_anew_from_the_manifests(given: StoreSettings) -> None:
    store = open_store(given)
    with store.lock():
        for number in range(3):
            write(store, float(number))
    store.storage._objects.delete([HEAD, "00000003.0001/manifest.json"])
    assert open_store(given).versions() == []
    store = open_store(given)
    with store.lock():
        assert store.versions() == [1, 2]
        assert (write(store).version, store.manifest(3).fence) == (3, 2)
    assert open_store(given).newest(training=True)[1] == []


def test_a_head_that_is_damaged_is_said_to_be(given: StoreSettings) -> None:
    store = open_store(given)
    store.storage._objects.put(HEAD, b'{"fence": ')
    for act in (store.versions, store.storage.lock().__enter__):
        with pytest.raises(SnapshotError, match=r"head\.json is not as it was written"):
            act()


def test_models_are_fetched_once_a_machine_and_a_damaged_copy_is_fetched_again(
    given: StoreSettings, s3_server: S3Server
) -> None:
    store = open_store(given)
    with store.lock():
        write(store, 4.0)
    assert open_store(given).load(1, training=False).model["weight"][0, 0] == 4.0
    (copy,) = Path(given.cache).iterdir()
    original = s3_server.file(store.storage.locate(1, MODEL_FILE))
    data = original.read_bytes()
    original.write_bytes(b"gone")
    assert open_store(given).load(1, training=False).model["weight"][0, 0] == 4.0
    original.write_bytes(data)
    copy.write_bytes(b"damaged")
    assert open_store(given).load(1, training=False).model["weight"][0, 0] == 4.0
    assert copy.read_bytes() == data


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(given: StoreSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = given.model_copy(update={"cache": str(tmp_path / "file")})
    store = open_store(given)
    with store.lock():
        write(store, 4.0)
    with capture_logs() as logs:
        for _ in range(3):
            assert store.load(1, training=False).model["weight"][0, 0] == 4.0
    assert [line["event"] for line in logs] == ["fetched models are not kept on this disk"]


# A store that is away


@pytest.mark.parametrize(
    ("options", "bucket", "named"),
    [
        ({"secret_access_key": "wrong"}, BUCKET, ["does not let us in", "SignatureDoesNotMatch", "credentials"]),
        ({"access_key_id": "nobody"}, BUCKET, ["does not let us in", "credentials"]),
        ({}, "nobodys-bucket", ["no such bucket", "s3://nobodys-bucket"]),
        ({"endpoint": "http://127.0.0.1:1"}, BUCKET, ["cannot be reached", "127.0.0.1:1"]),
    ],
)
def test_what_is_wrong_is_said(s3_server: S3Server, options: dict[str, str], bucket: str, named: list[str]) -> None:
    given = s3_server.settings(url=f"s3://{bucket}/some/where", options={**s3_server.options, **options})
    store = open_store(given)
    for act in (store.versions, store.active, store.storage.lock().__enter__, lambda: store.pin(None)):
        with pytest.raises(StoreUnavailable) as caught:
            act()
        for part in named[1:] if act is store.pin else named:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_option_that_nobody_knows_is_said(s3_server: S3Server) -> None:
    with pytest.raises(ConfigError, match=r"store\.url = .*regoin"):
        open_store(s3_server.settings(options={"regoin": "us-east-1"}))


def test_credentials_may_come_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store = open_store(s3_server.settings(options={}))
    with store.lock():
        assert write(store).version == 1


def test_a_server_killed_in_between_costs_nothing_but_time(given: StoreSettings, s3_server: S3Server) -> None:
    store = open_store(given)
    with store.lock():
        write(store, 1.0)
        s3_server.kill()
        with capture_logs() as logs, pytest.raises(StoreUnavailable, match="cannot be reached"):
            write(store, 2.0)
        reader = open_store(given)
        with pytest.raises(StoreUnavailable):  # not: there is no snapshot
            reader.newest(training=True)
        s3_server.start()
        again = write(store, 3.0)
        assert again.fence == 1
        assert reader.newest(training=True)[0].manifest == again
        assert reader.newest(training=True)[1] == []
    assert [line["log_level"] for line in logs] in ([], ["error"])  # the renewal may have met it too


def test_a_request_under_way_when_the_server_comes_back_goes_through(given: StoreSettings, s3_server: S3Server) -> None:
    store = open_store(given)
    with store.lock():
        write(store)
        s3_server.kill()
        back = threading.Timer(0.3, s3_server.start)
        back.start()
        try:
            assert write(store).version == 2  # the client tries again by itself
        finally:
            back.join()


# The commands


def test_the_commands_work_on_a_url(given: StoreSettings, tmp_path: Path) -> None:
    offsets = range(96)
    part = PartitionProgress(
        next_offset=96, trained=96, offset_sum=sum(offsets), offset_square_sum=sum(n * n for n in offsets)
    )
    store = open_store(given)
    with store.lock():
        for number in range(2):
            write(store, float(number), partitions={0: part})
    config = tmp_path / "tailstream.toml"
    tables = SETTINGS.model_dump(mode="json", by_alias=True, exclude_unset=True)
    config.write_text(tomlkit.dumps({**tables, "store": given.model_dump(mode="json")}))

    def run(*command: str) -> str:
        done = CliRunner().invoke(app, ["snapshots", *command, "--config", str(config)])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "2 snapshots, all whole" in run("verify")
    assert '"version": 2' in run("show", "2")
    assert "stays with 1" in run("pin", "1")
    assert run("list").splitlines()[1].endswith("pinned")
    assert "follows the newest" in run("pin", "--latest")
    assert "version 3 is a copy of 1" in run("rollback", "1")
    assert run("list").splitlines()[3].endswith("rollback to 1")
    assert "3 snapshots, all whole" in run("verify")
    assert store.manifest(3).fence == 2
