"""Fetching and decoding ahead of training, as far as a short queue allows: here on a thread of its own.

Batches carry their offsets: what is fetched and not yet trained is in no snapshot, and is fetched again after a crash.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, Full, Queue
from typing import Final, Protocol

from trainer.batching import LONGEST_POLL_S, Batch, Batcher, Progress, batches
from trainer.kafka_client import TopicDescription
from trainer.source import RecordSource, Standing

POLL_RECORDS: Final = 2048
BATCHES_AHEAD: Final = 4  # a full queue stops the fetching: memory stays flat however far behind the trainer is
JOIN_S: Final = 10.0  # a poll of a broker that is away takes a few seconds to end

Patience = Callable[[], float]  # seconds to wait for a batch
End = BaseException | None  # what the thread ended with; None where the source has no more


def a_moment() -> float:
    """The patience of whoever has nothing else to do."""
    return LONGEST_POLL_S


class BatchSource(Protocol):
    """Whole batches of a source, made beside the training that takes them."""

    identity: TopicDescription

    def standing(self) -> Standing:
        """What the source knows besides its records."""

    def open(self, progress: Progress) -> dict[int, int]:
        """Begins after `progress`, as `RecordSource.open` does."""

    def batches(
        self, patience_s: Callable[[], float] = lambda: LONGEST_POLL_S
    ) -> AbstractContextManager[Iterator[Batch | None]]:
        """Batches of an open source in order, and None when none came in `patience_s`; ends with the source.

        Errors of the source are raised once the batches before them are taken.
        """

    def commit(self, progress: Progress) -> None:
        """Says from outside how far a durable snapshot has come."""

    def close(self) -> None:
        """Lets go."""


class ThreadedSource:
    """A `BatchSource` on a thread of the trainer's own process."""

    def __init__(self, source: RecordSource, batcher: Batcher, max_wait_s: float) -> None:
        self._source = source
        self._batcher = batcher
        self._max_wait_s = max_wait_s
        self.identity = source.identity
        self.standing = source.standing
        self.open = source.open
        self.commit = source.commit
        self.close = source.close

    @contextmanager
    def batches(self, patience_s: Patience = a_moment) -> Iterator[Iterator[Batch | None]]:
        """See `BatchSource`; the thread ends with the context."""
        ready: Queue[Batch | End] = Queue(BATCHES_AHEAD)
        stop = threading.Event()

        def put(item: Batch | End) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=LONGEST_POLL_S)
                    return
                except Full:
                    continue

        def fetch() -> None:
            end: End = None
            try:
                for batch in fetched(self._source, self._batcher, self._max_wait_s, stop):
                    if batch is not None:
                        put(batch)
            except BaseException as error:
                end = error
            put(end)

        thread = threading.Thread(target=fetch, name="prefetch", daemon=True)
        thread.start()
        try:
            yield _taken(ready, patience_s)
        finally:
            stop.set()
            thread.join(JOIN_S)


def fetched(source: RecordSource, batcher: Batcher, max_wait_s: float, stop: threading.Event) -> Iterator[Batch | None]:
    """Batches as they are made, and None between polls, until the source has no more or a stop is asked for."""
    for batch in batches(source.poll, batcher, POLL_RECORDS, max_wait_s):
        yield batch
        if stop.is_set() or (source.exhausted and batch is None and not batcher.pending):
            return


def _taken(ready: "Queue[Batch | End]", patience_s: Patience) -> Iterator[Batch | None]:
    while True:
        try:
            wait_s = patience_s()
            item = ready.get(timeout=wait_s) if wait_s else ready.get_nowait()
        except Empty:
            yield None
            continue
        if isinstance(item, Batch):
            yield item
        elif item is None:
            return
        else:
            raise item
