"""Where records come from: a Kafka topic, or a file."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import structlog

from trainer.batching import Progress, Record
from trainer.config import KafkaSettings
from trainer.errors import BrokerUnavailable, OffsetsLost, TopicChanged, TopicMissing
from trainer.files import read_values
from trainer.kafka_client import Consumer, TopicDescription, describe_topic
from trainer.schema import FeatureSchema
from trainer.snapshot import Manifest

BACKOFF_S: Final = (0.2, 5.0)  # first and longest pause between tries to reach a broker

log = structlog.get_logger()


class RecordSource(Protocol):
    """Records by partition, in the order of their offsets, from wherever it was told to begin."""

    identity: TopicDescription
    exhausted: bool  # whether no more will come, ever; a topic never is

    def open(self, progress: Progress) -> None:
        """Begins after `progress`; partitions that are not in it begin where the source's settings say."""

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Up to `max_records` records, or none once `timeout_s` has passed."""

    def ends(self) -> dict[int, int]:
        """End offset of each partition, as far as it is known."""

    def commit(self, progress: Progress) -> None:
        """Says from outside how far a durable snapshot has come."""

    def close(self) -> None:
        """Lets go."""


class KafkaSource:
    """All partitions of one topic, assigned and not subscribed: one trainer owns them all.

    Attributes:
        identity: the topic as it was when the source was opened.
        lost_records: records skipped because their offsets had expired, by `kafka.on_lost_offsets`.
    """

    def __init__(self, settings: KafkaSettings, stop: threading.Event) -> None:
        self._settings = settings
        self._stop = stop
        self._consumer: Consumer | None = None
        self.identity = TopicDescription(None, settings.topic, None, ())
        self.exhausted = False
        self.lost_records = 0

    def open(self, progress: Progress) -> None:
        """Begins after `progress`; `wait` has found the topic.

        Raises:
            BrokerUnavailable, BrokerRefused: the broker went away again, or does not let us in.
            TopicChanged: there are fewer partitions than `progress` has.
        """
        missing = sorted(set(progress) - set(self.identity.partitions))
        if missing:
            raise TopicChanged(
                f"topic {self._settings.topic!r} has partitions {list(self.identity.partitions)}, but the snapshot has "
                f"progress in {missing} too: it is another topic; give it its own store.url"
            )
        self._consumer = Consumer(self._settings, timeout_s=30)
        offsets = {p: progress[p].next_offset if p in progress else None for p in self.identity.partitions}
        begun = self._consumer.assign(offsets)
        log.info("reading", topic=self._settings.topic, offsets={str(p): offset for p, offset in begun.items()})

    def wait(self) -> None:
        """Waits until broker and topic are there, or until told to stop, and notes what the topic is.

        Raises:
            BrokerRefused: the broker does not let us in; waiting would not help.
        """
        pause, said = BACKOFF_S[0], None
        while not self._stop.is_set():
            try:
                self.identity = describe_topic(self._settings, self._settings.topic)
                return
            except (BrokerUnavailable, TopicMissing) as error:
                if type(error) is not said:  # once per change of state
                    said = type(error)
                    log.warning("waiting for the topic", reason=str(error))
            self._stop.wait(pause)
            pause = min(2 * pause, BACKOFF_S[1])

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Records as they come.

        Raises:
            OffsetsLost: they have expired, and `kafka.on_lost_offsets` is `fail`.
            TopicChanged: the topic is no longer the one that was opened.
        """
        if self._consumer is None:
            return []
        try:
            return self._consumer.poll(max_records, timeout_s)
        except OffsetsLost as error:
            if self._settings.on_lost_offsets == "fail":
                raise
            self._skip_lost(self._consumer, error)
            return []

    def _skip_lost(self, consumer: Consumer, error: OffsetsLost) -> None:
        for partition, (first, end) in consumer.bounds().items():
            position = consumer.position(partition)
            if first <= position <= end:
                continue
            target = first if self._settings.on_lost_offsets == "earliest" else end
            lost = max(0, target - position)
            self.lost_records += lost
            log.warning("records lost", partition=partition, next_offset=position, goes_on_at=target, records=lost)
            consumer.seek({partition: target})

    def ends(self) -> dict[int, int]:
        """High watermark of each partition at its last fetch."""
        return {} if self._consumer is None else self._consumer.ends()

    def commit(self, progress: Progress) -> None:
        """Commits offsets for the group, for lag tools; resuming does not use them."""
        if self._consumer is not None:
            self._consumer.commit({partition: part.next_offset for partition, part in progress.items()})

    def close(self) -> None:
        """Leaves the broker."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def check_same_topic(manifest: Manifest, identity: TopicDescription) -> None:
    """Whether a snapshot's offsets belong to this topic.

    Raises:
        TopicChanged: it is on another cluster, or was deleted and made again.
    """
    for name in ("cluster_id", "topic", "topic_id"):
        stored, found = getattr(manifest, name), getattr(identity, name)
        if stored is not None and found is not None and stored != found:
            raise TopicChanged(
                f"snapshot {manifest.version} has learned from {name} {stored!r}, but this is {found!r}: its offsets "
                "mean nothing here; point kafka.bootstrap_servers and kafka.topic back, or give a new store.url"
            )


class FileSource:
    """A data file as one partition, the record's number its offset."""

    def __init__(self, path: Path, schema: FeatureSchema) -> None:
        self._path = path
        self._schema = schema
        self._values: Iterator[tuple[int, bytes]] = iter(())
        self.identity = TopicDescription(None, str(path), None, (0,))
        self.exhausted = False

    def open(self, progress: Progress) -> None:
        """Begins after the records that `progress` covers."""
        begin = progress[0].next_offset if 0 in progress else 0
        self._values = itertools.islice(enumerate(read_values(self._path, self._schema)), begin, None)

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records; none at the end of the file.

        Raises:
            ConfigError: the file cannot be read.
        """
        now = time.time()
        records = [Record(0, n, now, None, value) for n, value in itertools.islice(self._values, max_records)]
        self.exhausted = len(records) < max_records
        return records

    def ends(self) -> dict[int, int]:
        """Nothing: where a file ends is known once it has been read."""
        return {}

    def commit(self, progress: Progress) -> None:
        """Nothing: nobody asks how far a file has been read."""

    def close(self) -> None:
        """Lets go of the file."""
        self._values = iter(())
