import threading
import time
from collections.abc import Callable

import pytest

from tests.trainer.stream import make_schema, make_settings, values
from trainer.batching import Batcher, Progress, Record
from trainer.errors import OffsetsLost
from trainer.kafka_client import TopicDescription
from trainer.prefetch import BATCHES_AHEAD, prefetched

SIZE = 4
VALUE = values(1)[0]


class Polled:
    """A source of one batch a poll: endless, or ending as `at_end` says once `polls` of them were made."""

    def __init__(self, polls: int | None = None, at_end: Callable[[], None] = lambda: None) -> None:
        self.identity = TopicDescription(None, "prices", None, (0,))
        self.exhausted = False
        self.lost_records = 0
        self.broker_up = True
        self.polls = 0
        self.filled = threading.Event()  # as many batches as may wait, and one that finds no place
        self._limit = polls
        self._at_end = at_end

    def open(self, progress: Progress) -> dict[int, int]:
        return {0: 0}

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        if self.polls == self._limit:
            self._at_end()
            self.exhausted = True
            return []
        first = self.polls * SIZE
        self.polls += 1
        if self.polls > BATCHES_AHEAD:
            self.filled.set()
        return [Record(0, first + n, 0.0, None, VALUE) for n in range(SIZE)]

    def lag(self, progress: Progress) -> dict[int, int]:
        return {}

    def commit(self, progress: Progress) -> None:
        """Nobody asks."""

    def close(self) -> None:
        """Nothing to let go of."""


def make_batcher() -> Batcher:
    return Batcher(make_schema(make_settings()), SIZE)


def fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_and_end_with_the_source() -> None:
    with prefetched(Polled(20), make_batcher(), 1.0) as batches:
        ends = [batch.progress[0].next_offset for batch in batches if batch is not None]
    assert ends == [SIZE * n for n in range(1, 21)]


def test_no_more_is_fetched_than_may_wait_however_much_there_is() -> None:
    source = Polled()
    with prefetched(source, make_batcher(), 1.0) as batches:
        assert source.filled.wait(30)
        time.sleep(0.3)  # in which a fetcher that is not held back would poll thousands of times
        assert source.polls == BATCHES_AHEAD + 1
        taken = [next(batches) for _ in range(BATCHES_AHEAD)]
        assert [batch and batch.progress[0].next_offset for batch in taken] == [SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE]


def test_an_error_of_the_source_is_raised_after_the_batches_before_it() -> None:
    def fail() -> None:
        raise OffsetsLost("they have expired")

    with prefetched(Polled(3, fail), make_batcher(), 1.0) as batches:
        taken = (batch.progress[0].next_offset for batch in batches if batch is not None)
        assert [next(taken) for _ in range(3)] == [SIZE, 2 * SIZE, 3 * SIZE]
        with pytest.raises(OffsetsLost, match="expired"):
            next(taken)


def test_leaving_ends_a_fetcher_that_waits_for_a_place() -> None:
    source = Polled()
    with prefetched(source, make_batcher(), 1.0):
        assert source.filled.wait(30)
        assert fetchers()
    assert not fetchers()


def test_who_is_busy_does_not_wait_for_a_batch() -> None:
    waiting = threading.Event()

    def hold() -> None:
        waiting.wait(30)

    busy = True
    with prefetched(Polled(1, hold), make_batcher(), 0.0, lambda: busy) as batches:
        taken = [next(batches) for _ in range(10_000)]
        assert sum(batch is not None for batch in taken) <= 1
        assert taken[-1] is None
        waiting.set()
        busy = False
        rest = list(batches)
    assert sum(batch is not None for batch in [*taken, *rest]) == 1
