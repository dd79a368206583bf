"""The one file that knows confluent-kafka: a consumer in C, for topics that a Python one cannot keep up with.

It reads, and nothing else: administration and dead letters are `trainer.kafka_client`'s, and so are the names of
`kafka.options`, which are translated here.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from trainer.batching import Record
from trainer.config import KafkaSettings
from trainer.errors import (
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    OffsetsLost,
    SourceError,
    TailstreamError,
    TopicChanged,
    TopicMissing,
)
from trainer.kafka_client import CLIENT_ID, COMMIT_S, FETCH_BYTES, METADATA_AGE_MS, PROBE_S, describe_topic

try:
    import confluent_kafka
    from confluent_kafka import KafkaError, KafkaException, TopicPartition
except ImportError as error:
    raise ConfigError(
        'kafka.client = "confluent" needs the package confluent-kafka: pip install "tailstream[fast]"'
    ) from error

QUEUE_KBYTES: Final = 32 << 10  # fetched ahead, of all partitions together
IDENTITY_S: Final = 1.0  # between looks whether the topic is still the same one
OPTIONS: Final = {
    "security_protocol": "security.protocol",
    "sasl_mechanism": "sasl.mechanism",
    "sasl_plain_username": "sasl.username",
    "sasl_plain_password": "sasl.password",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_password": "ssl.key.password",
}
REFUSED: Final = (
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - these are how the client's own errors are called
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
LOST: Final = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)  # noqa: SLF001
MADE_AGAIN: Final = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC)  # noqa: SLF001


class ConfluentConsumer:
    """What `trainer.kafka_client.Consumer` is, by librdkafka."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._refusal = ""
        self._next: dict[int, int] = {}
        self._errors: list[Any] = []
        self._topic_id = describe_topic(
            settings, settings.topic
        ).topic_id  # says so where nobody answers, or lets us in
        self._partitions: set[int] = set()
        self._next_look_s = time.monotonic() + IDENTITY_S
        try:
            self._consumer = confluent_kafka.Consumer(
                {
                    "bootstrap.servers": ",".join(settings.bootstrap_servers),
                    "client.id": CLIENT_ID,
                    "group.id": settings.group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "error",
                    "isolation.level": settings.isolation,
                    "fetch.message.max.bytes": FETCH_BYTES,
                    "queued.max.messages.kbytes": QUEUE_KBYTES,
                    "check.crcs": True,
                    "allow.auto.create.topics": False,
                    "topic.metadata.refresh.interval.ms": METADATA_AGE_MS,
                    "log_level": 0,  # it repeats itself while a broker is away; we say it once
                    "error_cb": self._heard_of,
                    **_translated(settings.options),
                }
            )
        except KafkaException as error:
            raise ConfigError(f"kafka.options: {error.args[0].str()}") from error

    def _heard_of(self, error: Any) -> None:
        """An error that belongs to no partition; called while polling."""
        if error.code() in REFUSED:
            self._refusal = error.str()

    def assign(self, offsets: Mapping[int, int | None], start: str = "earliest") -> dict[int, int]:
        """See `Consumer.assign`."""
        fresh = [partition for partition, offset in offsets.items() if offset is None]
        begin = {partition: offset for partition, offset in offsets.items() if offset is not None}
        begin |= self._start(fresh, start) if fresh else {}
        self._next = dict(begin)
        self._partitions = set(offsets)
        self._consumer.assign(self._named(self._next))
        return begin

    def add(self, partitions: Iterable[int]) -> dict[int, int]:
        """See `Consumer.add`."""
        begin = self._start(list(partitions), "earliest")
        self._next |= begin
        self._consumer.assign(self._named(self._next))
        return begin

    def partitions(self) -> set[int]:
        """The topic's partitions, as of a moment ago."""
        return self._partitions

    def topic_id(self) -> str | None:
        """The topic's id, as of a moment ago: here fetches do not say which topic they are of."""
        return self._topic_id

    def _start(self, partitions: Sequence[int], start: str) -> dict[int, int]:
        try:
            bounds = self._bounds(partitions)
            found = {partition: first if start == "earliest" else end for partition, (first, end) in bounds.items()}
            if start not in ("earliest", "latest"):
                time = datetime.fromisoformat(start)
                since_ms = int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
                at = self._consumer.offsets_for_times(self._named(dict.fromkeys(partitions, since_ms)), PROBE_S)
                found |= {part.partition: part.offset for part in at if part.offset >= 0}
        except KafkaException as error:
            raise BrokerUnavailable(f"the broker did not say where {self._settings.topic!r} begins: {error}") from error
        return found

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """See `Consumer.poll`."""
        errors, self._errors = self._errors, []
        for error in errors:
            self._judge(error)
        messages: list[Any] = self._consumer.consume(max_records, timeout_s)
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                record = Record(
                    message.partition(),
                    message.offset(),
                    message.timestamp()[1] / 1000,
                    message.key(),
                    message.value(),
                    message.headers() or (),
                )
                records.append(record)
            else:
                self._errors.append(error)  # for the next poll: what came beside it is not to be lost
        self._next |= {record.partition: record.offset + 1 for record in records}
        if self._refusal:
            reason, self._refusal = self._refusal, ""
            raise BrokerRefused(f"reading topic {self._settings.topic!r} is not allowed: {reason}")
        if time.monotonic() >= self._next_look_s:
            self._look()
        return records

    def _judge(self, error: Any) -> None:
        """Raises what an error of a partition means; what passes by itself is nothing."""
        topic = self._settings.topic
        if error.code() in LOST:
            self._look()  # where the topic was made again, its offsets are not lost but others
            raise OffsetsLost(
                f"topic {topic!r} no longer holds what to resume from ({self._where() or error.str()}); "
                'set kafka.on_lost_offsets = "earliest" or "latest" to go on without them, or give a new store.url'
            )
        if error.code() in REFUSED:
            raise BrokerRefused(f"reading topic {topic!r} is not allowed: {error.str()}")
        if error.code() in MADE_AGAIN:
            self._look()
        elif not error.retriable() and error.fatal():
            raise SourceError(f"topic {topic!r} cannot be read: {error.str()}")

    def _where(self) -> str:
        with suppress(TailstreamError):
            return "; ".join(
                f"partition {partition} begins at {first}, next to read is {self._next[partition]}"
                for partition, (first, _) in self.bounds().items()
            )
        return ""

    def _look(self) -> None:
        """Asks what the topic is now.

        Raises:
            TopicChanged: another one of the same name.
        """
        self._next_look_s = time.monotonic() + IDENTITY_S
        with suppress(BrokerUnavailable, TopicMissing):
            found = describe_topic(self._settings, self._settings.topic, PROBE_S)
            if found.topic_id != self._topic_id:
                raise TopicChanged(
                    f"topic {self._settings.topic!r} was deleted and made again while it was read (topic_id was "
                    f"{self._topic_id}, is {found.topic_id}): its offsets begin anew; give the trainer a new store.url"
                )
            self._partitions = set(found.partitions)

    def position(self, partition: int) -> int:
        """Offset of the next record of an assigned partition."""
        return self._next[partition]

    def positions(self) -> dict[int, int]:
        """Offset that each assigned partition is read on at: past transaction markers, which are no records."""
        found = dict(self._next)
        with suppress(KafkaException):
            for part in self._consumer.position(self._named(self._next)):
                found[part.partition] = max(found[part.partition], part.offset)
        return found

    def bounds(self) -> dict[int, tuple[int, int]]:
        """First offset and end of each assigned partition, asked of the broker."""
        try:
            return self._bounds(self._next)
        except KafkaException as error:
            raise BrokerUnavailable(f"the broker did not say where {self._settings.topic!r} ends: {error}") from error

    def _bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        topic = self._settings.topic
        return {p: self._consumer.get_watermark_offsets(TopicPartition(topic, p), PROBE_S) for p in partitions}

    def look_for_ends(self) -> dict[int, int] | None:
        """Where each partition ends, asked of the broker; None when it does not answer in `PROBE_S`."""
        try:
            return {partition: end for partition, (_, end) in self._bounds(self._next).items()}
        except KafkaException:
            return None

    def ends(self) -> dict[int, int]:
        """Where each partition ended at its last fetch; those never fetched from are left out."""
        topic = self._settings.topic
        marks = {p: self._consumer.get_watermark_offsets(TopicPartition(topic, p), cached=True) for p in self._next}
        return {partition: mark[1] for partition, mark in marks.items() if mark is not None and mark[1] >= 0}

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Goes on from these offsets."""
        self._next |= offsets
        self._consumer.assign(self._named(self._next))

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Shows offsets to the group's lag tools; nothing waits for it, and nothing depends on it."""
        with suppress(KafkaException):
            self._consumer.commit(offsets=self._named(offsets), asynchronous=True)

    def commit_and_wait(self, offsets: Mapping[int, int]) -> None:
        """Commits the group's offsets, and waits until it is done.

        Raises:
            BrokerUnavailable: it could not be done in `COMMIT_S`.
        """
        until = time.monotonic() + COMMIT_S
        try:
            self._consumer.commit(offsets=self._named(offsets), asynchronous=True)
            found = self._consumer.committed(self._named(offsets), max(0.1, until - time.monotonic()))
        except KafkaException as error:
            raise BrokerUnavailable(f"offsets of group {self._settings.group!r} were not committed: {error}") from error
        if any(part.offset != offsets[part.partition] for part in found):
            raise BrokerUnavailable(f"offsets of group {self._settings.group!r} were not committed")

    def _named(self, offsets: Mapping[int, int]) -> list[TopicPartition]:
        return [TopicPartition(self._settings.topic, partition, offset) for partition, offset in offsets.items()]

    def close(self) -> None:
        """Leaves the broker."""
        with suppress(KafkaException, RuntimeError):
            self._consumer.close()


def _translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """`kafka.options` by librdkafka's names.

    Raises:
        ConfigError: one has no counterpart.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "ssl_check_hostname":
            found["ssl.endpoint.identification.algorithm"] = "https" if value else "none"
        elif name in OPTIONS:
            found[OPTIONS[name]] = value
        else:
            raise ConfigError(
                f'kafka.options: {name!r} is not known where kafka.client = "confluent"; it takes {", ".join(OPTIONS)} '
                "and ssl_check_hostname"
            )
    return found
