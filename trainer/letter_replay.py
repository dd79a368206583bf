"""Dead letters read back: what is in the topic, and sending it to where it came from.

What has been replayed is remembered as offsets committed by groups of their own, `<group>.dead-letters` for all reasons
and `<group>.dead-letters.<reason>` for one, so the topic itself stays as it is.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Final, NamedTuple

from trainer.batching import Record
from trainer.config import KafkaSettings
from trainer.dead_letter import HEADER_PREFIX, KEY_OMITTED, OMITTED
from trainer.errors import BrokerUnavailable
from trainer.kafka_client import Consumer, Producer, describe_topic

POLL_RECORDS: Final = 2048
IDLE_S: Final = 5.0  # without a record, before what the broker calls the end
ALL: Final = ""  # instead of a reason


class Letter(NamedTuple):
    """A dead letter, and where it came from."""

    record: Record
    topic: str
    partition: int
    offset: int
    reason: str
    message: str

    @property
    def whole(self) -> bool:
        """Whether all of it is there; what was too large for the dead-letter topic is not."""
        return all(name not in (OMITTED, KEY_OMITTED) for name, _ in self.record.headers)

    @property
    def original_headers(self) -> list[tuple[str, bytes]]:
        """The record's headers as they were before it was rejected."""
        return [(name, value) for name, value in self.record.headers if not name.startswith(HEADER_PREFIX)]


class Replayed(NamedTuple):
    """What became of the dead letters."""

    sent: int
    before: int  # were replayed by an earlier run
    others: int  # have another reason than the one asked for
    omitted: int  # are not whole, as they were too large for the dead-letter topic


def read_letters(settings: KafkaSettings) -> Iterator[Letter]:
    """The letters that `settings.topic`'s trainer has written so far, each once, however often it was written.

    Raises:
        TopicMissing: there is no dead-letter topic.
        BrokerUnavailable, BrokerRefused: it cannot be read.
    """
    seen: set[tuple[int, int, bytes | None]] = set()  # a topic made anew counts its offsets anew
    for record in _read_all(settings.model_copy(update={"topic": settings.dead_letters})):
        letter = as_letter(record)
        if letter is None or letter.topic != settings.topic:
            continue
        identity = (letter.partition, letter.offset, record.value)
        if identity not in seen:
            seen.add(identity)
            yield letter


def as_letter(record: Record) -> Letter | None:
    """A record of the dead-letter topic as a letter; None where its headers do not say what it is."""
    headers = {name: value.decode(errors="replace") for name, value in record.headers if value is not None}
    try:
        partition, offset = (int(headers[f"{HEADER_PREFIX}{name}"]) for name in ("partition", "offset"))
        topic, message = headers[f"{HEADER_PREFIX}topic"], headers[f"{HEADER_PREFIX}exception.message"]
    except (KeyError, ValueError):
        return None
    return Letter(record, topic, partition, offset, message.partition(":")[0], message)


def replay(settings: KafkaSettings, reason: str | None, *, again: bool) -> Replayed:
    """Sends dead letters back to the topic they came from, with their key, value and original headers.

    A run that dies between sending and noting it sends the same letters again when repeated.

    Args:
        settings: of the source topic.
        reason: only letters with this one; None for all.
        again: whether to send those too that were replayed before.

    Raises:
        TopicMissing: there is no dead-letter topic.
        PublishError: some were not acknowledged; all are sent again by the next run.
    """
    letters = list(read_letters(settings))
    done = {name: _replayed(settings, name) for name in {ALL, *(letter.reason for letter in letters)}}
    sent = before = others = omitted = 0
    with closing(Producer(settings)) as producer:
        for letter in letters:
            at = letter.record.partition
            if reason is not None and letter.reason != reason:
                others += 1
            elif not again and letter.record.offset < max(done[ALL].get(at, 0), done[letter.reason].get(at, 0)):
                before += 1
            elif not letter.whole:
                omitted += 1
            else:
                producer.send(letter.topic, letter.record.value, letter.record.key, letter.original_headers)
                sent += 1
        producer.flush()
    _note(settings, reason or ALL, letters)
    return Replayed(sent, before, others, omitted)


def _read_all(settings: KafkaSettings) -> Iterator[Record]:
    """The records that a topic has now, of all partitions."""
    partitions = describe_topic(settings, settings.topic).partitions
    with closing(Consumer(settings)) as consumer:
        consumer.assign(dict.fromkeys(partitions))
        ends = {partition: end for partition, (begin, end) in consumer.bounds().items() if end > begin}
        heard_s = time.monotonic()
        # Positions pass what readers are not shown, as the end of a transaction.
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            records = consumer.poll(POLL_RECORDS, 0.2)
            yield from (record for record in records if record.offset < ends.get(record.partition, 0))
            if records:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > IDLE_S:
                raise BrokerUnavailable(f"the broker sent no more of topic {settings.topic!r} before its end")


def _memory(settings: KafkaSettings, reason: str) -> KafkaSettings:
    group = f"{settings.group}.dead-letters" + (f".{reason}" if reason else "")
    return settings.model_copy(update={"topic": settings.dead_letters, "group": group})


def _replayed(settings: KafkaSettings, reason: str) -> Mapping[int, int]:
    """By partition of the dead-letter topic, the offset before which letters of a reason were replayed."""
    memory = _memory(settings, reason)
    with closing(Consumer(memory)) as consumer:
        return consumer.committed(describe_topic(memory, memory.topic).partitions)


def _note(settings: KafkaSettings, reason: str, letters: Sequence[Letter]) -> None:
    ends: dict[int, int] = {}
    for letter in letters:
        ends[letter.record.partition] = max(ends.get(letter.record.partition, 0), letter.record.offset + 1)
    if ends:
        with closing(Consumer(_memory(settings, reason))) as consumer:
            consumer.assign(ends)
            consumer.commit_and_wait(ends)
