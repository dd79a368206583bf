import itertools
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.trainer.stream import TASKS, make_batches, make_schema, make_settings, values
from trainer.batching import Batch, Batcher, PartitionProgress, Progress, Record, Rejection
from trainer.checkpoint import BORROWED_S, LARGEST_SHARE, Checkpoint, Parts
from trainer.config import Settings
from trainer.errors import OffsetsLost, PublishError, SnapshotCorrupt, SnapshotError, SnapshotMismatch
from trainer.learner import Learner
from trainer.loop import train
from trainer.manifest import Manifest
from trainer.metrics import TrainerMetrics
from trainer.prefetch import ThreadedSource
from trainer.ranks import ALONE
from trainer.snapshot import MODEL_FILE, SnapshotStore
from trainer.source import FileSource
from trainer.turns import Turns

ROWS = 6 * 32
BAD = b'{"price": "dear"}'
PATIENCE_S = 30.0


class Letters:
    """A place for rejected records that can be away."""

    def __init__(self) -> None:
        self.away = False
        self.answers = threading.Event()
        self.answers.set()
        self.kept: list[Rejection] = []
        self.full = False
        self.waited_for = False

    def write(self, rejections: Sequence[Rejection]) -> None:
        self.kept += rejections

    def flush(self) -> None:
        self.waited_for = True
        self.answers.wait(PATIENCE_S)
        if self.away:
            raise PublishError("the topic is away")


class Source(FileSource):
    """A file read a few records at a time, until it is told to stop or breaks; remembers what was committed."""

    def __init__(self, path: Path, given: Settings, store: SnapshotStore) -> None:
        super().__init__(path, make_schema(given))
        self._store = store
        self.stop = threading.Event()
        self.polls_left = 10**9
        self.error: Exception | None = None
        self.committed: list[tuple[int, set[int]]] = []

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        self.polls_left -= 1
        if self.polls_left < 0:
            if self.error is not None:
                raise self.error
            self.stop.set()
            return []
        return super().poll(10, timeout_s)

    def commit(self, progress: Progress) -> None:
        durable = {self._store.manifest(version).partitions[0].next_offset for version in self._store.versions()}
        self.committed.append((progress[0].next_offset, durable))


class Trainer:
    """All parts of a trainer that reads a file, as a new process would make them."""

    def __init__(self, given: Settings, path: Path) -> None:
        self.settings = given
        self.store = SnapshotStore(given.store.path)
        self.source = Source(path, given, self.store)
        self.schema = make_schema(given)
        self.learner = Learner(given, self.schema, torch.device("cpu"))
        self.letters = Letters()
        self.metrics = TrainerMetrics()
        threaded = ThreadedSource(self.source, Batcher(self.schema, given.batch.size), 600.0)
        self.parts = Parts(threaded, self.learner, self.store, self.letters, self.metrics)  # type: ignore[arg-type]
        self.checkpoint = Checkpoint(given, self.parts)

    def run(self, polls: int = 10**9) -> None:
        self.source.polls_left = polls
        with self.store.lock():
            self.checkpoint.restore()
            turns = Turns(
                ALONE, self.schema, lambda: self.letters.full, lambda: self.learner.may_replay, self.source.stop.is_set
            )
            train(self.parts, self.checkpoint, turns)

    def learn(self, batch: Batch) -> None:
        self.learner.step(batch)
        self.checkpoint.advance(batch)
        self.checkpoint.tick()

    def save(self) -> None:
        """Ticks until what was learned is durable."""
        until = time.monotonic() + PATIENCE_S
        while self.checkpoint.durable != self.checkpoint.progress:
            assert time.monotonic() < until, "it was never saved"
            self.checkpoint.tick()
            time.sleep(0.001)

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tailstream_{name}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good records in full batches, and a bad one now and then."""
    path = tmp_path_factory.mktemp("data") / "prices.jsonl"
    lines = values(ROWS)
    for at in (190, 100, 33, 0):
        lines.insert(at, BAD)
    path.write_bytes(b"\n".join(lines))
    return path


def assert_same(left: Trainer, right: Trainer) -> None:
    assert left.checkpoint.progress == right.checkpoint.progress
    state, other = left.learner.state_dict(), right.learner.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name].nan_to_num(7e7), other[name].nan_to_num(7e7)) for name in state)


@pytest.mark.parametrize("task", TASKS)
def test_a_trainer_stopped_anywhere_ends_where_an_uninterrupted_one_does(
    file: Path, tmp_path_factory: pytest.TempPathFactory, task: str
) -> None:
    whole = Trainer(make_settings(tmp_path_factory.mktemp("store"), **TASKS[task]), file)
    whole.run()
    part = whole.checkpoint.progress[0]
    assert (part.trained, part.rejected, part.next_offset) == (ROWS, 4, ROWS + 4)
    offsets = [n for n in range(ROWS + 4) if n not in (0, 34, 102, 193)]
    assert (part.offset_sum, part.offset_square_sum) == (sum(offsets), sum(n * n for n in offsets))

    @given(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
    def stopped_after(polls: list[int]) -> None:
        given_settings = make_settings(tmp_path_factory.mktemp("store"), **TASKS[task])
        for count in polls:
            Trainer(given_settings, file).run(count)
        last = Trainer(given_settings, file)
        last.run()
        assert_same(last, whole)
        newest, faults = last.store.newest(training=True)
        assert newest is not None
        assert faults == []
        assert newest.manifest.partitions == whole.checkpoint.progress

    stopped_after()


@pytest.mark.parametrize("task", TASKS)
def test_a_snapshot_torn_by_a_crash_is_passed_over_and_its_records_are_learned_again(
    file: Path, tmp_path: Path, task: str
) -> None:
    whole = Trainer(make_settings(tmp_path / "whole", **TASKS[task]), file)
    whole.run()
    given_settings = make_settings(tmp_path / "torn", **TASKS[task])
    for polls in (5, 5):
        Trainer(given_settings, file).run(polls)
    store = SnapshotStore(given_settings.store.path)
    assert len(store.versions()) >= 2
    (store.storage.folder(store.versions()[-1]) / MODEL_FILE).write_bytes(b"torn")
    last = Trainer(given_settings, file)
    with capture_logs() as logs:
        last.run()
    assert_same(last, whole)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["a snapshot is passed over"]


def test_where_no_snapshot_is_whole_a_trainer_does_not_begin_anew_by_itself(file: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_settings(tmp_path), file)
    trainer.run(5)
    for version in trainer.store.versions():
        (trainer.store.storage.folder(version) / MODEL_FILE).write_bytes(b"torn")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SnapshotCorrupt, match=r"none of the \d+ snapshots in .* can be resumed from"):
        Trainer(trainer.settings, file).run()
    assert sorted(tmp_path.rglob("*")) == before


def test_offsets_are_committed_only_once_their_snapshot_is_there(file: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_settings(tmp_path), file)
    trainer.run()
    assert trainer.source.committed
    assert trainer.source.committed[-1][0] == ROWS + 4
    for next_offset, covered in trainer.source.committed:
        assert next_offset in covered


def test_no_snapshot_covers_rejected_records_that_are_not_acknowledged(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.RETRY_S", 0.0)
    trainer = Trainer(make_settings(tmp_path), file)
    batches = make_batches(trainer.settings, ROWS)
    trainer.letters.away = True
    with capture_logs() as logs:
        for batch in batches[:3]:
            trainer.learn(batch)
        until = time.monotonic() + PATIENCE_S
        while not trainer.value("snapshot_failures_total"):
            assert time.monotonic() < until
            trainer.checkpoint.tick()
    assert trainer.store.versions() == []
    assert trainer.source.committed == []
    assert [line["event"][:11] for line in logs] == ["no snapshot"]
    trainer.letters.away = False
    trainer.save()
    assert trainer.store.manifest(1).samples == 3 * 32
    trainer.checkpoint.close()


def test_training_does_not_wait_for_dead_letters_to_be_acknowledged_but_the_snapshot_does(
    tmp_path: Path, file: Path
) -> None:
    trainer = Trainer(make_settings(tmp_path / "store"), file)
    trainer.store.storage.path.mkdir()
    trainer.letters.answers.clear()
    batches = make_batches(trainer.settings, ROWS)
    for batch in batches:
        trainer.learn(batch)
    assert trainer.learner.samples == ROWS
    assert trainer.store.versions() == []
    assert trainer.source.committed == []
    trainer.letters.answers.set()
    trainer.save()
    assert trainer.source.committed[-1][0] == batches[-1].progress[0].next_offset
    trainer.checkpoint.close()


def test_training_waits_while_too_many_dead_letters_wait_and_a_save_sends_them(tmp_path: Path, file: Path) -> None:
    trainer = Trainer(make_settings(tmp_path / "store", interval_s=3600.0), file)
    trainer.letters.full = True
    trainer.letters.answers.clear()
    thread = threading.Thread(target=trainer.run)
    thread.start()
    try:
        until = time.monotonic() + PATIENCE_S
        while not trainer.letters.waited_for:
            assert time.monotonic() < until
            time.sleep(0.001)
        samples = trainer.learner.samples
        time.sleep(0.1)
        assert trainer.learner.samples == samples < ROWS
    finally:
        trainer.letters.full = False
        trainer.letters.answers.set()
        thread.join()
    assert trainer.learner.samples == ROWS


def test_where_a_first_start_begins_is_saved_unless_a_next_would_begin_there_too(tmp_path: Path, file: Path) -> None:
    for start, versions in (("earliest", []), ("latest", [1]), ("2026-01-02", [1])):
        given_settings = make_settings(tmp_path / start, kafka={"start": start})
        trainer = Trainer(given_settings, file)
        trainer.store.storage.path.mkdir()
        trainer.checkpoint.begin({0: 7})
        trainer.save()
        trainer.checkpoint.close()
        assert trainer.store.versions() == versions
        later = Trainer(given_settings, file)
        later.checkpoint.restore()
        assert later.checkpoint.progress == (trainer.checkpoint.progress if versions else {})


def test_a_first_start_at_the_end_is_saved_before_anything_is_learned(tmp_path: Path, file: Path) -> None:
    trainer = Trainer(make_settings(tmp_path, kafka={"start": "latest"}, interval_s=3600.0), file)
    trainer.run()
    assert [trainer.store.manifest(version).samples for version in trainer.store.versions()] == [0, ROWS]


def test_what_was_replayed_while_nothing_came_is_saved_too(tmp_path: Path) -> None:
    trainer = Trainer(make_settings(tmp_path / "store", learner={"replay_steps": "auto"}), tmp_path / "none")
    trainer.store.storage.path.mkdir()
    trainer.learn(make_batches(trainer.settings, ROWS)[0])
    trainer.checkpoint.save()
    fresh = trainer.store.manifest(trainer.store.versions()[-1])
    while trainer.learner.may_replay:
        trainer.learner.replay_when_idle()
    trainer.checkpoint.save()
    trainer.checkpoint.close()
    replayed = trainer.store.manifest(trainer.store.versions()[-1])
    assert (fresh.step, replayed.step) == (2, 2 + 4)
    assert fresh.partitions == replayed.partitions


def test_a_store_that_cannot_be_written_to_is_said_once_and_counted_while_training_goes_on(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.RETRY_S", 0.0)
    trainer = Trainer(make_settings(tmp_path / "store"), file)
    trainer.store.storage.path.mkdir()
    batches = make_batches(trainer.settings, ROWS)
    trainer.learn(batches[0])
    trainer.save()
    durable = trainer.checkpoint.durable
    with capture_logs() as logs:
        trainer.store.storage.path.rename(tmp_path / "aside")
        trainer.store.storage.path.write_text("a file where the folder was")
        until = time.monotonic() + PATIENCE_S
        trainer.learn(batches[1])
        while (trainer.value("snapshot_failures_total") or 0) < 3:
            assert time.monotonic() < until
            trainer.checkpoint.tick()
        trainer.learn(batches[2])
        assert trainer.learner.samples == 3 * 32
        assert trainer.checkpoint.durable == durable
        trainer.store.storage.path.unlink()
        (tmp_path / "aside").rename(trainer.store.storage.path)
        trainer.save()
    events = [line["event"] for line in logs]
    assert sum(event.startswith("no snapshot") for event in events) == 1
    assert events[-1] == "snapshots are written again"
    newest, faults = trainer.store.newest(training=True)
    assert newest is not None
    assert (newest.manifest.samples, faults) == (3 * 32, [])
    trainer.checkpoint.close()


def test_a_store_that_cannot_be_cleared_of_old_snapshots_still_takes_new_ones(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_settings(tmp_path), file)

    def refused(now_s: float) -> list[int]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trainer.store, "prune", refused)
    with capture_logs() as logs:
        trainer.run()
    assert trainer.store.newest(training=True)[0] is not None
    assert trainer.value("snapshot_failures_total") == 0
    assert "Permission denied" in str(logs)


def test_a_stop_that_cannot_save_is_an_error_and_not_a_clean_end(tmp_path: Path, file: Path) -> None:
    trainer = Trainer(make_settings(tmp_path / "store", trainer={"stop_grace_s": 0.5}), file)
    trainer.store.storage.path.mkdir()
    first, second = make_batches(trainer.settings, 64)
    trainer.learn(first)
    trainer.save()
    shutil.rmtree(trainer.store.storage.path)
    trainer.learn(second)
    with pytest.raises(SnapshotError, match="No such file or directory"):
        trainer.checkpoint.save()
    trainer.checkpoint.close()


def test_a_stop_waits_for_what_comes_back_in_time(tmp_path: Path, file: Path) -> None:
    trainer = Trainer(make_settings(tmp_path / "store"), file)
    trainer.store.storage.path.mkdir()
    trainer.letters.away = True
    trainer.learn(make_batches(trainer.settings, 32)[0])
    back = threading.Timer(1.0, lambda: setattr(trainer.letters, "away", False))
    back.start()
    trainer.checkpoint.save()
    back.join()
    trainer.checkpoint.close()
    assert trainer.store.manifest(trainer.store.versions()[-1]).samples == 32
    assert trainer.value("snapshot_failures_total") > 0


def test_when_the_source_fails_the_save_under_way_is_finished_before_the_store_is_let_go(
    tmp_path: Path, file: Path
) -> None:
    trainer = Trainer(make_settings(tmp_path), file)
    trainer.source.error = OffsetsLost("gone")
    with pytest.raises(OffsetsLost, match="gone"):
        trainer.run(polls=9)
    assert trainer.checkpoint.durable == trainer.checkpoint.progress  # what was learned may not be there any more
    assert trainer.learner.samples > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("snapshot")]
    assert list(tmp_path.glob(".tmp-*")) == []
    newest, faults = trainer.store.newest(training=True)
    assert newest is not None
    assert faults == []


class Clock:
    """Time that passes when told to, in place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.processor_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1.8e9 + self.now_s

    def thread_time(self) -> float:
        return self.processor_s


class Saves:
    """A trainer that always has something to save, and saves that take as long as they are told to.

    Attributes:
        began_s: when each save began.
        costs_s: what each took of the processor.
    """

    def __init__(self, trainer: Trainer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began_s: list[float] = []
        self.costs_s: list[float] = []
        self._trainer, self._clock, self._monkeypatch = trainer, clock, monkeypatch

    def run(self, turns: int, pause_s: float, takes_s: Callable[[int], float], busy: float = 1.0) -> None:
        """So many turns.

        Args:
            turns: of training.
            pause_s: between them.
            takes_s: how long a save takes, by its number.
            busy: share of that in which it takes a processor; for the rest the disk is waited for, which costs nothing.
        """
        write = self._trainer.store.write

        def slow(*args: Any) -> Manifest:
            taken_s = takes_s(len(self.began_s))
            self.began_s.append(self._clock.now_s)
            self.costs_s.append(busy * taken_s)
            self._clock.now_s += taken_s
            self._clock.processor_s += busy * taken_s
            return write(*args)

        self._monkeypatch.setattr(self._trainer.store, "write", slow)
        rows = np.empty((0, 2), np.float32), np.empty((0, 1), np.int64), np.empty(0), np.empty(0)
        for number in range(turns):
            self._trainer.checkpoint.advance(Batch(*rows, {0: PartitionProgress(next_offset=number)}))
            self._trainer.checkpoint.tick()
            finish(self._trainer)
            self._clock.now_s += pause_s
        self._trainer.checkpoint.close()

    @property
    def gaps_s(self) -> list[float]:
        """Between the beginnings."""
        return [later - earlier for earlier, later in itertools.pairwise(self.began_s)]

    def assert_within_their_share(self) -> None:
        """All saves that were followed by another took no more than they may, and than may be borrowed."""
        share_s = LARGEST_SHARE * (self.began_s[-1] - self.began_s[0])
        assert sum(self.costs_s[:-1]) <= share_s + BORROWED_S + 1e-9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trainer.checkpoint.time", clock)
    return clock


@pytest.mark.parametrize(
    ("interval_s", "writing_s", "busy", "apart_s"),
    [(0.5, 0.001, 1.0, 0.5), (0.5, 2.0, 1.0, 40.0), (60.0, 2.0, 1.0, 60.0), (0.5, 2.0, 0.1, 4.0)],
)
def test_saves_are_so_far_apart_that_they_take_a_twentieth_of_the_time(
    tmp_path: Path,
    file: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    interval_s: float,
    writing_s: float,
    busy: float,
    apart_s: float,
) -> None:
    saves = Saves(Trainer(make_settings(tmp_path, interval_s=interval_s), file), clock, monkeypatch)
    saves.run(100, apart_s / 20, lambda number: writing_s, busy)
    gaps_s = saves.gaps_s
    assert len(gaps_s) >= 3
    assert min(gaps_s[-2:]) >= apart_s - 1e-9  # at first some of the time to come is borrowed
    assert max(gaps_s) <= 2 * apart_s + writing_s
    saves.assert_within_their_share()


def test_one_save_that_takes_long_does_not_hold_up_the_next(
    tmp_path: Path, file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made up for over time: all saves together take no more than a twentieth."""
    saves = Saves(Trainer(make_settings(tmp_path, interval_s=0.5), file), clock, monkeypatch)
    saves.run(2000, 0.05, lambda number: 0.3 if number % 40 == 20 else 0.015)
    assert len(saves.began_s) > 100
    assert max(saves.gaps_s) < 1.0
    saves.assert_within_their_share()


def finish(trainer: Trainer) -> None:
    """Waits for a save under way, as the disk does, and lets the checkpoint know."""
    if trainer.checkpoint._save is not None:
        trainer.checkpoint._save.future.result()
        trainer.checkpoint.tick()


def test_a_store_of_another_model_is_refused_before_anything_is_learned(tmp_path: Path, file: Path) -> None:
    Trainer(make_settings(tmp_path), file).run(5)
    for change in ({"model": {"hidden": [13]}}, {"learner": {"loss": "nll"}}):
        other = Trainer(make_settings(tmp_path, **change), file)
        with pytest.raises(SnapshotMismatch, match=f"{next(iter(change))}."):
            other.run()
        assert other.learner.samples == 0


def test_the_manifest_says_what_was_trained_and_how_it_went(tmp_path: Path, file: Path) -> None:
    trainer = Trainer(make_settings(tmp_path), file)
    trainer.run()
    newest, _ = trainer.store.newest(training=False)
    assert newest is not None
    manifest = newest.manifest
    assert (manifest.samples, manifest.step) == (ROWS, trainer.learner.steps)
    assert manifest.topic == str(file)
    assert manifest.metrics["whole"]["rows"] == ROWS - 32
    assert (manifest.lag_records, manifest.nonfinite_steps) == (None, 0)
    assert len(manifest.newest) == 100
    assert [rejection.record.offset for rejection in trainer.letters.kept] == [0, 34, 102, 193]
