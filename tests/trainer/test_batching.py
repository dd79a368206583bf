from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.stream import as_records, make_schema, make_settings, values
from trainer.batching import (
    CHECKSUM_MODULUS,
    LARGEST_REJECTED_BYTES,
    Batch,
    Batcher,
    PartitionProgress,
    Record,
    advance,
    batches,
)
from trainer.errors import OffsetsLost, RecordError

SCHEMA = make_schema(make_settings())
GOOD = values(40)
BAD = b'{"price": "dear"}'
NO_LABEL = b'{"size": 1}'  # found only when its columns are looked at


def collect(polls: Iterable[Sequence[Record]], size: int) -> list[Batch]:
    batcher = Batcher(SCHEMA, size)
    found = [batch for records in polls for batch in batcher.add(records)]
    return [*found, batcher.flush()] if batcher.pending else found


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for column in ("numeric", "categorical", "label", "time_s"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
        assert (a.progress, a.newest_append_s) == (b.progress, b.newest_append_s)
        assert [rejection.record for rejection in a.rejected] == [rejection.record for rejection in b.rejected]


@st.composite
def topics(draw: st.DrawFn) -> list[Record]:
    """Records of up to three partitions in some interleaving, with gaps, tombstones and bad ones."""
    next_offset = {0: draw(st.integers(0, 5)), 1: 0, 7: 2**40}
    records = []
    for partition, gap, kind in draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 1, 7]), st.integers(1, 3), st.sampled_from([*3 * ["good"], "bad", "late", None])
            ),
            max_size=40,
        )
    ):
        next_offset[partition] += gap
        value = {"good": GOOD[len(records) % len(GOOD)], "bad": BAD, "late": NO_LABEL, None: None}[kind]
        records.append(Record(partition, next_offset[partition], 5000.0 + len(records), None, value))
    return records


@given(topics(), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_batches_are_the_same_however_the_records_were_polled(
    records: list[Record], size: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=6)))
    polls = [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
    whole = collect([records], size)
    assert_same(collect(polls, size), whole)
    assert all(len(batch) == size for batch in whole[:-1])


def test_a_batch_ends_early_where_it_sets_too_much_aside_and_that_depends_on_the_records_alone() -> None:
    large = b"x" * (LARGEST_REJECTED_BYTES // 10)
    records = [
        Record(0, offset, 5000.0, None, GOOD[0] if offset % 7 == 0 else large if offset % 2 else BAD)
        for offset in range(100)
    ]
    whole = collect([records], 1000)
    assert len(whole) > 2
    assert all(sum(rejection.size for rejection in batch.rejected) < 1.2 * LARGEST_REJECTED_BYTES for batch in whole)
    assert_same(collect([[record] for record in records], 1000), whole)
    cut = whole[0].progress[0].next_offset
    assert_same(collect([records[cut:]], 1000), whole[1:])  # as a resumed run sees them


@given(topics())
@settings(max_examples=60, deadline=None)
def test_records_looked_at_together_are_what_they_are_one_by_one(records: list[Record]) -> None:
    """Rows, times and what was rejected, in order; `decode` is the judge of each."""
    given = [record for record in records if record.value is not None]
    rows, rejected = [], []
    for record in given:
        try:
            rows.append((SCHEMA.decode(record.value or b""), record.timestamp_s))
        except RecordError as error:
            rejected.append((record, error.reason, str(error)))
    (batch,) = collect([records], 1000) or [Batcher(SCHEMA, 1).flush()]
    np.testing.assert_array_equal(batch.numeric, SCHEMA.numeric([row for row, _ in rows]))
    np.testing.assert_array_equal(batch.categorical, SCHEMA.categorical([row for row, _ in rows]))
    assert batch.label.tolist() == [row.label for row, _ in rows]
    assert batch.time_s.tolist() == [at for _, at in rows]
    assert rejected == [(r.record, r.error.reason, str(r.error)) for r in batch.rejected]


@given(topics(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_record_is_counted_once_as_what_became_of_it(records: list[Record], size: int) -> None:
    progress: dict[int, PartitionProgress] = {}
    rejected = []
    for batch in collect([records], size):
        progress = advance(progress, batch.progress)
        rejected += [rejection.record for rejection in batch.rejected]
    assert rejected == [record for record in records if record.value in (BAD, NO_LABEL)]
    assert set(progress) == {record.partition for record in records}
    for partition, part in progress.items():
        own = [record for record in records if record.partition == partition]
        trained = [record.offset for record in own if record.value not in (None, BAD, NO_LABEL)]
        assert part == PartitionProgress(
            next_offset=own[-1].offset + 1,
            trained=len(trained),
            rejected=sum(record.value in (BAD, NO_LABEL) for record in own),
            skipped=sum(record.value is None for record in own),
            offset_sum=sum(trained) % CHECKSUM_MODULUS,
            offset_square_sum=sum(offset**2 for offset in trained) % CHECKSUM_MODULUS,
        )


def test_a_full_batch_ends_with_its_last_row_and_leaves_what_follows_to_the_next() -> None:
    first, second = collect([as_records([*GOOD[:2], BAD, None, *GOOD[2:4]])], 2)
    assert (first.progress[0].next_offset, first.rejected) == (2, ())
    assert (second.progress[0].next_offset, len(second.rejected), second.progress[0].skipped) == (6, 1, 1)


def test_a_batch_of_rejected_records_alone_still_makes_progress() -> None:
    (batch,) = collect([as_records([BAD, None, BAD], first=10)], 4)
    assert len(batch) == 0
    assert (batch.numeric.shape, batch.categorical.shape) == ((0, 2), (0, 1))
    assert batch.progress == {0: PartitionProgress(next_offset=13, rejected=2, skipped=1)}
    assert {rejection.error.field for rejection in batch.rejected} == {"price"}


def test_rows_carry_the_event_time_or_else_that_of_the_record() -> None:
    schema = make_schema(make_settings(schema={"time": "at"}))
    batcher = Batcher(schema, 2)
    given = [Record(0, 0, 50.0, None, b'{"price": 1, "at": 7000}'), Record(0, 1, 40.0, None, b'{"price": 2}')]
    (batch,) = batcher.add(given)
    assert batch.time_s.tolist() == [7.0, 40.0]
    assert batch.newest_append_s == 50.0


def test_labels_keep_double_precision() -> None:
    (batch,) = collect([as_records([b'{"price": 1234567890.123}'])], 1)
    assert (batch.label.dtype, batch.label[0]) == (np.float64, 1234567890.123)


@given(st.lists(st.integers(0, 2**63), max_size=8), st.integers(0, 8))
def test_progress_of_parts_adds_up_to_that_of_the_whole(offsets: list[int], cut: int) -> None:
    def progress(part: list[int]) -> PartitionProgress:
        return PartitionProgress(
            next_offset=9,
            trained=len(part),
            offset_sum=sum(part) % CHECKSUM_MODULUS,
            offset_square_sum=sum(n * n for n in part) % CHECKSUM_MODULUS,
        )

    assert progress(offsets[:cut]) + progress(offsets[cut:]) == progress(offsets)


def test_progress_never_goes_back() -> None:
    before = {0: PartitionProgress(next_offset=5, trained=5), 1: PartitionProgress(next_offset=2)}
    after = advance(before, {0: PartitionProgress(next_offset=9, trained=3), 2: PartitionProgress(next_offset=1)})
    assert {p: (part.next_offset, part.trained) for p, part in after.items()} == {0: (9, 8), 1: (2, 0), 2: (1, 0)}
    assert before[0].next_offset == 5
    with pytest.raises(ValueError, match="partition 0 would go back from offset 9 to 8"):
        advance(after, {0: PartitionProgress(next_offset=8)})


class Topic:
    """Polls that are scripted, on a clock of their own: each waits as long as it was told to, or until records come."""

    def __init__(self, arrivals: Sequence[tuple[float, Sequence[bytes | None]]]) -> None:
        self.now_s = 0.0
        self._arrivals = [*arrivals]
        self._offset = 0
        self.waits: list[float] = []

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        self.waits.append(timeout_s)
        due = self._arrivals[0][0] if self._arrivals else float("inf")
        if due > self.now_s + timeout_s:
            self.now_s += timeout_s
            return []
        self.now_s = max(self.now_s, due)
        records = as_records(self._arrivals.pop(0)[1], first=self._offset)
        self._offset += len(records)
        return records

    def batches(self, size: int, max_wait_s: float, until_s: float) -> list[tuple[float, int, int]]:
        """When each batch came, its rows, and the next offset."""
        found = []
        stream: Iterator[Batch | None] = batches(self.poll, Batcher(SCHEMA, size), 100, max_wait_s, lambda: self.now_s)
        for batch in islice(stream, 10_000):
            if batch is not None:
                found.append((round(self.now_s, 6), len(batch), batch.progress[0].next_offset))
            if self.now_s >= until_s:
                break
        return found


def test_a_partial_batch_waits_no_longer_than_it_may() -> None:
    topic = Topic([(3.0, GOOD[:2]), (3.4, GOOD[2:3])])
    ((came_s, rows, next_offset),) = topic.batches(8, max_wait_s=0.5, until_s=10)
    assert (rows, next_offset) == (3, 3)
    assert 3.5 <= came_s <= 3.6
    assert max(topic.waits) <= 0.5


def test_the_wait_of_a_remainder_begins_when_its_batch_was_full() -> None:
    topic = Topic([(1.0, GOOD[:2]), (1.4, GOOD[2:6])])
    full, rest = topic.batches(4, max_wait_s=0.5, until_s=5)
    assert full == (1.4, 4, 4)
    assert rest[1:] == (2, 6)
    assert 1.9 <= rest[0] <= 2.0


def test_records_that_are_only_rejected_are_flushed_too() -> None:
    ((came_s, rows, next_offset),) = Topic([(1.0, [BAD, None, BAD])]).batches(4, max_wait_s=0.5, until_s=5)
    assert (rows, next_offset) == (0, 3)
    assert 1.5 <= came_s <= 1.6


def test_the_caller_gets_its_turn_while_a_long_wait_lasts() -> None:
    topic = Topic([(1.0, GOOD[:1])])
    assert topic.batches(8, max_wait_s=600.0, until_s=30) == []
    assert max(topic.waits) <= 1.0


def test_several_batches_of_one_poll_come_one_by_one() -> None:
    assert Topic([(0.0, GOOD[:9])]).batches(4, max_wait_s=1.0, until_s=0.5) == [(0.0, 4, 4), (0.0, 4, 8)]


def test_what_was_read_before_an_error_of_the_source_comes_before_the_error() -> None:
    polls = iter([as_records([*GOOD[:5], BAD], first=0)])

    def poll(max_records: int, timeout_s: float) -> list[Record]:
        for records in polls:
            return records
        raise OffsetsLost("gone")

    stream = batches(poll, Batcher(SCHEMA, 4), 100, 600.0)
    full, none, rest = islice(stream, 3)
    assert (full and len(full), none, rest and len(rest)) == (4, None, 1)
    assert rest is not None
    assert rest.progress[0].next_offset == 6
    with pytest.raises(OffsetsLost, match="gone"):
        next(stream)
