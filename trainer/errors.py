"""Every error that Tailstream raises on purpose.

Each message says what happened, where (topic, partition, offset, field, file) and what to do about it.

TailstreamError
├── ConfigError               the configuration cannot be used                                   exit 2
├── RecordError               one record cannot be learned from; it becomes a dead letter
├── SourceError               records cannot be read                                             exit 4
│   ├── BrokerUnavailable     nobody answers at the bootstrap servers
│   ├── BrokerRefused         they answer, and do not let us in (password, certificate, permission)
│   ├── TopicMissing          the topic does not exist
│   ├── TopicChanged          another cluster, a recreated topic, fewer partitions
│   └── OffsetsLost           the offsets to resume from are no longer in the topic
├── SnapshotError             a snapshot or its store cannot be used                             exit 5
│   ├── SnapshotCorrupt       a file is torn, missing or altered
│   ├── SnapshotMismatch      the store holds a model that the configuration does not describe
│   ├── StoreLocked           another trainer writes to this store
│   └── StoreUnavailable      an object store is away, or does not let us in
├── PublishError              records could not be sent                                          exit 6
├── RankLost                  another rank of a training job ended                             exit 8
└── DemoError                 a part of the demo could not be started, or died                   exit 7
"""

from typing import Any, ClassVar


class TailstreamError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(TailstreamError):
    """The configuration cannot be used."""

    exit_code = 2


class RecordError(TailstreamError):
    """One record cannot be learned from or predicted for.

    Attributes:
        reason: a short word for metrics, for instance `not_json`.
        field: dotted path of the field at fault, or "" for the record as a whole.
        instance: the record's place, from 0, where several were read at once; else None.
    """

    instance: int | None = None

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self), self.field), self.__dict__


class SourceError(TailstreamError):
    """Records cannot be read."""

    exit_code = 4


class BrokerUnavailable(SourceError):
    """Nobody answers at the bootstrap servers."""


class BrokerRefused(SourceError):
    """A broker answers and does not let us in."""


class TopicMissing(SourceError):
    """The topic does not exist."""


class TopicChanged(SourceError):
    """The topic is not the one that the snapshot's offsets belong to."""


class OffsetsLost(SourceError):
    """The offsets to resume from are no longer in the topic."""


class SnapshotError(TailstreamError):
    """A snapshot or its store cannot be used."""

    exit_code = 5


class SnapshotCorrupt(SnapshotError):
    """A file of a snapshot is torn, missing or altered."""


class SnapshotMismatch(SnapshotError):
    """The store holds a model that the configuration does not describe."""


class StoreLocked(SnapshotError):
    """Another trainer writes to this store."""


class StoreUnavailable(SnapshotError):
    """An object store is away, or does not let us in; nothing is known of what is there."""


class PublishError(TailstreamError):
    """Records could not be sent."""

    exit_code = 6


class DemoError(TailstreamError):
    """A part of the demo could not be started, or died."""

    exit_code = 7


class RankLost(TailstreamError):
    """Another rank of a training job ended, or does not answer."""

    exit_code = 8
