"""Records in, batches out: decoding one by one, bad records set aside, and the offsets that each batch covers."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trainer.errors import RecordError, SourceError
from trainer.schema import Columns, FeatureSchema, Row

CHECKSUM_MODULUS: Final = 1 << 64
LARGEST_REJECTED_BYTES: Final = 4 << 20  # set aside by one batch: it ends there, however few rows it has by then
LOOKED_AT_TOGETHER: Final = 1024  # records; where one of them has a fault that is found late, all are looked at again
REJECTION_BYTES: Final = 1 << 10  # what a rejected record takes besides what it carries: objects, and the reason
LONGEST_POLL_S: Final = 0.1  # snapshots, metrics and signals are seen to between polls


class Record(NamedTuple):
    """One record as it lay in the topic."""

    partition: int
    offset: int
    timestamp_s: float  # append or create time, seconds since the epoch
    key: bytes | None
    value: bytes | None  # None: a tombstone
    headers: Sequence[tuple[str, bytes]] = ()


class Rejection(NamedTuple):
    """A record that cannot be learned from, and why."""

    record: Record
    error: RecordError

    @property
    def size(self) -> int:
        """Memory that it takes, roughly; bytes."""
        record = self.record
        carried = (record.key, record.value, *(value for _, value in record.headers))
        return REJECTION_BYTES + sum(len(part) for part in carried if part is not None)


class PartitionProgress(BaseModel):
    """How far one partition has been consumed, and what became of its records; deltas add up.

    `offset_sum` and `offset_square_sum` are taken over trained records, mod 2^64: with `trained` they show from
    outside that no record was left out or taken twice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    next_offset: int
    trained: int = 0
    rejected: int = 0
    skipped: int = 0
    offset_sum: int = 0
    offset_square_sum: int = 0

    def __add__(self, later: Self) -> Self:
        return type(self)(
            next_offset=later.next_offset,
            trained=self.trained + later.trained,
            rejected=self.rejected + later.rejected,
            skipped=self.skipped + later.skipped,
            offset_sum=(self.offset_sum + later.offset_sum) % CHECKSUM_MODULUS,
            offset_square_sum=(self.offset_square_sum + later.offset_square_sum) % CHECKSUM_MODULUS,
        )


Progress = Mapping[int, PartitionProgress]


def advance(progress: Progress, delta: Progress) -> dict[int, PartitionProgress]:
    """Progress after what `delta` covers.

    Raises:
        ValueError: an offset would go backwards; the records would then be learned twice.
    """
    result = dict(progress)
    for partition, step in delta.items():
        before = result.get(partition)
        if before is not None and step.next_offset < before.next_offset:
            raise ValueError(
                f"partition {partition} would go back from offset {before.next_offset} to {step.next_offset}"
            )
        result[partition] = step if before is None else before + step
    return result


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to learn from, with everything that was consumed on the way to them."""

    numeric: NDArray[np.float32]  # (B, F), NaN where missing
    categorical: NDArray[np.int64]  # (B, C) buckets
    label: NDArray[np.float64]  # (B,), label units; a class by its number
    time_s: NDArray[np.float64]  # (B,), event time (else the record's), seconds since the epoch
    progress: Progress  # what this batch adds, by partition
    rejected: tuple[Rejection, ...] = ()
    newest_append_s: float = 0.0  # the youngest record's timestamp
    new_classes: tuple[str, ...] = ()  # first seen in this batch; their numbers go on from those before

    def __len__(self) -> int:
        return len(self.label)


class _Part(NamedTuple):
    """Some of the rows of a batch, in columns."""

    features: Columns
    label: NDArray[np.float64]
    time_s: NDArray[np.float64]


class _Tally:
    """Counts of one partition while a batch fills."""

    __slots__ = ("next_offset", "offsets", "rejected", "skipped")

    def __init__(self) -> None:
        self.next_offset = 0
        self.offsets: list[int] = []
        self.rejected = 0
        self.skipped = 0

    def progress(self) -> PartitionProgress:
        return PartitionProgress(
            next_offset=self.next_offset,
            trained=len(self.offsets),
            rejected=self.rejected,
            skipped=self.skipped,
            offset_sum=sum(self.offsets) % CHECKSUM_MODULUS,
            offset_square_sum=sum(offset * offset for offset in self.offsets) % CHECKSUM_MODULUS,
        )


class Batcher:
    """Turns records into batches of exactly `size` rows, in the order of the records.

    A batch ends with its last row, wherever polls ended: so the batches of a partition depend on nothing but its
    records, and a resumed run sees the same ones. A smaller one ends with a rejected record that makes too many, which
    depends on the records alone too, so that memory stays flat; and where `flush` is called.
    """

    def __init__(self, schema: FeatureSchema, size: int) -> None:
        self._schema = schema
        self._size = size
        self._start()

    def _start(self) -> None:
        self._parts: list[_Part] = []
        self._rows = 0
        self._tallies: dict[int, _Tally] = defaultdict(_Tally)
        self._rejected: list[Rejection] = []
        self._rejected_bytes = 0
        self._newest = 0.0

    def know(self, classes: Iterable[str]) -> None:
        """Goes on from these classes, where labels are classes."""
        if self._schema.classes is not None:
            self._schema.classes.restore(classes)

    @property
    def pending(self) -> bool:
        """Whether records wait for their batch."""
        return bool(self._tallies)

    def add(self, records: Iterable[Record]) -> Iterator[Batch]:
        """Takes records in order, and yields a batch whenever one is full."""
        left = iter(records)
        while some := list(islice(left, min(LOOKED_AT_TOGETHER, self._size - self._rows))):
            if not self._take_together(some):
                yield from self._take_one_by_one(some)
            if self._rows == self._size:
                yield self.flush()

    def _take_together(self, records: Sequence[Record]) -> bool:
        """Takes records by few steps each; nothing where a batch may end among them, or one has a fault found late."""
        partition, offset, appended_s, _, value, _ = zip(*records, strict=True)
        there = np.array([one is not None for one in value])
        valued = there.nonzero()[0]
        try:
            parsed = self._schema.parsed([one for one in value if one is not None])
            rejected = [Rejection(records[valued[place]], error) for place, error in parsed.rejected.items()]
            if self._rejected_bytes + sum(rejection.size for rejection in rejected) > LARGEST_REJECTED_BYTES:
                return False
            features, label, time_s = self._schema.labelled(parsed)
        except RecordError:
            return False
        good = valued[parsed.place]
        at_s = np.array(appended_s, dtype=np.float64)[good]
        self._keep(_Part(features, label, np.where(np.isnan(time_s), at_s, time_s)))
        self._newest = at_s.max(initial=self._newest).item()
        partitions, offsets = np.array(partition), np.array(offset)
        for number in dict.fromkeys(partition):
            own, tally = partitions == number, self._tallies[number]
            tally.next_offset = offset[own.nonzero()[0][-1]] + 1
            tally.skipped += int(np.count_nonzero(own & ~there))
            tally.offsets += offsets[good[own[good]]].tolist()
        for rejection in rejected:
            self._reject(rejection)
        return True

    def _take_one_by_one(self, records: Sequence[Record]) -> Iterator[Batch]:
        rows: list[Row] = []
        times: list[float] = []
        for record in records:
            tally = self._tallies[record.partition]
            tally.next_offset = record.offset + 1
            if record.value is None:
                tally.skipped += 1
                continue
            try:
                row = self._schema.decode(record.value)
            except RecordError as error:
                self._reject(Rejection(record, error))
                if self._rejected_bytes > LARGEST_REJECTED_BYTES:
                    self._keep(self._part(rows, times))
                    rows, times = [], []
                    yield self.flush()
                continue
            tally.offsets.append(record.offset)
            rows.append(row)
            times.append(record.timestamp_s if row.time_s is None else row.time_s)
            self._newest = max(self._newest, record.timestamp_s)
        self._keep(self._part(rows, times))

    def _part(self, rows: Sequence[Row], times: list[float]) -> _Part:
        features = Columns(self._schema.numeric(rows), self._schema.categorical(rows))
        label, time_s = np.array([row.label for row in rows], dtype=np.float64), np.array(times, dtype=np.float64)
        return _Part(features, label, time_s)

    def _keep(self, part: _Part) -> None:
        self._parts.append(part)
        self._rows += len(part.time_s)

    def _reject(self, rejection: Rejection) -> None:
        self._tallies[rejection.record.partition].rejected += 1
        self._rejected.append(rejection)
        self._rejected_bytes += rejection.size

    def flush(self) -> Batch:
        """Whatever waits, as a batch; it may have no rows where all records were rejected or skipped."""
        parts = self._parts or [self._part([], [])]
        batch = Batch(
            numeric=np.concatenate([part.features.numeric for part in parts]),
            categorical=np.concatenate([part.features.categorical for part in parts]),
            label=np.concatenate([part.label for part in parts]),
            time_s=np.concatenate([part.time_s for part in parts]),
            progress={partition: tally.progress() for partition, tally in self._tallies.items()},
            rejected=tuple(self._rejected),
            newest_append_s=self._newest,
            new_classes=() if self._schema.classes is None else self._schema.classes.take_new(),
        )
        self._start()
        return batch


def batches(
    poll: Callable[[int, float], Sequence[Record]],
    batcher: Batcher,
    max_records: int,
    max_wait_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Batch | None]:
    """Polls for ever; yields each batch, and None after every poll, so that the caller can see to other things.

    A partial batch is flushed once `max_wait_s` has passed since its first record came, and before an error of the
    source is raised.
    """
    waiting_since: float | None = None
    while True:
        left = max_wait_s if waiting_since is None else waiting_since + max_wait_s - clock()
        full = False
        try:
            records = poll(max_records, min(max(0.0, left), LONGEST_POLL_S))
        except SourceError:
            if batcher.pending:
                yield batcher.flush()  # what could be read may not be there at the next start
            raise
        for batch in batcher.add(records):
            full = True
            yield batch
        if not batcher.pending:
            waiting_since = None
        elif waiting_since is None or full:
            waiting_since = clock()
        elif clock() - waiting_since >= max_wait_s:
            waiting_since = None
            yield batcher.flush()
        yield None
