"""The one file that knows the Kafka client: consumer, producer, administration, and their errors turned into ours."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import kafka
import kafka.admin
import kafka.errors
from kafka.structs import OffsetAndMetadata, TopicPartition

from trainer.batching import Record
from trainer.config import KafkaSettings
from trainer.errors import (
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    OffsetsLost,
    PublishError,
    SourceError,
    TopicChanged,
    TopicMissing,
)

CLIENT_ID: Final = "tailstream"
FETCH_BYTES: Final = 4 << 20  # a partition and fetch; the default of 1 MiB is a few thousand records
UNKNOWN_TOPIC: Final = 3  # error code of the protocol
LINGER_MS: Final = 20
MAX_IN_FLIGHT: Final = 10_000  # records sent and not yet acknowledged
PROBE_S: Final = 2.0  # longest wait for a sign of life of a broker that has sent nothing for a while
COMMIT_S: Final = 5.0
MAX_REQUEST_BYTES: Final = 64 << 20  # the client's own limit; what a topic takes is for the broker to say
METADATA_AGE_MS: Final = 10_000  # after which partitions that a topic has gained are known at the latest
# What the client reports, as text alone, when both sides talk and do not agree. An end of the stream in a TLS
# handshake is not among them: a broker that is being stopped does that too.
TLS_REFUSALS: Final = ("certificate_verify_failed", "wrong_version_number", "alert", "hostname mismatch", "no_shared")
REFUSED: Final = (
    kafka.errors.SaslAuthenticationFailedError,
    kafka.errors.UnsupportedSaslMechanismError,
    kafka.errors.IllegalSaslStateError,
    kafka.errors.AuthorizationError,
)
TOO_LARGE: Final = (kafka.errors.MessageSizeTooLargeError, kafka.errors.RecordListTooLargeError)


class TopicDescription(NamedTuple):
    """What a topic is at this moment."""

    cluster_id: str | None
    topic: str
    topic_id: str | None  # changes when a topic is deleted and made again; None where the broker has none
    partitions: tuple[int, ...]


class _Complaints(logging.Handler):
    """Keeps the client's last warning, and its last refusal: its exceptions hide why it could not connect."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self.refusal = ""

    def clear(self) -> None:
        self.last = self.refusal = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # The reason comes first, a summary without it last.
        if "Unable to bootstrap" not in message and "not ready" not in message:
            self.last = message
        causes = record.args if isinstance(record.args, tuple) else ()
        if any(isinstance(cause, REFUSED) for cause in causes) or _is_tls_refusal(message):
            self.refusal = message


def _is_tls_refusal(message: str) -> bool:
    return "ssl" in message.lower() and any(word in message.lower() for word in TLS_REFUSALS)


_complaints = _Complaints()
_client_log = logging.getLogger("kafka")
_client_log.addHandler(_complaints)
_client_log.propagate = False  # it repeats itself several times a second while a broker is away; we say it once


def _connect(factory: Callable[..., Any], settings: KafkaSettings, timeout_s: float, **options: Any) -> Any:
    """A client that has reached a broker.

    Raises:
        BrokerUnavailable: nobody answered within `timeout_s`.
        BrokerRefused: somebody did, and did not let us in.
        ConfigError: `kafka.options` has an option that the client does not know.
    """
    _complaints.clear()
    where = ", ".join(settings.bootstrap_servers)
    try:
        return factory(
            bootstrap_servers=settings.bootstrap_servers,
            client_id=CLIENT_ID,
            bootstrap_timeout_ms=int(timeout_s * 1000),
            **options,
            **settings.options,
        )
    except (AssertionError, TypeError, ValueError, kafka.errors.KafkaConfigurationError) as error:
        raise ConfigError(f"kafka.options: {error}") from error
    except (kafka.errors.KafkaError, OSError) as error:
        if _complaints.refusal or isinstance(error, REFUSED):
            reason = _complaints.refusal or str(error)
            raise BrokerRefused(f"the broker at {where} did not let us in: {reason}; see kafka.options") from error
        reason = _complaints.last or str(error)
        raise BrokerUnavailable(f"no Kafka broker answers at {where}: {reason}; see kafka.bootstrap_servers") from error


def cluster_id(settings: KafkaSettings, timeout_s: float = 5.0) -> str | None:
    """The id of the cluster that answers.

    Raises:
        BrokerUnavailable, BrokerRefused: none does, or none lets us in.
    """
    admin = _connect(kafka.KafkaAdminClient, settings, timeout_s)
    try:
        found: str | None = admin.describe_cluster()["cluster_id"]
    except kafka.errors.KafkaError as error:
        raise BrokerUnavailable(f"the broker did not say which cluster it is: {error}") from error
    finally:
        admin.close()
    return found


def describe_topic(settings: KafkaSettings, topic: str, timeout_s: float = 5.0) -> TopicDescription:
    """Asks a broker what a topic is.

    Raises:
        BrokerUnavailable, BrokerRefused: no broker could be asked.
        TopicMissing: there is no such topic.
    """
    admin = _connect(kafka.KafkaAdminClient, settings, timeout_s)
    try:
        cluster_id = admin.describe_cluster()["cluster_id"]
        (found,) = admin.describe_topics([topic])
    except kafka.errors.KafkaError as error:
        raise BrokerUnavailable(f"the broker did not describe topic {topic!r}: {error}") from error
    finally:
        admin.close()
    if found["error_code"] == UNKNOWN_TOPIC:
        raise TopicMissing(f"topic {topic!r} does not exist at {', '.join(settings.bootstrap_servers)}")
    if found["error_code"]:
        code = kafka.errors.for_code(found["error_code"])
        if issubclass(code, REFUSED):
            raise BrokerRefused(f"topic {topic!r} may not be described: {code.__name__}; ask for the permission")
        if issubclass(code, kafka.errors.RetriableError):
            raise BrokerUnavailable(f"the broker cannot describe topic {topic!r} yet: {code.__name__}")
        raise SourceError(f"topic {topic!r} cannot be described: {code.__name__}")
    partitions = tuple(sorted(part["partition_index"] for part in found["partitions"]))
    topic_id = found["topic_id"]
    return TopicDescription(cluster_id, topic, str(topic_id) if topic_id else None, partitions)


def create_topic(settings: KafkaSettings, topic: str, partitions: int = -1, timeout_s: float = 5.0) -> bool:
    """Makes a topic unless it is there; -1 partitions leaves their number to the broker.

    Returns:
        Whether it was made.

    Raises:
        BrokerUnavailable, BrokerRefused: no broker could be asked.
        SourceError: the broker will not make it.
    """
    admin = _connect(kafka.KafkaAdminClient, settings, timeout_s)
    try:
        (found,) = admin.describe_topics([topic])
        if found["error_code"] == 0:
            return False
        admin.create_topics([kafka.admin.NewTopic(topic, partitions, -1)])
        admin.wait_for_topics([topic])
    except kafka.errors.TopicAlreadyExistsError:
        return False
    except REFUSED as error:
        raise BrokerRefused(f"topic {topic!r} is not there and may not be made: {error}; make it yourself") from error
    except kafka.errors.RetriableError as error:
        raise BrokerUnavailable(f"topic {topic!r} could not be made yet: {error}") from error
    except kafka.errors.KafkaError as error:
        raise SourceError(f"topic {topic!r} is not there and could not be made: {error}") from error
    finally:
        admin.close()
    return True


class Consumer:
    """Reads assigned partitions of one topic, from offsets given, and never chooses an offset by itself."""

    def __init__(self, settings: KafkaSettings, timeout_s: float = 5.0) -> None:
        self._settings = settings
        self._consumer = _connect(
            kafka.KafkaConsumer,
            settings,
            timeout_s,
            group_id=settings.group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level=settings.isolation,
            max_partition_fetch_bytes=FETCH_BYTES,
            allow_auto_create_topics=False,
            metadata_max_age_ms=METADATA_AGE_MS,
        )
        self._assigned: dict[int, TopicPartition] = {}

    def assign(self, offsets: Mapping[int, int | None], start: str = "earliest") -> dict[int, int]:
        """Takes partitions at these offsets; None means at `start`: `earliest`, `latest` or an ISO 8601 time.

        Returns:
            The offset that each partition begins at.
        """
        self._assigned = {partition: TopicPartition(self._settings.topic, partition) for partition in offsets}
        self._consumer.assign(list(self._assigned.values()))
        fresh = [self._assigned[partition] for partition, offset in offsets.items() if offset is None]
        begin = {partition: offset for partition, offset in offsets.items() if offset is not None}
        begin |= self._start(fresh, start) if fresh else {}
        self.seek(begin)
        return begin

    def add(self, partitions: Iterable[int]) -> dict[int, int]:
        """Takes further partitions, at their beginning; the others stay where they are.

        Returns:
            The offset that each begins at.

        Raises:
            BrokerUnavailable: the broker does not say where they begin; nothing has changed.
        """
        added = {partition: TopicPartition(self._settings.topic, partition) for partition in partitions}
        begin = self._start(list(added.values()), "earliest")
        self._assigned |= added
        self._consumer.assign(list(self._assigned.values()))
        self.seek(begin)
        return begin

    def partitions(self) -> set[int]:
        """The topic's partitions as of the newest metadata; those assigned where it is not known."""
        # The method of the consumer's own waits for a broker where nothing is known.
        found = self._consumer._cluster.partitions_for_topic(self._settings.topic)  # noqa: SLF001
        return set(found or self._assigned)

    def _start(self, partitions: Sequence[TopicPartition], start: str) -> dict[int, int]:
        timeout_ms = int(PROBE_S * 1000)
        try:
            if start == "earliest":
                found = self._consumer.beginning_offsets(partitions, timeout_ms=timeout_ms)
            else:
                found = self._consumer.end_offsets(partitions, timeout_ms=timeout_ms)
            if start not in ("earliest", "latest"):
                time = datetime.fromisoformat(start)
                since_ms = int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
                at = self._consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
                found = {part: at[part].offset if at.get(part) else end for part, end in found.items()}
        except kafka.errors.KafkaError as error:
            raise BrokerUnavailable(f"the broker did not say where {self._settings.topic!r} begins: {error}") from error
        return {part.partition: offset for part, offset in found.items()}

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Up to `max_records` records, in the order of their offsets within each partition.

        Raises:
            OffsetsLost: a partition no longer holds the offset that is next.
            TopicChanged: its log is not the one read so far.
            BrokerRefused: reading is not allowed.
            SourceError: a record cannot be read at all.
        """
        try:
            fetched = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
        except kafka.errors.OffsetOutOfRangeError as error:
            raise OffsetsLost(self._lost(error)) from error
        except kafka.errors.LogTruncationError as error:
            raise TopicChanged(
                f"topic {self._settings.topic!r} was cut back or made again while it was read: {error}; "
                "restore it, or give the trainer a new store.url to start over"
            ) from error
        except REFUSED as error:
            raise BrokerRefused(f"reading topic {self._settings.topic!r} is not allowed: {error}") from error
        except kafka.errors.KafkaError as error:
            if error.retriable:
                return []
            where = ", ".join(f"partition {p} at offset {offset}" for p, offset in sorted(self.positions().items()))
            raise SourceError(
                f"topic {self._settings.topic!r} cannot be read: {error}; next to read are {where}; where a record is "
                'damaged, kafka-delete-records up to behind it and kafka.on_lost_offsets = "earliest" go on without it'
            ) from error
        return [
            Record(r.partition, r.offset, r.timestamp / 1000, r.key, r.value, r.headers)
            for records in fetched.values()
            for r in records
        ]

    def _lost(self, error: Exception) -> str:
        beyond, before = [], []
        with suppress(kafka.errors.KafkaError, BrokerUnavailable):
            for partition, (first, end) in self.bounds().items():
                next_offset = self.position(partition)
                if next_offset > end:
                    beyond.append(f"partition {partition} ends at {end}, next to read is {next_offset}")
                elif next_offset < first:
                    before.append(f"partition {partition} begins at {first}, next to read is {next_offset}")
        advice = (
            "it was cut back or made again: restore it, or give a new store.url"
            if beyond
            else 'set kafka.on_lost_offsets = "earliest" or "latest" to go on without them, or give a new store.url'
        )
        where = "; ".join([*beyond, *before]) or error
        return f"topic {self._settings.topic!r} no longer holds what to resume from ({where}); {advice}"

    def position(self, partition: int) -> int:
        """Offset of the next record of an assigned partition."""
        return int(self._consumer.position(self._assigned[partition]))

    def positions(self) -> dict[int, int]:
        """Offset that each assigned partition is read on at, where it is known without asking the broker."""
        found: dict[int, int] = {}
        with suppress(kafka.errors.KafkaError):
            for partition, part in self._assigned.items():
                position = self._consumer.position(part, timeout_ms=0)
                if position is not None:
                    found[partition] = int(position)
        return found

    def bounds(self) -> dict[int, tuple[int, int]]:
        """First offset and end of each assigned partition, asked of the broker."""
        parts = list(self._assigned.values())
        try:
            begin, end = self._consumer.beginning_offsets(parts), self._consumer.end_offsets(parts)
        except kafka.errors.KafkaError as error:
            raise BrokerUnavailable(f"the broker did not say where {self._settings.topic!r} ends: {error}") from error
        return {part.partition: (begin[part], end[part]) for part in parts}

    def topic_id(self) -> str | None:
        """The topic's id as of the newest metadata; None where it is not known.

        Fetches carry this id, so what a poll returned before it changed is of the topic before.
        """
        found = self._consumer._cluster.topic_id(self._settings.topic)  # noqa: SLF001 - said nowhere else
        return str(found) if found else None

    def look_for_ends(self) -> dict[int, int] | None:
        """Where each partition ends, asked of the broker; None when it does not answer in `PROBE_S`."""
        parts = list(self._assigned.values())
        try:
            found = self._consumer.end_offsets(parts, timeout_ms=int(PROBE_S * 1000))
        except kafka.errors.KafkaError:
            return None
        return {part.partition: end for part, end in found.items()}

    def committed(self, partitions: Iterable[int]) -> dict[int, int]:
        """The group's offsets; partitions for which it has none are left out.

        Raises:
            BrokerUnavailable: the broker does not say.
        """
        parts = [TopicPartition(self._settings.topic, partition) for partition in partitions]
        try:
            found = {part.partition: self._consumer.committed(part) for part in parts}
        except kafka.errors.KafkaError as error:
            raise BrokerUnavailable(f"the broker did not say what group {self._settings.group!r} has read") from error
        return {partition: offset for partition, offset in found.items() if offset is not None}

    def commit_and_wait(self, offsets: Mapping[int, int]) -> None:
        """Commits the group's offsets, and waits until it is done.

        Raises:
            BrokerUnavailable: it could not be done.
        """
        try:
            self._consumer.commit(self._named(offsets), timeout_ms=int(COMMIT_S * 1000))
        except kafka.errors.KafkaError as error:
            raise BrokerUnavailable(f"offsets of group {self._settings.group!r} were not committed: {error}") from error

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Goes on from these offsets."""
        for partition, offset in offsets.items():
            self._consumer.seek(self._assigned[partition], offset)

    def ends(self) -> dict[int, int]:
        """Where each partition ended at its last fetch; those never fetched from are left out."""
        marks = {partition: self._consumer.highwater(part) for partition, part in self._assigned.items()}
        return {partition: mark for partition, mark in marks.items() if mark is not None}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Shows offsets to the group's lag tools; nothing waits for it, and nothing depends on it."""
        with suppress(kafka.errors.KafkaError):
            self._consumer.commit_async(self._named(offsets))

    def _named(self, offsets: Mapping[int, int]) -> dict[TopicPartition, OffsetAndMetadata]:
        return {self._assigned[partition]: OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}

    def close(self) -> None:
        """Leaves the broker."""
        with suppress(kafka.errors.KafkaError):
            self._consumer.close()


class Sent:
    """A record given to the client, and what has become of it."""

    __slots__ = ("_future",)

    def __init__(self, future: Any) -> None:
        self._future = future

    @property
    def acknowledged(self) -> bool:
        """Whether the broker has it."""
        return bool(self._future.succeeded())

    @property
    def failure(self) -> str:
        """Why the broker will not get it; empty as long as it may."""
        return repr(self._future.exception) if self._future.failed() else ""

    @property
    def too_large(self) -> bool:
        """Whether the broker does not take that much in one batch."""
        return isinstance(self._future.exception, TOO_LARGE)


class Producer:
    """Sends records, and remembers those not yet acknowledged.

    Args:
        settings: where to.
        timeout_s: how long to look for a broker.
        idempotent: whether a retry sends no record twice; such a client sends nothing more after a record was refused.
        block_s: how long a record may wait for its topic to be there, or for room.
    """

    def __init__(
        self, settings: KafkaSettings, timeout_s: float = 5.0, *, idempotent: bool = True, block_s: float = 60.0
    ) -> None:
        self._producer = _connect(
            kafka.KafkaProducer,
            settings,
            timeout_s,
            acks="all",
            linger_ms=LINGER_MS,
            max_request_size=MAX_REQUEST_BYTES,
            enable_idempotence=idempotent,
            max_block_ms=int(block_s * 1000),
            compression_type="lz4",
        )
        self._unacknowledged: list[Any] = []
        self.acknowledged = 0

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
    ) -> Sent:
        """Queues a record; waits for acknowledgements when many are queued.

        A header without a value gets an empty one: the client sends no other.

        Raises:
            PublishError: a record could not be sent, this one or one before it.
        """
        if len(self._unacknowledged) >= MAX_IN_FLIGHT:
            self.flush()
        try:
            future = self._producer.send(topic, value, key, [(name, text or b"") for name, text in headers])
        except kafka.errors.KafkaError as error:
            raise PublishError(f"a record could not be sent to topic {topic!r}: {error}") from error
        self._unacknowledged.append(future)
        return Sent(future)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Waits until all records sent are acknowledged.

        Raises:
            PublishError: one was not; those counted in `acknowledged` are safe.
        """
        waiting, self._unacknowledged = self._unacknowledged, []
        failed, reason = 0, ""
        try:
            self._producer.flush(timeout_s)
        except kafka.errors.KafkaError as error:
            reason = str(error)
        for future in waiting:
            if future.succeeded():
                self.acknowledged += 1
            else:
                failed, reason = failed + 1, str(future.exception or reason)
        if failed:
            raise PublishError(f"{failed} of {len(waiting)} records were not acknowledged: {reason}")

    def close(self) -> None:
        """Leaves the broker, giving up on what was not flushed."""
        with suppress(kafka.errors.KafkaError):
            self._producer.close(timeout=1)
