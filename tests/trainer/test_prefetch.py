"""What any `BatchSource` does, on a thread and in a process of its own."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.polled import IDENTITY, SIZE, make, make_settings, polls, wait_until
from trainer.batching import Batch, PartitionProgress
from trainer.errors import OffsetsLost
from trainer.prefetch import BATCHES_AHEAD, BatchSource, ThreadedSource
from trainer.schema import FeatureSchema
from trainer.source_process import SourceProcess

MakeSource = Callable[..., BatchSource]


@pytest.fixture(params=["thread", "process"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeSource]:
    """Makes a source in batches whose records are `Polled`, opened."""
    made: list[BatchSource] = []

    def make_source(
        task: str = "regression",
        max_wait_s: float = 1.0,
        classes: tuple[str, ...] = (),
        progress: dict[int, PartitionProgress] | None = None,
        **options: Any,
    ) -> BatchSource:
        stop = threading.Event()
        found: BatchSource
        if request.param == "process":
            schema = FeatureSchema.of(make_settings(task))
            if schema.classes is not None:
                schema.classes.restore(classes)
            given = partial(make, task, options, tmp_path)
            found = SourceProcess(given, schema, SIZE, max_wait_s, IDENTITY, stop)
        else:
            records, batcher = make(task, options, tmp_path, stop)
            batcher.know(classes)
            found = ThreadedSource(records, batcher, max_wait_s)
        made.append(found)
        begin = progress[0].next_offset if progress else 0
        assert found.open(progress or {}) == {0: begin}
        return found

    yield make_source
    for one in made:
        one.close()


def taken(batches: Iterator[Batch | None], count: int) -> list[Batch]:
    found: list[Batch] = []
    while len(found) < count:
        batch = next(batches)
        if batch is not None:
            found.append(batch)
    return found


def test_batches_come_in_order_with_all_that_belongs_to_them_and_end_with_the_source(source: MakeSource) -> None:
    with source(polls=20, last_value=b"{", progress={0: PartitionProgress(next_offset=8)}).batches() as batches:
        found = [batch for batch in batches if batch is not None]
    rows = sum(len(batch) for batch in found)
    assert rows == 20 * (SIZE - 1)
    assert found[-1].progress[0].next_offset == 8 + 20 * SIZE
    rejected = [rejection for batch in found for rejection in batch.rejected]
    assert [rejection.record.offset for rejection in rejected] == [11 + SIZE * n for n in range(20)]
    assert (rejected[0].record.key, rejected[0].record.headers, rejected[0].record.value) == (
        b"key",
        [("h", b"1")],
        b"{",
    )
    assert rejected[0].error.reason == "not_json"
    first = found[0]
    np.testing.assert_array_equal(first.numeric, np.array([[0.5, np.nan]] * SIZE, dtype=np.float32))
    assert first.categorical.shape == (SIZE, 1)
    assert first.label.tolist() == [12.5] * SIZE
    assert first.time_s.tolist() == [100.0, 101.0, 102.0, 100.0]
    assert first.newest_append_s == 102.0
    assert sum(part.offset_sum for batch in found for part in batch.progress.values()) == sum(
        offset for offset in range(8, 8 + 20 * SIZE) if offset % SIZE != SIZE - 1
    )


def test_classes_go_on_from_those_known(source: MakeSource) -> None:
    with source("classification", classes=("old", "older"), polls=2).batches() as batches:
        first, second = taken(batches, 2)
    assert (first.new_classes, second.new_classes) == (("new",), ())
    assert first.label.tolist() == second.label.tolist() == [2.0] * SIZE


def test_no_more_is_fetched_than_may_wait_however_much_there_is(source: MakeSource, tmp_path: Path) -> None:
    with source().batches() as batches:
        wait_until(lambda: polls(tmp_path) > BATCHES_AHEAD)
        time.sleep(0.3)  # in which a fetcher that is not held back would poll thousands of times
        assert polls(tmp_path) == BATCHES_AHEAD + 1
        assert [batch.progress[0].next_offset for batch in taken(batches, 9)] == [SIZE * n for n in range(1, 10)]


def test_what_is_taken_stays_as_it_was_while_more_comes(source: MakeSource) -> None:
    with source().batches() as batches:
        first, *_ = taken(batches, 3 * BATCHES_AHEAD)
    assert first.label.tolist() == [12.5] * SIZE
    assert first.progress[0].next_offset == SIZE


@pytest.mark.parametrize(("at_end", "error"), [("expired", OffsetsLost), ("unforeseen", ZeroDivisionError)])
def test_an_error_of_the_source_is_raised_after_the_batches_before_it(
    source: MakeSource, at_end: str, error: type[Exception]
) -> None:
    with source(polls=3, at_end=at_end).batches() as batches:
        assert [batch.progress[0].next_offset for batch in taken(batches, 3)] == [SIZE, 2 * SIZE, 3 * SIZE]
        with pytest.raises(error, match=r"expired|mistake"):
            taken(batches, 1)


def test_who_has_no_patience_does_not_wait_for_a_batch(source: MakeSource) -> None:
    patience_s = 0.0
    with source(polls=1, at_end="hangs").batches(lambda: patience_s) as batches:
        began = time.monotonic()
        found = [next(batches) for _ in range(1000)]
        assert sum(batch is not None for batch in found) <= 1
        assert found[-1] is None
        assert time.monotonic() - began < 1000 * 0.05  # idle, each would take a tenth of a second
        patience_s = 0.1
        if not any(found):
            taken(batches, 1)


def test_what_it_knows_besides_is_heard_and_what_is_committed_reaches_the_source(
    source: MakeSource, tmp_path: Path
) -> None:
    made = source()
    with made.batches() as batches:
        taken(batches, 1)
        wait_until(lambda: bool(taken(batches, 1)) and made.standing().lost_records == 7)
        made.commit({0: PartitionProgress(next_offset=SIZE)})
    made.close()
    assert (tmp_path / "committed").read_text() == f"{SIZE}\n"
    assert (tmp_path / "closed").exists()
