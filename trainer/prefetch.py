"""Fetching and decoding ahead of training, on a thread of its own, as far as a short queue allows.

Batches carry their offsets: what is fetched and not yet trained is in no snapshot, and is fetched again after a crash.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Full, Queue
from typing import Final

from trainer.batching import LONGEST_POLL_S, Batch, Batcher, batches
from trainer.source import RecordSource

POLL_RECORDS: Final = 2048
BATCHES_AHEAD: Final = 4  # a full queue stops the fetching: memory stays flat however far behind the trainer is
JOIN_S: Final = 10.0  # a poll of a broker that is away takes a few seconds to end

End = BaseException | None  # what the thread ended with; None where the source has no more


@contextmanager
def prefetched(
    source: RecordSource, batcher: Batcher, max_wait_s: float, busy: Callable[[], bool] = lambda: False
) -> Iterator[Iterator[Batch | None]]:
    """Batches of an open source in order, and None when none came for a moment; ends with the source.

    Errors of the source are raised once the batches before them are taken. While whoever takes them says that it is
    `busy`, None comes at once where no batch is waiting.
    """
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
            for batch in batches(source.poll, batcher, POLL_RECORDS, max_wait_s):
                if batch is not None:
                    put(batch)
                if stop.is_set() or (source.exhausted and batch is None and not batcher.pending):
                    break
        except BaseException as error:
            end = error
        put(end)

    thread = threading.Thread(target=fetch, name="prefetch", daemon=True)
    thread.start()
    try:
        yield _taken(ready, busy)
    finally:
        stop.set()
        thread.join(JOIN_S)


def _taken(ready: "Queue[Batch | End]", busy: Callable[[], bool]) -> Iterator[Batch | None]:
    while True:
        try:
            item = ready.get_nowait() if busy() else ready.get(timeout=LONGEST_POLL_S)
        except Empty:
            yield None
            continue
        if isinstance(item, Batch):
            yield item
        elif item is None:
            return
        else:
            raise item
