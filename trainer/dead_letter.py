"""Rejected records, kept in a topic of their own with headers that say why.

The header names are those of Kafka Connect's dead letter queue, so its tools read them too.
"""

from collections.abc import Sequence
from typing import Final

from trainer.batching import Rejection
from trainer.errors import PublishError
from trainer.kafka_client import Producer

HEADER_PREFIX: Final = "__connect.errors."
FLUSH_S: Final = 5.0  # longest wait for acknowledgements; the training thread waits with it
STAGE: Final = "VALUE_CONVERTER"


class DeadLetters:
    """Writes rejected records to the dead-letter topic: key, value and headers unchanged, the reason in more headers.

    Written at least once: after a crash, or while the broker is away, a record may be there twice, and is told apart by
    its offset header.
    """

    def __init__(self, producer: Producer, source_topic: str, topic: str) -> None:
        self._producer = producer
        self._source_topic = source_topic
        self._topic = topic
        self._unacknowledged: list[Rejection] = []
        self._failed = False

    def write(self, rejections: Sequence[Rejection]) -> None:
        """Queues rejected records for the topic; whether they arrive is for `flush` to say."""
        self._unacknowledged.extend(rejections)
        if not self._failed:
            self._send(rejections)

    def flush(self) -> None:
        """Waits until all are acknowledged, sending again what failed before.

        Raises:
            PublishError: some are not; they are kept, and the next call tries again.
        """
        if not self._unacknowledged:
            return
        if self._failed:
            self._failed = False
            self._send(self._unacknowledged)
        try:
            self._producer.flush(FLUSH_S)
        except PublishError:
            self._failed = True
        if self._failed:
            raise PublishError(
                f"{len(self._unacknowledged)} rejected records could not be written to topic {self._topic!r} yet"
            )
        self._unacknowledged.clear()

    def _send(self, rejections: Sequence[Rejection]) -> None:
        for record, error in rejections:
            why = {
                "topic": self._source_topic,
                "partition": str(record.partition),
                "offset": str(record.offset),
                "stage": STAGE,
                "exception.class.name": f"{type(error).__module__}.{type(error).__qualname__}",
                "exception.message": f"{error.reason}: {error}",
            }
            headers = [(HEADER_PREFIX + name, text.encode(errors="replace")) for name, text in why.items()]
            try:
                self._producer.send(self._topic, record.value, record.key, [*record.headers, *headers])
            except PublishError:
                self._failed = True
                return
