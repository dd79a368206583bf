"""Rejected records, kept in a topic of their own with headers that say why.

The header names are those of Kafka Connect's dead letter queue, so its tools read them too.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Final

import structlog

from trainer.batching import Rejection
from trainer.errors import PublishError
from trainer.kafka_client import Producer, Sent

HEADER_PREFIX: Final = "__connect.errors."
OMITTED: Final = f"{HEADER_PREFIX}value.omitted.bytes"  # the size of a value that the topic does not take
KEY_OMITTED: Final = f"{HEADER_PREFIX}key.omitted.bytes"  # the same of key and headers together
SENT_TOGETHER: Final = 1000  # letters given to the client before they are waited for: it has no bound of its own
FLUSH_S: Final = 5.0  # longest wait for acknowledgements; a clean stop waits with it
MAX_WAITING_BYTES: Final = 64 << 20  # of letters not acknowledged; beyond it training waits
STAGE: Final = "VALUE_CONVERTER"
SAID_EVERY_S: Final = 60.0  # a topic of broken records would fill the log

log = structlog.stdlib.get_logger(__name__)


class Leave(IntEnum):
    """What is left out of a letter that is too large for its topic."""

    NOTHING = 0
    VALUE = 1
    ALL = 2


class _Letter:
    """A rejected record that waits for the topic, and what the client was given of it."""

    __slots__ = ("rejection", "sent")

    def __init__(self, rejection: Rejection) -> None:
        self.rejection = rejection
        self.sent: Sent | None = None  # None: not yet, or again


class DeadLetters:
    """Writes rejected records to the dead-letter topic: key, value and headers unchanged, the reason in more headers.

    Written at least once: after a crash a record may be there twice, and is told apart by its offset header. What makes
    a record too large for the topic is left out, its size in a header: the value, then key and headers too. `write`
    only queues, so training never waits for a broker, unless so much is queued that `full` says to; `flush` is for the
    thread that writes snapshots, and one thread alone.
    """

    def __init__(
        self, producer: Producer, source_topic: str, topic: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._producer = producer
        self._source_topic = source_topic
        self._topic = topic
        self._waiting: list[_Letter] = []
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._clock = clock
        self._say_next_s = -SAID_EVERY_S
        self._unsaid = 0  # records since the log last told of any

    def write(self, rejections: Sequence[Rejection]) -> None:
        """Queues rejected records for the topic; `flush` sends them. The log hears of the first, then once a minute."""
        self._unsaid += len(rejections)
        if rejections and self._clock() >= self._say_next_s:
            self._say(rejections[0])
        letters = [_Letter(rejection) for rejection in rejections]
        with self._lock:
            self._waiting.extend(letters)
            self._waiting_bytes += sum(rejection.size for rejection in rejections)

    def _say(self, rejection: Rejection) -> None:
        """Where one lies and what is wrong with it; not what it holds, which is nobody's who reads a log."""
        record, error = rejection.record, rejection.error
        log.warning(
            "records go to the dead letters",
            records=self._unsaid,
            topic=self._source_topic,
            partition=record.partition,
            offset=record.offset,
            reason=error.reason,
            field=error.field,
            dead_letters=self._topic,
        )
        self._unsaid = 0
        self._say_next_s = self._clock() + SAID_EVERY_S

    @property
    def full(self) -> bool:
        """Whether so much waits for the topic that no more records should be rejected before a `flush`."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def flush(self) -> None:
        """Sends what is queued and waits until all of it is acknowledged.

        Raises:
            PublishError: some is not; it is kept, and the next call waits for it, or sends it again.
        """
        with self._lock:
            queued = list(self._waiting)
        while queued:
            some, queued = queued[:SENT_TOGETHER], queued[SENT_TOGETHER:]
            try:
                for letter in some:
                    if letter.sent is None or letter.sent.failure:  # else the client still has it, and tries again
                        letter.sent = self._send(letter.rejection)
                self._wait()
                failures = [failure for letter in some if (failure := self._failure(letter))]
            except PublishError as error:
                failures = [str(error)]
            if failures:
                raise PublishError(
                    f"{len(self._waiting)} rejected records could not be written to topic {self._topic!r} yet: "
                    f"{failures[0]}"
                )
            with self._lock:
                del self._waiting[: len(some)]
                self._waiting_bytes -= sum(letter.rejection.size for letter in some)

    def _wait(self) -> None:
        with suppress(PublishError):  # each letter says for itself what became of it
            self._producer.flush(FLUSH_S)

    def _failure(self, letter: _Letter) -> str:
        """Why a letter has not arrived; empty if it has. One that is too large is sent alone, then less and less."""
        for leave_out in (Leave.NOTHING, Leave.VALUE, Leave.ALL):  # a batch may have been too large for another one
            if letter.sent is not None and letter.sent.too_large:
                letter.sent = self._send(letter.rejection, leave_out)
                self._wait()
        if letter.sent is not None and letter.sent.acknowledged:
            return ""
        return (letter.sent.failure if letter.sent else "") or "no answer"

    def _send(self, rejection: Rejection, leave_out: Leave = Leave.NOTHING) -> Sent:
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
        key, value, own_headers = record.key, record.value, record.headers
        if leave_out >= Leave.VALUE and value is not None:
            headers.append((OMITTED, str(len(value)).encode()))
            value = b""
        if leave_out >= Leave.ALL:
            size = len(key or b"") + sum(len(name) + len(text or b"") for name, text in own_headers)
            headers.append((KEY_OMITTED, str(size).encode()))
            key, own_headers = None, ()
        return self._producer.send(self._topic, value, key, [*own_headers, *headers])
