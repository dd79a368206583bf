"""Where records come from: a Kafka topic, or a file."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar

import structlog

from trainer.batching import Batcher, PartitionProgress, Progress, Record
from trainer.config import KafkaSettings, Settings
from trainer.errors import BrokerUnavailable, OffsetsLost, SourceError, TopicChanged, TopicMissing
from trainer.files import read_values
from trainer.kafka_client import PROBE_S, Consumer, TopicDescription, describe_topic
from trainer.schema import FeatureSchema

BACKOFF_S: Final = (0.2, 5.0)  # first and longest pause between tries to reach a broker
LOOK_S: Final = 10.0  # between looks for a first partition, where there are fewer than ranks
SILENCE_S: Final = 1.0  # without a record, before the broker is asked whether it is there

log = structlog.get_logger()
T = TypeVar("T")


class _Place(NamedTuple):
    """How far one partition has been read; offsets."""

    begun: int
    delivered: int  # one past the last record that `poll` returned
    position: int  # where the client read on after the last silence: past transaction markers, which are no records


class Standing(NamedTuple):
    """What a source knows besides its records."""

    broker_up: bool  # whether whoever has the records answers
    lost_records: int = 0  # that had expired before they were read
    ends: Mapping[int, int] = {}  # where each partition ended when last heard of
    places: Mapping[int, _Place] = {}

    def lag(self, progress: Progress) -> dict[int, int]:
        """Records of each partition between `progress` and its end."""
        return {p: max(0, end - _reached(self.places[p], progress.get(p))) for p, end in self.ends.items()}


class RecordSource(Protocol):
    """Records by partition, in the order of their offsets, from wherever it was told to begin."""

    identity: TopicDescription
    exhausted: bool  # whether no more will come, ever; a topic never is

    def open(self, progress: Progress) -> dict[int, int]:
        """Begins after `progress`; without any, where the source's settings say.

        Returns:
            The offset that each partition begins at.
        """

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Up to `max_records` records, or none once `timeout_s` has passed."""

    def standing(self) -> Standing:
        """What it knows besides."""

    def commit(self, progress: Progress) -> None:
        """Says from outside how far a durable snapshot has come."""

    def close(self) -> None:
        """Lets go."""


class TopicConsumer(Protocol):
    """A client that reads assigned partitions; what each method does is said at `trainer.kafka_client.Consumer`."""

    def assign(self, offsets: Mapping[int, int | None], start: str = "earliest") -> dict[int, int]: ...  # noqa: D102
    def add(self, partitions: Iterable[int]) -> dict[int, int]: ...  # noqa: D102
    def partitions(self) -> set[int]: ...  # noqa: D102
    def topic_id(self) -> str | None: ...  # noqa: D102
    def poll(self, max_records: int, timeout_s: float) -> list[Record]: ...  # noqa: D102
    def position(self, partition: int) -> int: ...  # noqa: D102
    def positions(self) -> dict[int, int]: ...  # noqa: D102
    def bounds(self) -> dict[int, tuple[int, int]]: ...  # noqa: D102
    def look_for_ends(self) -> dict[int, int] | None: ...  # noqa: D102
    def ends(self) -> dict[int, int]: ...  # noqa: D102
    def seek(self, offsets: Mapping[int, int]) -> None: ...  # noqa: D102
    def commit(self, offsets: Mapping[int, int]) -> None: ...  # noqa: D102
    def commit_and_wait(self, offsets: Mapping[int, int]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Share(NamedTuple):
    """Which partitions are read: those whose number leaves this remainder."""

    remainder: int
    divisor: int

    def has(self, partition: int) -> bool:
        """Whether a partition is read."""
        return partition % self.divisor == self.remainder


WHOLE: Final = Share(0, 1)


class KafkaSource:
    """Partitions of one topic, assigned and not subscribed: one trainer owns them all, or each of its ranks its share.

    Partitions that the topic gains while it is read are read from their beginning. The client is for one thread:
    `open`, `poll` and `close` must not run at the same time. `standing` and `commit` may.

    Attributes:
        identity: the topic as it was when the source was opened.
        lost_records: records skipped because their offsets had expired, by `kafka.on_lost_offsets`.
        broker_up: whether the broker answered when last heard or asked.
    """

    def __init__(self, settings: KafkaSettings, stop: threading.Event, share: Share = WHOLE) -> None:
        self._settings = settings
        self._share = share
        self._stop = stop
        self._consumer: TopicConsumer | None = None
        self._ends: dict[int, int] = {}
        self._places: dict[int, _Place] = {}
        self._durable: Progress = {}
        self._committed: dict[int, int] = {}
        self._silent_since_s = 0.0
        self._pause_s = SILENCE_S
        self._trouble = ""
        self.identity = TopicDescription(None, settings.topic, None, ())
        self.exhausted = False
        self.lost_records = 0
        self.broker_up = False

    def open(self, progress: Progress) -> dict[int, int]:
        """Begins after `progress`; `wait` has found the topic. A broker that is away again is waited for.

        Only a first start begins where `kafka.start` says. Later, a partition without progress is one that the topic
        has gained, and nothing of it has been read.

        Returns:
            The offset that each partition begins at; none when told to stop before.

        Raises:
            BrokerRefused: the broker does not let us in.
            TopicChanged: there are fewer partitions than `progress` has.
        """
        missing = sorted(set(progress) - set(self.identity.partitions))
        if missing:
            raise TopicChanged(
                f"topic {self._settings.topic!r} has partitions {list(self.identity.partitions)}, but the snapshot has "
                f"progress in {missing} too: it is another topic; give it its own store.url"
            )
        mine = filter(self._share.has, self.identity.partitions)
        offsets = {p: progress[p].next_offset if p in progress else None for p in mine}
        start = "earliest" if progress else self._settings.start

        def begin() -> tuple[TopicConsumer, dict[int, int]]:
            consumer = _consumer(self._settings)
            try:
                return consumer, consumer.assign(offsets, start)
            except BaseException:
                consumer.close()
                raise

        opened = self.insist(begin)
        if opened is None:
            return {}
        self._consumer, begun = opened
        self._places = {partition: _Place(offset, offset, offset) for partition, offset in begun.items()}
        log.info("reading", topic=self._settings.topic, offsets=_by_name(begun))
        self._heard()
        return begun

    def wait(self) -> None:
        """Waits until broker and topic are there, or until told to stop, and notes what the topic is.

        Raises:
            BrokerRefused: the broker does not let us in; waiting would not help.
        """
        self.identity = self.insist(lambda: describe_topic(self._settings, self._settings.topic)) or self.identity

    def insist(self, act: Callable[[], T]) -> T | None:
        """What `act` returns once broker and topic are there; None when told to stop before."""
        pause_s = BACKOFF_S[0]
        while not self._stop.is_set():
            try:
                found = act()
            except (BrokerUnavailable, TopicMissing) as error:
                self._in_trouble("waiting for the topic", error)
            else:
                self._heard()
                return found
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_S[1])
        return None

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Records as they come; none while the broker is away, which is waited out.

        Raises:
            OffsetsLost: they have expired, and `kafka.on_lost_offsets` is `fail`.
            TopicChanged: the topic is no longer the one that was opened.
            BrokerRefused: we are no longer let in.
        """
        consumer = self._consumer
        if consumer is None:
            return []
        if not self._places:
            self._look_for_partitions(consumer, timeout_s)
            return []
        offsets = self._to_commit()
        if offsets != self._committed:
            consumer.commit(offsets)
            self._committed = offsets
        try:
            records = consumer.poll(max_records, timeout_s)
        except OffsetsLost as error:
            with suppress(BrokerUnavailable):  # it went away just now: the next poll finds the same
                self._skip_lost(consumer, error)
            return []
        topic_id = consumer.topic_id()
        if topic_id is not None and self.identity.topic_id not in (None, topic_id):
            raise self._made_again(topic_id)
        added = consumer.partitions() - set(self.identity.partitions)
        if added:
            self._take_up(consumer, added)
        if records:
            delivered = {record.partition: record.offset + 1 for record in records}
            self._places |= {p: self._places[p]._replace(delivered=after) for p, after in delivered.items()}
            self._ends = consumer.ends()
            self._heard()
        elif time.monotonic() - self._silent_since_s > self._pause_s:
            self._ask(consumer)
        return records

    def _look_for_partitions(self, consumer: TopicConsumer, timeout_s: float) -> None:
        """Whether the topic has gained one for this share, which has none so far: then nobody else notices."""
        self._stop.wait(timeout_s)
        if time.monotonic() - self._silent_since_s > LOOK_S:
            self._silent_since_s = time.monotonic()
            with suppress(BrokerUnavailable, TopicMissing):
                found = describe_topic(self._settings, self._settings.topic, PROBE_S)
                self._take_up(consumer, set(found.partitions) - set(self.identity.partitions))

    def _take_up(self, consumer: TopicConsumer, partitions: set[int]) -> None:
        """Reads partitions that the topic has gained, too; from their beginning, so that nothing is missed."""
        mine = set(filter(self._share.has, partitions))
        try:
            begun = consumer.add(mine) if mine else {}
        except BrokerUnavailable:
            return  # no leader yet: the next poll tries again
        self.identity = self.identity._replace(partitions=tuple(sorted({*self.identity.partitions, *partitions})))
        self._places |= {p: _Place(offset, offset, offset) for p, offset in begun.items()}
        if begun:
            log.info("reading partitions that were added", topic=self._settings.topic, offsets=_by_name(begun))

    def _ask(self, consumer: TopicConsumer) -> None:
        """Whether nothing comes because there is nothing, or because nobody is there."""
        ends = consumer.look_for_ends()
        if ends is not None and not self._trouble:
            self._places |= {p: self._places[p]._replace(position=at) for p, at in consumer.positions().items()}
            self._ends = ends
            self._heard()
            return
        try:
            found = describe_topic(self._settings, self._settings.topic, PROBE_S)
        except (BrokerUnavailable, TopicMissing) as error:
            self._in_trouble("the broker is away", error)
            self._silent_since_s = time.monotonic()
            self._pause_s = min(2 * self._pause_s, BACKOFF_S[1])
            return
        if found.topic_id != self.identity.topic_id:
            raise self._made_again(found.topic_id)
        if found.cluster_id != self.identity.cluster_id:
            raise TopicChanged(
                f"the cluster at {', '.join(self._settings.bootstrap_servers)} is another one than before: it was "
                f"{self.identity.cluster_id}, it is {found.cluster_id}; give it its own store.url"
            )
        self._heard()

    def _made_again(self, topic_id: str | None) -> TopicChanged:
        return TopicChanged(
            f"topic {self._settings.topic!r} was deleted and made again while it was read (topic_id was "
            f"{self.identity.topic_id}, is {topic_id}): its offsets begin anew; give the trainer a new store.url"
        )

    def _heard(self) -> None:
        self._silent_since_s, self._pause_s, self.broker_up = time.monotonic(), SILENCE_S, True
        if self._trouble:
            self._trouble = ""
            self._committed = {}  # who knows whether the last commit arrived
            log.info("the broker is there", topic=self._settings.topic)

    def _in_trouble(self, what: str, error: SourceError) -> None:
        """Notes it, and says it once per change of state."""
        self.broker_up = isinstance(error, TopicMissing)
        kind = type(error).__name__
        if kind != self._trouble:
            log.warning(what if kind == "BrokerUnavailable" else "waiting for the topic", reason=str(error))
        self._trouble = kind

    def _skip_lost(self, consumer: TopicConsumer, error: OffsetsLost) -> None:
        """Goes on behind what has expired.

        Raises:
            OffsetsLost: that is not allowed.
            TopicChanged: the topic ends before what has been read, so it was cut back.
        """
        if self._settings.on_lost_offsets == "fail":
            raise error
        for partition, (first, end) in consumer.bounds().items():
            position = consumer.position(partition)
            if position > end:
                raise TopicChanged(
                    f"topic {self._settings.topic!r}, partition {partition}, ends at {end}, but has been read up to "
                    f"{position}: it was cut back or made again; restore it, or give the trainer a new store.url"
                ) from error
            if position >= first:
                continue
            target = first if self._settings.on_lost_offsets == "earliest" else end
            self.lost_records += target - position
            log.warning(
                "records lost", partition=partition, next_offset=position, goes_on_at=target, records=target - position
            )
            consumer.seek({partition: target})

    def standing(self) -> Standing:
        """What is known of the broker, and of where each partition ends."""
        return Standing(self.broker_up, self.lost_records, dict(self._ends), dict(self._places))

    def commit(self, progress: Progress) -> None:
        """Has the offsets committed for the group, for lag tools; resuming does not use them."""
        self._durable = progress

    def _to_commit(self) -> dict[int, int]:
        """Offsets up to which nothing is left to learn from, transaction markers included."""
        return {p: _reached(self._places[p], part) for p, part in self._durable.items() if p in self._places}

    def close(self) -> None:
        """Leaves the broker, the last commit made if it is there."""
        if self._consumer is None:
            return
        offsets = self._to_commit()
        if offsets != self._committed and self.broker_up:
            with suppress(BrokerUnavailable):
                self._consumer.commit_and_wait(offsets)
        self._consumer.close()
        self._consumer = None


def _consumer(settings: KafkaSettings) -> TopicConsumer:
    if settings.client == "confluent":
        from trainer.confluent_client import ConfluentConsumer  # an extra, which need not be there

        return ConfluentConsumer(settings)
    return Consumer(settings)


def _reached(place: _Place, part: PartitionProgress | None) -> int:
    """The offset up to which nothing is left to learn from."""
    done = place.begun if part is None else part.next_offset
    return max(done, place.position) if done >= place.delivered else done


def _by_name(offsets: Mapping[int, int]) -> dict[str, int]:
    """Offsets as a log line has them."""
    return {str(partition): offset for partition, offset in sorted(offsets.items())}


class FileSource:
    """A data file as one partition, the record's number its offset."""

    def __init__(self, path: Path, schema: FeatureSchema) -> None:
        self._path = path
        self._schema = schema
        self._values: Iterator[tuple[int, bytes]] = iter(())
        self.identity = TopicDescription(None, str(path), None, (0,))
        self.exhausted = False

    def open(self, progress: Progress) -> dict[int, int]:
        """Begins after the records that `progress` covers."""
        begin = progress[0].next_offset if 0 in progress else 0
        self._values = itertools.islice(enumerate(read_values(self._path, self._schema)), begin, None)
        return {0: begin}

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records; none at the end of the file.

        Raises:
            ConfigError: the file cannot be read.
        """
        now = time.time()
        records = [Record(0, n, now, None, value) for n, value in itertools.islice(self._values, max_records)]
        self.exhausted = len(records) < max_records
        return records

    def standing(self) -> Standing:
        """It is there; where it ends is known once it has been read."""
        return Standing(broker_up=True)

    def commit(self, progress: Progress) -> None:
        """Nothing: nobody asks how far a file has been read."""

    def close(self) -> None:
        """Lets go of the file."""
        self._values = iter(())


def kafka_batches(
    settings: Settings, identity: TopicDescription, share: Share, stop: threading.Event
) -> tuple[KafkaSource, Batcher]:
    """A source of a topic that `KafkaSource.wait` has found, and what batches its records."""
    source = KafkaSource(settings.kafka, stop, share)
    source.identity = identity
    return source, Batcher(FeatureSchema.of(settings), settings.batch.size)
