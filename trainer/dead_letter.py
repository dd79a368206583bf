"""Rejected records, kept in a topic of their own with headers that say why.

The header names are those of Kafka Connect's dead letter queue, so its tools read them too.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from trainer.batching import Rejection
from trainer.errors import PublishError
from trainer.kafka_client import Producer, Sent

HEADER_PREFIX: Final = "__connect.errors."
OMITTED: Final = f"{HEADER_PREFIX}value.omitted.bytes"  # the size of a value that the topic does not take
FLUSH_S: Final = 5.0  # longest wait for acknowledgements; a clean stop waits with it
MAX_WAITING_BYTES: Final = 64 << 20  # of letters not acknowledged; beyond it training waits
LETTER_BYTES: Final = 1 << 10  # what a letter takes besides what it carries: objects, the reason, its headers
STAGE: Final = "VALUE_CONVERTER"


class DeadLetters:
    """Writes rejected records to the dead-letter topic: key, value and headers unchanged, the reason in more headers.

    Written at least once: after a crash, or while the broker is away, a record may be there twice, and is told apart by
    its offset header. A value that is too large for the topic is left out, its size in a header. `write` only queues,
    so training never waits for a broker, unless so much is queued that `full` says to; `flush` is for the thread that
    writes snapshots, and one thread alone.
    """

    def __init__(self, producer: Producer, source_topic: str, topic: str) -> None:
        self._producer = producer
        self._source_topic = source_topic
        self._topic = topic
        self._unacknowledged: list[Rejection] = []
        self._waiting_bytes = 0
        self._lock = threading.Lock()

    def write(self, rejections: Sequence[Rejection]) -> None:
        """Queues rejected records for the topic; `flush` sends them."""
        with self._lock:
            self._unacknowledged.extend(rejections)
            self._waiting_bytes += sum(map(_size, rejections))

    @property
    def full(self) -> bool:
        """Whether so much waits for the topic that no more records should be rejected before a `flush`."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def flush(self) -> None:
        """Sends what is queued and waits until all of it is acknowledged.

        Raises:
            PublishError: some is not; all is kept, and the next call tries again.
        """
        with self._lock:
            queued = list(self._unacknowledged)
        if not queued:
            return
        try:
            sent = [self._send(rejection) for rejection in queued]
            self._wait()
            for rejection, letter in zip(queued, sent, strict=True):
                self._see_through(rejection, letter)
        except PublishError as error:
            raise PublishError(
                f"{len(queued)} rejected records could not be written to topic {self._topic!r} yet: {error}"
            ) from error
        with self._lock:
            del self._unacknowledged[: len(queued)]
            self._waiting_bytes -= sum(map(_size, queued))

    def _wait(self) -> None:
        with suppress(PublishError):  # each letter says for itself what became of it
            self._producer.flush(FLUSH_S)

    def _see_through(self, rejection: Rejection, letter: Sent) -> None:
        """Makes sure that a letter has arrived; one that is too large is sent alone, then without its value."""
        for without_value in (False, True):  # in a batch of several, another one may have been too large
            if letter.too_large:
                letter = self._send(rejection, without_value=without_value)
                self._wait()
        if not letter.acknowledged:
            raise PublishError(letter.failure or "no answer")

    def _send(self, rejection: Rejection, *, without_value: bool = False) -> Sent:
        record, error = rejection
        why = {
            "topic": self._source_topic,
            "partition": str(record.partition),
            "offset": str(record.offset),
            "stage": STAGE,
            "exception.class.name": f"{type(error).__module__}.{type(error).__qualname__}",
            "exception.message": f"{error.reason}: {error}",
        }
        headers = [(HEADER_PREFIX + name, text.encode(errors="replace")) for name, text in why.items()]
        value = record.value
        if without_value and value is not None:
            headers.append((OMITTED, str(len(value)).encode()))
            value = b""
        return self._producer.send(self._topic, value, record.key, [*record.headers, *headers])


def _size(rejection: Rejection) -> int:
    """Memory that a waiting letter takes, roughly; bytes."""
    record = rejection.record
    carried = (record.key, record.value, *(value for _, value in record.headers))
    return LETTER_BYTES + sum(len(part) for part in carried if part is not None)
